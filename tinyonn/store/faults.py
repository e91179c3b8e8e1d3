"""Turn what Icechunk, Zarr and the disk raise into the project's errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import icechunk

from tinyonn.errors import (
    CapacityError,
    InputError,
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    TinyONNError,
)

FULL = ("no space left on device", "disk quota exceeded", "file too large")
DENIED = (
    "permission denied", "read-only file system", "accessdenied", "access denied", "invalidaccesskeyid",
    "signaturedoesnotmatch", "expiredtoken", "invalidtoken", "requesttimetooskewed", "allaccessdisabled",
    "authorizationheadermalformed", "could not load credentials", "no credentials",
)  # fmt: skip
NEWER = ("written with a more modern version", "only supports up to version")  # Icechunk 1, and 2
AWAY = ("nosuchbucket", "dispatch failure", "connection refused", "timed out", "dns error")
ANSWERED = (  # of requests to S3
    "service error", "streaming error", "response error", "construction failure", "should have an etag",
)  # fmt: skip
GONE = "nosuchkey"  # an answer about bytes
SILENT = ("error", "unhandled error", "service error")  # causes that say nothing


NOT_S3 = "check AWS_ENDPOINT_URL, and that no proxy or login page answers in its place"


def is_full(error: BaseException) -> bool:
    """Whether `error` says that a disk, a quota or a file size limit is exhausted."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(text in str(error).lower() for text in FULL)


def newer_store(what: str) -> str:
    """Why a store of a newer Icechunk cannot be read, and what helps."""
    return (
        f"{what}: the store was written by a newer Icechunk than {icechunk.__version__}, which is installed; use the "
        "Python and the Icechunk that it was recorded with (Icechunk 2 needs Python 3.12 or later), or record again"
    )


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise the project's error for whatever the store raises inside; `what` names the action and the place.

    Raises
    ------
    CapacityError
        The disk is full.
    StoreBusyError
        Another process committed in between.
    InputError
        A newer Icechunk wrote the store.
    StoreDamagedError
        Bytes are missing, fail their checksum, or make no sense.
    StoreError
        The store cannot be reached, or what answers in its place answers with an error or with nonsense.
    """
    try:
        yield
    except TinyONNError:
        raise
    except icechunk.ConflictError as error:
        raise StoreBusyError(
            f"{what}: another process committed to the run meanwhile ({_short(error)}); only one may record"
        ) from error
    except (icechunk.IcechunkError, ValueError, RuntimeError, OSError) as error:
        if any(text in str(error).lower() for text in NEWER):
            raise InputError(newer_store(what)) from error
        if is_full(error):
            raise CapacityError(
                f"{what}: no space left ({_short(error)}); "
                "free some or move the run, all that was committed is still readable"
            ) from error
        if isinstance(error, PermissionError) or any(text in str(error).lower() for text in DENIED):
            raise StoreError(
                f"{what}: not allowed ({_short(error)}); check the permissions of the run's folder or bucket"
            ) from error
        if any(text in str(error).lower() for text in AWAY):
            raise StoreError(
                f"{what}: the storage cannot be reached ({_short(error)}); check its address and the network"
            ) from error
        if any(text in str(error).lower() for text in ANSWERED) and GONE not in str(error).lower():
            raise StoreError(
                f"{what}: the storage answers with an error, or with what is no answer of S3's ({_short(error)}); "
                f"{NOT_S3}, and try again: nothing that was committed is lost"
            ) from error
        raise StoreDamagedError(
            f"{what}: bytes are missing or fail their checksum ({_short(error)}); "
            "restore the file from a copy, or record into another folder"
        ) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise StoreDamagedError(
            f"{what}: Icechunk cannot make sense of the store's bytes ({_short(error)}); "
            "restore the file from a copy, or record into another folder"
        ) from error


def is_panic(error: BaseException) -> bool:
    """Whether Icechunk's Rust gave up, as on a kind of node that there is not; the classes can be imported nowhere."""
    return type(error).__name__ in ("PanicException", "RustPanic")


def _short(error: BaseException) -> str:
    """The first cause: messages of Icechunk 1 are a page long and end with it, those of 2 begin with it."""
    message = str(error)
    if "->" not in message:
        message = message.partition("context:")[0].strip() or message
    lines = [line.strip(" |-`>\u25b6\u00d7x") for line in message.splitlines()]
    causes = [line for line in lines if line]
    told = [cause for cause in causes if cause.lower() not in SILENT]
    text = (told or causes)[-1] if causes and isinstance(error, icechunk.IcechunkError) else " ".join(causes)
    return f"{type(error).__name__}: {text[:300]}"
