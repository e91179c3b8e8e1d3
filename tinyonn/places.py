"""Where the parts of a run lie: its location, its folder on this machine, its store."""

from __future__ import annotations

import os
from pathlib import Path

from tinyonn.errors import InputError
from tinyonn.show.escape import shortened

LONGEST_PATH = 3000  # bytes; below it lie the store's own files, and Linux takes 4,096
LONGEST_PART = 255  # bytes of one name in a path
LOCAL_ROOT = "storage"  # of what stays local when the store lies in a bucket
JOB_COPY = (
    "runtime_resources"  # Ray unpacks a job's working directory below a folder of this name, and clears it
)


def checked_text(text: str) -> str:
    """Refuse what no file and no column can be called: the NUL character, halves of characters."""
    if "\0" in text:
        raise ValueError("it has a NUL character, which no name may have")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it is not valid Unicode") from None
    return text


def checked_path(text: str) -> str:
    """Refuse a path that no file system takes, or below the home of someone who is not there."""
    parts = checked_text(text).split("/")
    size, longest = len(text.encode("utf-8")), max(len(part.encode("utf-8")) for part in parts)
    if size > LONGEST_PATH:
        raise ValueError(f"it is {size:,} bytes long; at most {LONGEST_PATH:,} are taken")
    if longest > LONGEST_PART:
        raise ValueError(f"a name in it is {longest:,} bytes long; at most {LONGEST_PART} are taken")
    if text.startswith("~") and not _has_home(parts[0]):
        raise ValueError(f"there is no user {parts[0][1:]!r} on this machine; give the folder itself")
    return text


def _has_home(user: str) -> bool:
    """Whether ``~`` or ``~user`` stands for a folder."""
    try:
        Path(user).expanduser()
    except RuntimeError:
        return False
    return True


def base_folder() -> Path:
    """Where relative locations begin: the current folder, but in a Ray job ``TINYONN_HOME``, by default ``~/tiny-onn``.

    A job runs in an unpacked copy of what was submitted. Runs left there would be lost when Ray clears it.
    """
    here = Path.cwd()
    if JOB_COPY not in here.parts:
        return Path()
    return Path(os.environ.get("TINYONN_HOME", "~/tiny-onn")).expanduser()


def run_location(run: str, root: str) -> str:
    """Where a run lies: under `root`, unless it is a path or an address itself.

    Raises
    ------
    InputError
        Not a name.
    """
    try:
        checked_path(run.removeprefix("s3://"))
    except ValueError as error:
        raise InputError(f"RUN = {shortened(run)}: {error}") from None
    if run.startswith("s3://"):
        return run.rstrip("/")
    if "/" in run:
        return _placed(run.rstrip("/") or "/")
    if not run or run in (".", "..") or run.startswith("-") or run != run.strip():
        raise InputError(
            f"RUN = {run!r} is not the name of a run; give a name such as demo, a folder or an s3:// address"
        )
    inside = f"{root.rstrip('/')}/{run}"
    return inside if root.startswith("s3://") else _placed(inside)


def _placed(path: str) -> str:
    base = base_folder()
    return path if base == Path() else str(base / path)


def local_folder(location: str) -> Path:
    """The run's folder on this machine: logs, lock, corpus. The store may lie in a bucket."""
    if location.startswith("s3://"):
        return base_folder() / LOCAL_ROOT / location.rstrip("/").rsplit("/", 1)[-1]
    return Path(location)


def store_location(location: str) -> str:
    """The run's Icechunk repository."""
    return f"{location.rstrip('/')}/store"


def check_there(location: str) -> None:
    """Refuse a run that is not there, before anything is imported that only a run needs.

    Raises
    ------
    InputError
        No store lies on this machine where it should.
    """
    if not location.startswith("s3://") and not Path(store_location(location)).is_dir():
        raise InputError(f"{location}: no run is stored there; `tinyonn record` makes one")
