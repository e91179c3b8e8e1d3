"""How this process ends before its work is done: by a signal, or because what the work stands on is gone.

The first of SIGINT, SIGTERM and SIGHUP raises KeyboardInterrupt in the main thread, so that everything is closed on the
way out. What does not come to its end in `GRACE` seconds, such as a call into a dead Ray, is left behind: a thread of
its own then ends the process and all that it has started. A second signal does that at once. Every stage may be killed
at any moment, so nothing that was committed is lost either way. `finish` is the end of a process that is done.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import NoReturn

from tinyonn.errors import TinyONNError
from tinyonn.show import screen

LOG = logging.getLogger(__name__)
GRACE = 8.0  # seconds from the first signal to the end
TOGETHER = 0.5  # seconds within which signals count as one: a closing terminal and systemd send two
POLL = 0.1
FLUSH_FAILED = 120  # Python's own code where stdout cannot be written
WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the terminal is closed",
}


@dataclass(frozen=True)
class Ending:
    """Why this process ends.

    Attributes
    ----------
    line : str
        For stderr.
    code : int
        That it exits with.
    """

    line: str
    code: int

    @classmethod
    def of_signal(cls, number: int) -> Ending:
        """128 and the signal's number, as shells have it."""
        line = f"{WORDS[signal.Signals(number)]}; what was committed stays, and the same command goes on from there"
        return cls(line, 128 + number)

    @classmethod
    def of_error(cls, error: TinyONNError) -> Ending:
        """As the command line tells an error."""
        return cls(f"tinyonn: {' '.join(str(error).split())}", error.exit_code)


class _State:
    """Of this process."""

    def __init__(self) -> None:
        self.reader = self.writer = -1
        self.ending: Ending | None = None
        self.since: float | None = None  # when it was decided
        self.own = False  # a signal of this process to itself is on its way
        self.again = False  # a second signal came
        self.raised = self.told = False

    def decide(self, number: int) -> None:
        """The first signal decides how the process ends."""
        if self.since is None:
            self.ending, self.since = Ending.of_signal(number), time.monotonic()


_state: _State | None = None
_masks = threading.local()  # of signals, before a fork


def take_signals() -> None:
    """From now on this process ends by a signal as this module says; what is ignored already (``nohup``) stays so."""
    global _state
    if _state is not None:
        return
    state = _State()
    state.reader, state.writer = os.pipe()
    os.set_blocking(state.writer, False)
    signal.set_wakeup_fd(state.writer, warn_on_full_buffer=False)
    _state = state
    keep_signals()
    threading.Thread(target=_watch, args=(state,), name="endings", daemon=True).start()
    os.register_at_fork(before=_hold, after_in_parent=_let_through, after_in_child=_forget)


def keep_signals() -> None:
    """Take the signals back from a library that took them."""
    if _state is None or threading.current_thread() is not threading.main_thread():
        return
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def ending() -> Ending | None:
    """Why this process ends, if that is decided."""
    return None if _state is None else _state.ending


def decide(error: TinyONNError) -> None:
    """From now on the process has `GRACE` seconds to end with an error that the main thread has in hand."""
    if _state is not None and _state.since is None:
        _state.ending, _state.since = Ending.of_error(error), time.monotonic()


def end(error: TinyONNError) -> None:
    """From another thread: let the main thread end with an error, wherever it is."""
    state = _state
    if state is None or state.since is not None:
        return
    decide(error)
    state.own = True
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def tell(reason: Ending) -> None:
    """Say why, once; a terminal that is gone is no hindrance."""
    if _state is not None:
        if _state.told:
            return
        _state.told = True
    LOG.debug("ends: %s", reason.line)
    with contextlib.suppress(OSError, ValueError):
        screen.complain(reason.line)


def leave() -> None:
    """After the stage: does not return if this process was to end early; nothing that it has started stays."""
    if _state is not None and _state.ending is not None:
        _end(_state.ending)


def finish(code: int) -> NoReturn:
    """After the stage, as `leave`; else end with a code, as Python does, but without taking the interpreter apart.

    Before Python 3.14 a thread that asks for the interpreter meanwhile is made to exit. One of Icechunk's, which may
    still be about the end of its latest call, then aborts the process (SIGABRT): once in some 100 commands.
    """
    leave()
    threading._shutdown()  # type: ignore[attr-defined]  # joins threads, and lets those of pools end
    atexit._run_exitfuncs()
    if not _flush() and code == 0:
        code = FLUSH_FAILED
    os._exit(code)


def _interrupt(number: int, frame: object) -> None:
    assert _state is not None
    _state.decide(number)
    if not _state.raised:
        _state.raised = True
        raise KeyboardInterrupt


def _watch(state: _State) -> None:
    """Read the numbers of signals as they come, and see to it that the process ends."""
    threading.Thread(target=_deadline, args=(state,), name="deadline", daemon=True).start()
    first: float | None = None
    while True:
        for number in os.read(state.reader, 64):
            now = time.monotonic()
            if number not in WORDS:
                continue
            if state.own:
                state.own = False
            elif first is None:
                state.decide(number)
                first = now
            elif now - first > TOGETHER:
                state.again = True


def _deadline(state: _State) -> None:
    while not state.again and (state.since is None or time.monotonic() - state.since < GRACE):
        time.sleep(POLL)
    assert state.ending is not None
    _end(state.ending)


def _end(reason: Ending) -> NoReturn:
    """Now, whatever the other threads do."""
    tell(reason)
    _end_children()
    _flush()
    os._exit(reason.code)


def _flush() -> bool:
    """Write what is still held of the log and of the streams; False if that cannot be."""
    written = True
    for stream in (*logging.getLogger("tinyonn").handlers, sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            written = False
    return written


def _end_children() -> None:
    """Kill every process that descends from this one."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()


def _hold() -> None:
    """Keep signals waiting while a process forks: its child has the pipe by which they are told."""
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, WORDS)


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _forget() -> None:
    """A forked child dies as processes do."""
    global _state
    if _state is not None:
        signal.set_wakeup_fd(-1)
        for number in WORDS:
            if signal.getsignal(number) is _interrupt:
                signal.signal(number, signal.SIG_DFL)
        _state = None
    _let_through()
