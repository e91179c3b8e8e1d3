"""One recording process per run: a lock file with its owner and a heartbeat.

On one machine the kernel's lock on the file decides, and a process that dies, even by ``kill -9``, frees it
at once. Between machines that share a folder, where such locks may not reach, the age of the owner's
heartbeat decides. Reading a run needs no lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tinyonn.errors import StoreBusyError, StoreError

HEARTBEAT = 5.0  # seconds between heartbeats
STALE = 60.0  # seconds without one after which an owner on another machine counts as dead


class RunLock:
    """Holds a run for one process, as a context manager.

    Parameters
    ----------
    folder : path
        The run's local folder; made if it is not there. The file is ``folder/lock``.
    heartbeat, stale : float
        Seconds.

    Raises
    ------
    StoreBusyError
        On entering, if another process holds the run: names its host, process, age and the file.
    """

    def __init__(self, folder: str | Path, heartbeat: float = HEARTBEAT, stale: float = STALE) -> None:
        self.path = Path(folder) / "lock"
        self._heartbeat, self._stale = heartbeat, stale
        self._file: int | None = None
        self._owner: dict[str, Any] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: str | None = None

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"cannot make the lock file {self.path} ({error}); check the folder and its permissions"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder = read_owner(self.path)
            age = time.time() - float(holder.get("heartbeat", 0.0))
            if holder and holder.get("host") != socket.gethostname() and age < self._stale:
                raise BlockingIOError
        except BlockingIOError:
            os.close(file)
            raise StoreBusyError(self._explain(read_owner(self.path))) from None
        now = time.time()
        self._file = file
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": now, "heartbeat": now}
        self._write(self._owner)
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        assert self._thread is not None and self._file is not None
        self._thread.join()
        if self._lost is None:
            self._write({})
        os.close(
            self._file
        )  # frees the kernel's lock; the file stays, since removing it would race with the next owner
        self._file = None

    def check(self) -> None:
        """Make sure that the lock is still ours; call before a commit.

        Raises
        ------
        StoreBusyError
            If this machine slept so long that another took the run over.
        """
        if self._lost is None:
            self._compare()
        if self._lost is not None:
            raise StoreBusyError(self._lost)

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat):
            self._compare()
            if self._lost is not None:
                return
            self._owner["heartbeat"] = time.time()
            try:
                self._write(self._owner)
            except OSError:
                continue  # a full disk must not end the run here; the commit will say so

    def _compare(self) -> None:
        holder = read_owner(self.path)
        if holder and any(holder.get(key) != self._owner[key] for key in ("host", "pid", "started")):
            self._lost = self._explain(holder)

    def _write(self, owner: dict[str, Any]) -> None:
        assert self._file is not None
        text = json.dumps(owner).encode() if owner else b""
        # One write, padded over what was there: a reader never sees a file cut short.
        size = max(len(text), os.fstat(self._file).st_size) if text else 0
        os.pwrite(self._file, text.ljust(size), 0)
        if not text:
            os.ftruncate(self._file, 0)

    def _explain(self, holder: dict[str, Any]) -> str:
        if not holder:
            return f"the run is held by another process ({self.path}); wait for it or stop it"
        now = time.time()
        return (
            f"the run is held by process {holder.get('pid')} on {holder.get('host')}, started "
            f"{now - float(holder.get('started', now)):.0f} s ago, last heard of "
            f"{now - float(holder.get('heartbeat', now)):.0f} s ago ({self.path}); wait for it or stop it"
        )


def read_owner(path: Path) -> dict[str, Any]:
    """Who holds a run: ``host``, ``pid``, ``started`` and ``heartbeat`` (Unix time); empty if nobody."""
    try:
        owner = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
