"""What memory a run takes: what a user must have free for it, of all its processes together, at one time.

Counted are this process and all that descend from it (Ray's own processes, recorders, Dask's workers, loaders of
data), and Ray's own processes of a cluster on this machine that was there before. Of each process

- private memory: its anonymous pages, swapped ones included;
- shared memory (Ray's object store, loaders' batches, pages that a fork has in common): once, each process its part;
- libraries: pages of shared objects and programs, once as well, each as the process has it that has most. They could
  be read again from their files, but a process that is in them all the time would do nothing else.

Other pages of mapped files (corpus, checkpoints) are not counted: the system takes them back when it needs room.

A thread looks every 0.05 s at ``/proc/<pid>/status``, a few microseconds for each process. What rose and fell between
two looks is seen where it set a new high-water mark of its process. What is shared is taken from ``smaps``, a few
milliseconds, seldom. Where there is no ``/proc`` (macOS) it is resident memory, shared pages counted in each process.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tinyonn.show.sizes import format_size

__all__ = ["Meter", "Usage", "measured", "process_meter", "total_peak"]

PROC = Path("/proc")
LOOK = 0.05  # seconds between looks
SHARE = 0.02  # of a CPU that looking may take: looks are further apart where they take longer
LISTING = 0.5  # seconds between looks for new processes
DETAIL = (
    0.0,
    1.0,
    3.0,
    8.0,
    20.0,
)  # seconds of a process's life after which its pages are looked at, and then
DETAIL_EVERY = 30.0
RAYS_OWN = re.compile(rb"/ray/(core/src|_private|autoscaler|dashboard|util)/|ray::(IDLE|\w*Agent)")
MAPPING = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ \d+ +(/.*)$", re.MULTILINE)
HELD = re.compile(rb"^Rss: +(\d+) kB[^$]*?^Anonymous: +(\d+) kB", re.MULTILINE)

Kind = Literal["main", "workers", "ray"]


@dataclass(frozen=True)
class Usage:
    """Bytes that the processes of this machine held together when they held most.

    Attributes
    ----------
    peak : int
    main, workers, ray, libraries : int
        Its parts: this process, those that work for it, Ray's own; shared objects of all.
    processes : int
        At that time.
    """

    peak: int = 0
    main: int = 0
    workers: int = 0
    ray: int = 0
    libraries: int = 0
    processes: int = 0

    def parts(self) -> dict[str, int]:
        """By name; of what is held alone."""
        names = ("main", "workers", "ray", "libraries")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in self.parts().items())
        return f"{format_size(self.peak)} ({parts})"


class Meter:
    """Keeps the most that was held since it was started; read `usage` at any time, from any thread."""

    def __init__(self) -> None:
        self._usage = Usage()
        self._pids: set[int] = set()

    def start(self) -> Meter:
        """Begin; ends with the process or with `stop`."""
        _SAMPLER.add(self)
        return self

    def stop(self) -> None:
        """Look a last time."""
        _SAMPLER.remove(self)

    @property
    def usage(self) -> Usage:
        """Of the time since `start`, this moment included."""
        _SAMPLER.look()
        return self._usage

    def saw(self, pid: int) -> bool:
        """Whether a process of this machine is counted."""
        return pid in self._pids

    def take(self, usage: Usage, pids: Iterable[int]) -> None:
        """What a look has found."""
        self._pids.update(pids)
        if usage.peak > self._usage.peak:
            self._usage = usage


@cache
def process_meter() -> Meter:
    """The meter of a process that works for another one, from the first call on."""
    return Meter().start()


@contextmanager
def measured() -> Iterator[Meter]:
    """A meter for a block; several may run at once, one within another."""
    meter = Meter().start()
    try:
        yield meter
    finally:
        meter.stop()


def total_peak(meter: Meter, workers: Iterable[tuple[str, int, int]]) -> int:
    """Bytes of this machine at its peak, and of workers elsewhere, each at its own.

    Parameters
    ----------
    meter : Meter
    workers : iterable of (str, int, int)
        Host, process and peak of each; those that the meter saw itself are not counted again.
    """
    here = os.uname().nodename
    own = meter.usage.peak
    return own + sum(peak for host, pid, peak in workers if host != here or not meter.saw(pid))


@dataclass
class _Process:
    """What is known of one process; bytes."""

    kind: Kind
    parent: int
    born: float
    detailed: int = 0  # looks at its pages so far
    shared: int = 0  # of its pages, what others have been counted for
    libraries: dict[bytes, int] = field(default_factory=dict)  # by file
    high: int = 0
    files: int = 0


@dataclass
class _Sampler:
    """The one thread that looks, for all meters."""

    meters: list[Meter] = field(default_factory=list)
    known: dict[int, _Process] = field(default_factory=dict)
    _strangers: dict[int, int] = field(default_factory=dict)  # parent by process, of those that are not ours
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _wake: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _listed: float = 0.0
    _ray: str = ""
    _pid: int = 0
    _looks: int = 0  # at pages
    _libraries: int = 0

    def add(self, meter: Meter) -> None:
        with self._lock:
            if self._pid != os.getpid() or not self.meters:  # a fork has its parent's objects and no thread
                self.__init__(_lock=self._lock, _pid=os.getpid())  # type: ignore[misc]
            self.look()  # for the others: what was before is not this meter's
            self.meters.append(meter)
            self._listed = 0.0
            self.look()
            if self._thread is None or not self._thread.is_alive():
                self._wake.clear()
                self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
                self._thread.start()

    def remove(self, meter: Meter) -> None:
        with self._lock:
            self.look()
            with suppress(ValueError):
                self.meters.remove(meter)
            if not self.meters:
                self._wake.set()
                self._thread = None

    def _run(self) -> None:
        wake = self._wake
        pause = LOOK
        while not wake.wait(pause):
            started = time.thread_time()
            self.look()
            pause = max(LOOK, min(LISTING, (time.thread_time() - started) / SHARE))

    def look(self) -> None:
        """Look at all processes, and tell every meter."""
        with self._lock:
            if not self.meters:
                return
            usage = self._linux() if (PROC / "self/status").exists() else _elsewhere()
            for meter in self.meters:
                meter.take(usage, self.known)

    def _linux(self) -> Usage:
        now = time.monotonic()
        if now - self._listed > LISTING:
            self._listed = now
            self._list(now)
        sums: dict[Kind, int] = {"main": 0, "workers": 0, "ray": 0}
        count, before = 0, self._looks
        for pid, process in list(self.known.items()):
            held = self._held(pid, process, now)
            if held is None:
                del self.known[pid]
                self._again(process.parent)
                continue
            sums[process.kind] += held
            count += 1
        if self._looks != before:
            self._libraries = _once(process.libraries for process in self.known.values())
        total = sum(sums.values()) + self._libraries
        return Usage(total, sums["main"], sums["workers"], sums["ray"], self._libraries, count)

    def _held(self, pid: int, process: _Process, now: float) -> int | None:
        """Bytes that a process holds beside its libraries; None if it has ended."""
        status = _status(pid)
        if status is None:
            return None
        high, files = status["VmHWM"], status["RssFile"]
        private = status["RssAnon"] + status["RssShmem"] + status.get("VmSwap", 0)
        if process.high and high > process.high:  # it held more for a moment since the last look
            private = max(private, high - max(files, process.files))
        process.high, process.files = high, files
        if now >= process.born + _due(process.detailed):
            process.detailed += 1
            self._looks += 1
            process.kind = _kind(pid)
            process.shared, process.libraries = _pages(pid, status)
        if not process.detailed:
            return 0  # it may be a copy of its parent that will start its own program at once
        return max(0, private - process.shared)

    def _list(self, now: float) -> None:
        """Find the processes that have come, and what Ray's have become: each begins as one that waits for work."""
        for pid, process in self.known.items():
            if process.kind == "ray":
                process.kind = _kind(pid)
        listed = {int(path.name) for path in PROC.iterdir() if path.name.isdigit()}
        self._strangers = {pid: parent for pid, parent in self._strangers.items() if pid in listed}
        parents = dict(self._strangers)
        for pid in listed - parents.keys() - self.known.keys():
            parents[pid] = _parent(pid)
        ours = {os.getpid(), *self.known} | self._rays_elsewhere(parents)
        while found := {pid for pid, parent in parents.items() if pid not in ours and parent in ours}:
            ours |= found
        self._strangers = {pid: parent for pid, parent in parents.items() if pid not in ours}
        for pid in ours & listed - self.known.keys():
            # One that was forked is its parent's copy until it starts its program, and shares its pages else.
            parent = parents.get(pid, 0)
            self.known[pid] = _Process(_kind(pid), parent, now if pid == os.getpid() else now + LOOK)
            self._again(parent)

    def _again(self, pid: int) -> None:
        """Look at a process's pages again: it shares them with more or with fewer."""
        self._looks += 1
        if pid in self.known:
            self.known[pid].detailed, self.known[pid].born = 0, time.monotonic()

    def _rays_elsewhere(self, parents: dict[int, int]) -> set[int]:
        """Ray's own processes of a cluster that this process has joined as its driver."""
        folder = _ray_session()
        if folder == self._ray or not folder:
            return set()
        self._ray = folder
        name = folder.encode()
        return {pid for pid in parents if name in _command(pid) and RAYS_OWN.search(_command(pid))}


