"""Where the parts of a run lie: its location, its folder on this machine, its store."""

from __future__ import annotations

import os
from pathlib import Path

from tinyonn.errors import InputError

LOCAL_ROOT = "storage"  # of what stays local when the store lies in a bucket
JOB_COPY = (
    "runtime_resources"  # Ray unpacks a job's working directory below a folder of this name, and clears it
)


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
