from __future__ import annotations

import errno

import pytest

from tinyonn.errors import CapacityError, StoreDamagedError, StoreError
from tinyonn.store.faults import translated


@pytest.mark.parametrize(
    ("cause", "kind", "remedy"),
    [
        (OSError(errno.ENOSPC, "x"), CapacityError, "free some"),
        (OSError(errno.EDQUOT, "x"), CapacityError, "free some"),
        (RuntimeError("|-> No space left on device (os error 28)"), CapacityError, "free some"),
        (PermissionError(errno.EACCES, "x"), StoreError, "check the permissions"),
        (RuntimeError('Error { code: "NoSuchBucket" }'), StoreError, "check its address"),
        (RuntimeError("dispatch failure: Connection refused"), StoreError, "check its address"),
        (ValueError("Stored and computed checksum do not match"), StoreDamagedError, "restore the file"),
    ],
)
def test_each_cause_has_its_error_and_remedy(cause: Exception, kind: type[Exception], remedy: str) -> None:
    with (
        pytest.raises(StoreError if kind is StoreError else kind, match=remedy) as caught,
        translated("doing it"),
    ):
        raise cause
    assert type(caught.value) is kind
    assert str(caught.value).startswith("doing it: ")
    assert caught.value.__cause__ is cause


def test_our_own_errors_and_mistakes_pass() -> None:
    with pytest.raises(StoreError, match=r"^mine$"), translated("doing it"):
        raise StoreError("mine")
    with pytest.raises(KeyError), translated("doing it"):
        raise KeyError("a mistake in the code")