def _due(looks: int) -> float:
    last = len(DETAIL) - 1
    return DETAIL[looks] if looks <= last else DETAIL[last] + DETAIL_EVERY * (looks - last)


def _status(pid: int) -> dict[str, int] | None:
    """Bytes by name, of those that are needed; None if the process has ended."""
    try:
        text = (PROC / str(pid) / "status").read_bytes()
    except OSError:
        return None
    found = re.findall(rb"^(VmHWM|RssAnon|RssFile|RssShmem|VmSwap):\s+(\d+) kB", text, re.MULTILINE)
    if len(found) < 4:
        return None  # ended, and not yet waited for
    return {name.decode(): 1024 * int(size) for name, size in found}


def _pages(pid: int, status: dict[str, int]) -> tuple[int, dict[bytes, int]]:
    """Bytes of shared pages that others count, and of each library that this one has in memory."""
    try:
        rollup = (PROC / str(pid) / "smaps_rollup").read_bytes()
        maps = (PROC / str(pid) / "smaps").read_bytes()
    except OSError:  # of another user, or an old kernel: pages are counted whole
        return 0, {}
    part = {name: 1024 * int(size) for name, size in re.findall(rb"^(\w+): +(\d+) kB", rollup, re.MULTILINE)}
    shared = 0
    if b"Pss_Anon" in part:
        shared += max(0, part[b"Anonymous"] - part[b"Pss_Anon"])
        shared += max(0, status["RssShmem"] - part[b"Pss_Shmem"])
    libraries: dict[bytes, int] = defaultdict(int)
    programs = set()
    for block in maps.split(b"\nVmFlags"):
        if (mapping := MAPPING.search(block)) is not None and (held := HELD.search(block)) is not None:
            flags, path = mapping.groups()
            libraries[path] += 1024 * (int(held[1]) - int(held[2]))
            if b"x" in flags:
                programs.add(path)
    return shared, {path: size for path, size in libraries.items() if path in programs}


