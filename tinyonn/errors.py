"""One tree of errors, grouped by what the caller can do about them.

Every message names the value, the limit and the remedy. The command line prints the message without a
traceback and exits with the class's ``exit_code``.
"""

from __future__ import annotations


class TinyONNError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code = 1


class InputError(TinyONNError):
    """Wrong use or input: a configuration, a model, a corpus or a run that does not match. Exit code 2."""

    exit_code = 2


class CapacityError(TinyONNError):
    """Something does not fit: GPU memory, RAM or disk. Exit code 3."""

    exit_code = 3


class StoreError(TinyONNError):
    """The run's store cannot be used as it is. Exit code 4."""

    exit_code = 4


class StoreBusyError(StoreError):
    """Another process holds the run."""


class StoreDamagedError(StoreError):
    """Bytes of the store, or of a file beside it, are missing or are not what was written."""


class EngineLostError(TinyONNError):
    """What a stage's workers run on, such as Ray, is gone. Exit code 4."""

    exit_code = 4


def first_line(error: BaseException, most: int = 300) -> str:
    """Of what an error says, so many characters, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
