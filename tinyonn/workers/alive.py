"""Whether the Ray that a stage stands on is still there: what waits for it does not wait for ever.

A thread looks: at the processes of a local Ray, which are this one's children, and on a cluster at the scheduler of
this machine, and whether the control server answers and counts this machine in. Ray itself waits for a minute and then
ends the process from within; with a scheduler that dies just when it is asked for workers, at once, without a word and
with exit code 1, before anybody can look. Here the loss is an `EngineLostError` in the main thread: where it waits it
asks `check`, and where it sits in a call of Ray's it is taken out of it (`tinyonn.endings`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import psutil
import ray

from tinyonn import endings
from tinyonn.errors import CapacityError, EngineLostError, TinyONNError

LOG = logging.getLogger(__name__)
LOOK = 1.0  # seconds between looks
STARTING = 10.0  # seconds in which a local Ray that is being started may replace a process of its own
SURE = 1.0  # seconds after which a process that has ended is believed: whoever ends all of them ends this one too
LATE = 10.0  # seconds from one look to the next after which this process itself was stopped
ANSWER = 30.0  # seconds without an answer of a cluster's control server after which it counts as gone
NOTICE = 2.0  # seconds until the main thread is taken out of a call
LET_GO = 5.0  # seconds for leaving a Ray that is gone, or leaving in a hurry
SHUTDOWN = 60.0  # seconds for leaving it otherwise
FETCH = 0.2  # seconds between looks at a call in a thread of its own
PATIENCE = 60.0  # seconds without any worker after which the user is told what is waited for
WORKERS = 900.0  # seconds without any worker after which a stage gives up; the environment may say otherwise
SERVERS = {"gcs_server": "control server (gcs_server)", "raylet": "scheduler of this machine (raylet)"}

_watches: list[Watch] = []


class Watch:
    """Looks after the connected Ray, as a context manager.

    Parameters
    ----------
    address : str or None
        Of a cluster; None is a local Ray, whose processes this one has started.
    held : callable
        Says in words what is committed when Ray is lost.
    others : iterable of psutil.Process
        Children of this process that are not Ray's.
    """

    def __init__(
        self, address: str | None, held: Callable[[], str], others: Iterable[psutil.Process] = ()
    ) -> None:
        self._address, self._held = address, held
        self._others = frozenset(others)
        self.lost: EngineLostError | None = None
        self._noticed = threading.Event()
        self._ended = threading.Event()
        self._servers = _servers() if address is None else _raylet_here()
        self._family: set[psutil.Process] = set()
        self._heard = time.monotonic()
        self._left = False  # this machine has left the cluster
        self._thread = threading.Thread(target=self._run, name="ray-watch", daemon=True)

    def __enter__(self) -> Watch:
        _watches.append(self)
        if self._address is not None:
            threading.Thread(target=self._listen, name="ray-listen", daemon=True).start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error of Ray's own: raise EngineLostError if it comes from its loss."""
        _watches.remove(self)
        ours = isinstance(error, TinyONNError) and not isinstance(
            error, CapacityError
        )  # not for want of workers
        if isinstance(error, Exception) and not ours and self.lost is None:
            self._confirm()
        self._noticed.set()
        self._ended.set()
        if self.lost is not None and isinstance(error, Exception) and error is not self.lost:
            raise self.lost from None

    def check(self) -> None:
        """Raise EngineLostError if Ray is gone."""
        if self.lost is not None:
            self._noticed.set()
            raise self.lost

    def sweep(self) -> None:
        """End what a lost Ray has left of its processes."""
        if self.lost is None:
            return
        for process in self._family:
            with contextlib.suppress(psutil.Error):
                if process.is_running():  # the same, not another with its number
                    process.kill()

    def _run(self) -> None:
        turned = time.monotonic()
        while not self._ended.wait(LOOK):
            if self._address is None:
                with contextlib.suppress(psutil.Error):
                    self._family.update(set(psutil.Process().children(recursive=True)) - self._others)
            now = time.monotonic()
            if now - turned > LATE:  # this process has stood still, and so has what listens
                self._heard = now
            turned = now
            if self._gone() is None:
                continue
            time.sleep(SURE)
            if (what := self._gone()) is not None:
                self._lose(what)
                break
        if self.lost is not None and not self._noticed.wait(NOTICE):
            endings.end(self.lost)

    def _lose(self, what: str) -> None:
        if self.lost is not None or endings.ending() is not None or self._ended.is_set():
            return
        self.lost = _lost(what, _told(self._held))
        LOG.debug("Ray is lost: %s", what)

    def _confirm(self) -> None:
        """Look once more: an error of Ray's own may come before the next look."""
        deadline = time.monotonic() + (LOOK + SURE if self._address is None else ANSWER / 3)
        while self.lost is None and time.monotonic() < deadline:
            if (what := self._gone(ANSWER / 6)) is not None:
                self._lose(what)
            time.sleep(FETCH)

    def _gone(self, answer: float = ANSWER) -> str | None:
        """What of Ray is gone, in words."""
        for name, process in self._servers:
            if not _lives(process):
                return f"Ray's {SERVERS[name]}, process {process.pid}, has ended"
        if self._address is None:
            return None
        if self._left:
            return f"this machine does not belong to the Ray cluster at {self._address} any more"
        silent = time.monotonic() - self._heard
        if silent > answer:
            return f"the Ray cluster at {self._address} has not answered for {silent:.0f} s"
        return None

    def _listen(self) -> None:
        """Ask a cluster's control server which machines there are, for ever; a call that hangs is no answer."""
        here = ray.get_runtime_context().get_node_id()
        while not self._ended.wait(LOOK):
            try:
                alive = {node["NodeID"]: node["Alive"] for node in ray.nodes()}
            except Exception:  # whatever Ray says of what does not answer
                continue
            self._heard = time.monotonic()
            self._left = not alive.get(here, True)


