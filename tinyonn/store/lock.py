"""Who works on a run: one process that changes it, or any number that read what others must not change meanwhile.

A lock file with its owner and a heartbeat; each that shares the run has one more beside it. On one machine the kernel's
lock on the file decides, and a process that dies, even by ``kill -9``, frees it at once. Between machines that share a
folder, where such locks may not reach, an owner counts as alive if its heartbeat changes while it is watched: clocks
are not compared, since two machines' may differ. Looking at a run needs no lock.

Anybody may have written what a lock file says of its owner: nothing in it is trusted. docs/architecture.md has the
table of which stages may run together.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from tinyonn.errors import StoreBusyError, StoreError
from tinyonn.files import make_private
from tinyonn.places import local_folder

LOG = logging.getLogger(__name__)
HEARTBEAT = 5.0  # seconds between heartbeats
STALE = 60.0  # seconds that an owner on another machine is watched; one without a heartbeat meanwhile counts as dead
READER = re.compile(r"lock\.[0-9a-f]{8}")  # a file of one that shares the run
FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # the last for a pipe in the file's place
LOCK_BYTES = 4096  # more than any lock file has
TEXT = 100  # characters of a name that are shown
BOOT = Path("/proc/sys/kernel/random/boot_id")  # another one after every start of the machine
Owner = dict[str, Any]


class RunLock:
    """Holds a run for one process, as a context manager.

    Parameters
    ----------
    folder : path
        The run's local folder; made if it is not there, for its owner alone. The file is ``folder/lock``.
    heartbeat, stale : float
        Seconds.
    shared : bool
        Others may share it too, and nobody may hold it alone meanwhile. Where nothing is, or nothing can be written,
        there is nobody to keep out: then this does nothing.
    what : str
        The stage, for the message that others get.

    Raises
    ------
    StoreBusyError
        On entering, if another process holds the run: names its host, process, age and the file. To find out, an
        owner on another machine is watched for up to `stale` seconds.
    StoreError
        The file cannot be made, or something else lies in its place.
    """

    def __init__(
        self,
        folder: str | Path,
        heartbeat: float = HEARTBEAT,
        stale: float = STALE,
        *,
        shared: bool = False,
        what: str = "",
    ) -> None:
        self.path = Path(folder) / "lock"
        self._heartbeat, self._stale = heartbeat, stale
        self._shared, self._what = shared, what
        self._gate: int | None = None  # descriptor of `path`, under the kernel's lock
        self._own: int | None = None  # of the file that has our heartbeat: the same, or one more if shared
        self._own_path = self.path
        self._owner: Owner = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: str | None = None
        self._kernel = True  # whether the kernel's lock decides on this machine

    def __enter__(self) -> RunLock:
        if self._shared and not self.path.parent.is_dir():
            return self
        try:
            self._gate = self._open(self.path)
            if self._gate is None:
                return self
            self._take()
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._release()

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

    def _take(self) -> None:
        """Each side first says that it is there, then looks for the other: of two, one at least is refused."""
        assert self._gate is not None
        owner = this_process(self._what)
        try:
            fcntl.flock(self._gate, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreBusyError(self._explain(self._holders())) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            LOG.debug("%s: the file system knows no locks; heartbeats alone decide", self.path)
            self._kernel = False
        if self._shared:
            self._own_path = self.path.with_name(f"lock.{secrets.token_hex(4)}")
            self._own = self._open(self._own_path)
            if self._own is None:
                return
            self._write(owner)
            self._watch([self.path])
        else:
            self._watch([self.path])
            self._own = self._gate
            self._write(owner)
            readers = self._readers()
            self._watch(readers)
            for path in readers:  # of processes that are dead
                path.unlink(missing_ok=True)

    def _open(self, path: Path) -> int | None:
        """A descriptor of a regular file of ours; None where a shared lock has nothing to write to."""
        try:
            make_private(path.parent)
            file = os.open(path, FLAGS | os.O_CREAT, 0o600)
        except OSError as error:
            if self._shared and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
                LOG.debug("%s cannot be written (%s): read without a lock", path, error.strerror)
                return None
            reason = "it is a symbolic link" if error.errno == errno.ELOOP else str(error)
            raise StoreError(
                f"cannot make the lock file {path} ({reason}); check the folder and its permissions, and remove what "
                "lies there if it is not of a run"
            ) from None
        wrong = _not_ours(os.fstat(file), path.parent.stat().st_uid)
        if wrong is not None:
            os.close(file)
            raise StoreError(f"{path} is no lock of this run: it is {wrong}; move it away, then try again")
        return file

    def _watch(self, paths: Sequence[Path]) -> None:
        """Wait until the owners on other machines are seen alive, which is refused, or count as dead."""
        owners = {path: owner for path in paths if (owner := read_owner(path))}
        before = {path: owner for path, owner in owners.items() if _elsewhere(owner) or not self._kernel}
        if not before:
            return
        LOG.info(
            "%s: %s held the run; looking for up to %.0f s whether it still does",
            self.path,
            ", ".join(described(owner) for owner in before.values()),
            self._stale,
        )
        end = time.monotonic() + self._stale
        while before and time.monotonic() < end:
            time.sleep(min(0.5, self._stale / 20))
            for path, owner in list(before.items()):
                found = read_owner(path)
                if found and found != owner:
                    raise StoreBusyError(self._explain({path: found}))
                if not found:  # it has ended
                    del before[path]

    def _readers(self) -> list[Path]:
        return sorted(path for path in self.path.parent.glob("lock.*") if READER.fullmatch(path.name))

    def _holders(self) -> dict[Path, Owner]:
        """Whoever is in the way, by file."""
        others = [self.path, *([] if self._shared else self._readers())]
        return {path: owner for path in others if (owner := read_owner(path))}

    def _release(self) -> None:
        if self._own is not None and self._own != self._gate:
            self._own_path.unlink(missing_ok=True)
            os.close(self._own)
        elif self._own is not None and self._lost is None:
            with suppress(OSError):
                self._write({})
        if self._gate is not None:
            os.close(
                self._gate
            )  # frees the kernel's lock; the file stays, since removing it would race with the next owner
        self._gate = self._own = None

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat):
            self._compare()
            if self._lost is not None:
                return
            try:
                self._write(self._owner | {"heartbeat": time.time()})
            except OSError:
                continue  # a full disk must not end the run here; the commit will say so

    def _compare(self) -> None:
        if self._own is None:
            return
        holder = read_owner(self._own_path)
        if holder and any(holder.get(key) != self._owner[key] for key in ("host", "pid", "started")):
            self._lost = self._explain({self._own_path: holder})

    def _write(self, owner: Owner) -> None:
        assert self._own is not None
        self._owner = owner or self._owner
        text = json.dumps(owner).encode() if owner else b""
        # One write, padded over what was there: a reader never sees a file cut short.
        size = max(len(text), os.fstat(self._own).st_size) if text else 0
        os.pwrite(self._own, text.ljust(size), 0)
        if not text:
            os.ftruncate(self._own, 0)

    def _explain(self, holders: Mapping[Path, Owner]) -> str:
        if not holders:
            return f"the run is held by another process ({self.path}); wait for it or stop it"
        path, owner = next(iter(holders.items()))
        more = f" and {len(holders) - 1} more" if len(holders) > 1 else ""
        return f"the run is held by {described(owner)}{more} ({path}); wait for it or stop it"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """A folder outside of any run that one process of this machine writes into; nothing is left in it.

    Raises
    ------
    StoreBusyError
        Another process does.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreBusyError(
                f"another process writes into {folder}; wait for it, or give another folder"
            ) from None
        except OSError as error:
            LOG.debug("%s: the file system knows no locks (%s)", folder, error.strerror)
        yield
    finally:
        os.close(file)


