"""Where the parts of a run lie: its location, its folder on this machine, its store."""

from __future__ import annotations

from pathlib import Path

from tinyonn.errors import InputError

LOCAL_ROOT = "storage"  # of what stays local when the store lies in a bucket


def run_location(run: str, root: str) -> str:
    """Where a run lies: under `root`, unless it is a path or an address itself.

    Raises
    ------
    InputError
        Not a name.
    """
    if run.startswith("s3://") or "/" in run:
        return run.rstrip("/") or "/"
    if not run or run in (".", "..") or run.startswith("-") or run != run.strip():
        raise InputError(
            f"RUN = {run!r} is not the name of a run; give a name such as demo, a folder or an s3:// address"
        )
    return f"{root.rstrip('/')}/{run}"


def local_folder(location: str) -> Path:
    """The run's folder on this machine: logs, lock, corpus. The store may lie in a bucket."""
    if location.startswith("s3://"):
        return Path(LOCAL_ROOT) / location.rstrip("/").rsplit("/", 1)[-1]
    return Path(location)


def store_location(location: str) -> str:
    """The run's Icechunk repository."""
    return f"{location.rstrip('/')}/store"