@contextlib.contextmanager
def starting(held: Callable[[], str]) -> Iterator[None]:
    """While a local Ray is being started: if a process of its own ends and none takes its place, so does this one.

    Ray itself would end it after a minute, without a word.
    """
    ended = threading.Event()

    def look() -> None:
        seen: dict[str, float] = {}  # when a server was last there, alive
        while not ended.wait(FETCH):
            now = time.monotonic()
            for name, process in _servers():
                seen[name] = now if _lives(process) else seen.get(name, now)
            for name, last in seen.items():
                if time.monotonic() - last > STARTING:
                    endings.end(
                        _lost(f"Ray's {SERVERS[name]} has ended while Ray was being started", _told(held))
                    )
                    return

    threading.Thread(target=look, name="ray-start", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _lost(what: str, held: str) -> EngineLostError:
    return EngineLostError(
        f"{what}; {held}, and the same command goes on from there; most often a machine is out of memory or was "
        "switched off: see the run's logs and `tinyonn plan`"
    )


def _told(held: Callable[[], str]) -> str:
    """What is committed, as far as it can be asked for: a store may lie where the network was lost, too."""
    try:
        return held()
    except Exception:
        LOG.debug("what is committed cannot be asked for", exc_info=True)
        return "what was committed stays"


def check() -> None:
    """Raise EngineLostError if the Ray that this process is connected to is gone."""
    for watch in _watches:
        watch.check()


def patiently(function: Callable[..., Any], *arguments: Any, tick: Callable[[], None] = lambda: None) -> Any:
    """The result of a call that may wait for Ray, in a thread of its own; `tick` is called meanwhile.

    Raises
    ------
    EngineLostError
        Ray is gone; the call is left alone.
    """
    result: list[Any] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function(*arguments))
        except BaseException as caught:  # raised below
            error.append(caught)

    thread = threading.Thread(target=run, name="ray-call", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(FETCH)
        check()
        tick()
    if error:
        raise error[0]
    return result[0]


def let_go(hurry: bool) -> None:
    """Leave Ray, which ends a local one; not waiting for ever, whatever state it is in."""
    thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    thread.start()
    began = time.monotonic()
    while thread.is_alive():
        if time.monotonic() - began > (LET_GO if hurry or endings.ending() else SHUTDOWN):
            LOG.debug("Ray does not let go")
            return
        thread.join(FETCH)


class Waiting:
    """How long a stage has been without any worker: tells the user, and gives up at last.

    Parameters
    ----------
    say : callable
        Takes a line.
    held : callable
        Says in words what is committed.
    """

    def __init__(self, say: Callable[[str], None], held: Callable[[], str]) -> None:
        self._say, self._held = say, held
        self._since = self._said = time.monotonic()

    def see(self, any_worker: bool) -> None:
        """Take notice of whether a worker's process runs now.

        Raises
        ------
        CapacityError
            None has for `patience` seconds.
        """
        now = time.monotonic()
        if any_worker:
            self._since = self._said = now
            return
        limit = patience()
        if now - self._since > limit:
            raise CapacityError(
                f"no worker could be had for {limit:.0f} s: the cluster is full of other work, or its machines cannot "
                f"start one (see `ray status`); {_told(self._held)}, and the same command goes on from there; set "
                "TINYONN_PATIENCE to more seconds to wait longer"
            )
        if now - self._said > PATIENCE:
            self._said = now
            self._say(
                f"still waiting for a worker to start, for {now - self._since:.0f} of {limit:.0f} s: the cluster may "
                "be busy with other work"
            )


def patience() -> float:
    """Seconds without any worker after which a stage gives up: ``TINYONN_PATIENCE``, by default `WORKERS`."""
    given = os.environ.get("TINYONN_PATIENCE", "")
    return float(given) if given.isdecimal() and len(given) < 10 else WORKERS


def _servers() -> list[tuple[str, psutil.Process]]:
    """Ray's own processes among this one's children, with their names."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if (name := child.name()) in SERVERS:
                found.append((name, child))
    return found


def _raylet_here() -> list[tuple[str, psutil.Process]]:
    """The scheduler of this machine's part of a cluster: Ray ends this process without a word once that has ended."""
    node = f"--node_id={ray.get_runtime_context().get_node_id()}"
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet" and node in process.cmdline():
                found.append(("raylet", process))
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