@contextmanager
def evaluating(location: str) -> Iterator[None]:
    """A run that only one evaluates, and that nobody changes meanwhile.

    Raises
    ------
    StoreBusyError
        Another process does.
    """
    folder = local_folder(location)
    with RunLock(folder, shared=True, what="evaluate"), RunLock(folder / "evaluate", what="evaluate"):
        yield


def read_owner(path: Path) -> dict[str, Any]:
    """Who holds a run: ``host``, ``pid``, ``started`` and ``heartbeat`` (Unix time); empty if nobody.

    Whatever lies there: a link, a pipe, a directory or anything but an owner's few bytes is nobody.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return {}
    try:
        regular = stat.S_ISREG(os.fstat(file).st_mode)
        return parse_owner(os.read(file, LOCK_BYTES + 1)) if regular else {}
    except OSError:
        return {}
    finally:
        os.close(file)


def _elsewhere(owner: Mapping[str, Any]) -> bool:
    """Whether an owner is of another machine, or of this one before it was started again."""
    here = this_process("")
    return any(owner.get(key, here[key]) != here[key] for key in ("host", "boot"))


def _not_ours(found: os.stat_result, folder_owner: int) -> str | None:
    """Why a file is not one that may be written into; None if it may."""
    if not stat.S_ISREG(found.st_mode):
        return "no regular file"
    if found.st_uid not in (os.geteuid(), folder_owner):
        return f"of another user ({found.st_uid})"
    if found.st_nlink > 1:
        return "one more name of another file"
    if found.st_size > LOCK_BYTES:
        return f"of {found.st_size:,} bytes, more than the {LOCK_BYTES:,} of any lock"
    return None


def this_process(what: str) -> Owner:
    """The owner that the calling process is: ``host``, ``boot``, ``pid``, ``started``, ``heartbeat`` (Unix time)."""
    now = time.time()
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": now,
        "heartbeat": now,
        "what": what,
    }


def parse_owner(data: bytes) -> Owner:
    """The owner that a lock file names; empty if it names none, is no JSON object or too long."""
    if len(data) > LOCK_BYTES:
        return {}
    try:
        owner = json.loads(data.decode("utf-8"), parse_constant=_refused)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) and isinstance(owner.get("host"), str) else {}


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def described(owner: Mapping[str, Any]) -> str:
    """An owner for people: process, host, stage, and ages where the clock is ours."""
    pid, what = owner.get("pid"), owner.get("what")
    process = f"process {pid}" if type(pid) is int and 0 < pid < 1 << 31 else "a process"
    stage = f" ({_shown(what)})" if isinstance(what, str) and what else ""
    text = f"{process} on {_shown(owner.get('host', '?'))}{stage}"
    if owner.get("host") != socket.gethostname():
        return text  # its clock may be another
    for word, key in (("started", "started"), ("last heard of", "heartbeat")):
        age = _age(owner.get(key))
        text += f", {word} {age:.0f} s ago" if age is not None else ""
    return text


def _age(moment: Any) -> float | None:
    if type(moment) not in (int, float):
        return None
    try:
        age = time.time() - float(moment)
    except OverflowError:
        return None
    return max(0.0, age) if math.isfinite(age) and abs(age) < 1e9 else None


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:TEXT])


@cache
def _boot() -> str:
    try:
        return BOOT.read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