def _once(many: Iterable[dict[bytes, int]]) -> int:
    """Bytes of files that several hold, each as the one has it that holds most of it."""
    most: dict[bytes, int] = {}
    for files in many:
        for path, size in files.items():
            most[path] = max(size, most.get(path, 0))
    return sum(most.values())


def _parent(pid: int) -> int:
    try:
        text = (PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return 0
    return int(text[text.rindex(b")") + 2 :].split()[1])


def _command(pid: int) -> bytes:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


def _kind(pid: int) -> Kind:
    if pid == os.getpid():
        return "main"
    return "ray" if RAYS_OWN.search(_command(pid)) else "workers"


def _ray_session() -> str:
    """The folder of the Ray session that this process is a driver of; empty without one."""
    ray: Any = sys.modules.get("ray")
    try:
        worker = ray._private.worker
        if worker.global_worker.mode != worker.SCRIPT_MODE:
            return ""
        return str(worker._global_node.get_session_dir_path())
    except AttributeError:  # not there, or not started, or another version of it
        return ""


def _elsewhere() -> Usage:
    """Resident memory, where the system does not say more."""
    import psutil

    own = psutil.Process()
    main = int(own.memory_info().rss)
    workers, count = 0, 1
    for child in own.children(recursive=True):
        with suppress(psutil.Error):
            workers += int(child.memory_info().rss)
            count += 1
    return Usage(main + workers, main, workers, processes=count)


_SAMPLER = _Sampler()
