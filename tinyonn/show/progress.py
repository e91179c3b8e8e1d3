"""Progress of long work on stderr: one live line on a terminal, a plain line now and then elsewhere.

Whoever works opens a `Bar` and says what is done; nothing is shown but inside `shown_progress`, where the command line
runs a stage, so that the same code is silent in workers and in programs that use Tiny-ONN.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from tinyonn.show import screen
from tinyonn.show.escape import visible
from tinyonn.show.pace import Pace, Phase
from tinyonn.show.sheet import cells, wrap
from tinyonn.show.sizes import format_count, format_seconds, format_size

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.text import Text

LOG = logging.getLogger(__name__)
LINE_SECONDS = 15.0  # before the first plain line and between two of them, at least
LINE_SHARE = 0.1  # of the time that has passed, between two plain lines: few over many hours
QUIET_SECONDS = 3.0  # work that ends sooner has no plain line
REFRESHES = 4  # a second, of the live line
MANY = 1_000_000  # from which on counts are told as shares
NARROW = 10  # cells of a bar below which there is none
PARTS = "━╸╺"  # of a bar: done, its end, undone from its middle

T = TypeVar("T")

_lock = threading.RLock()  # of what bars hold
_bars: list[Bar] = []  # open ones; the last is shown
_live: Live | None = None
_shown = False


@contextmanager
def shown_progress() -> Iterator[None]:
    """Show the bars of this process meanwhile."""
    global _shown
    before, _shown = _shown, True
    try:
        yield
    finally:
        _shown = before
        for bar in _bars[:]:
            bar.close()


class Bar:
    """A line about work under way, as a context manager.

    Parameters
    ----------
    what : str
        Such as ``recording``.
    phases : float or sequence of Phase
        Work in all, in units that cost alike; or the phases that it goes through, each at its own speed. 0 where the
        work cannot be told.
    unit : str
        What is counted for people: ``samples``; ``B`` counts bytes.
    count : int, optional
        How many of them there are in all, where that is not the work itself.
    before : float
        How many of them earlier starts have done.
    shown : bool, optional
        By default inside `shown_progress`.
    clock : callable
        Seconds.
    """

    def __init__(
        self,
        what: str,
        phases: float | Sequence[Phase] = 0.0,
        unit: str = "",
        count: int | None = None,
        before: float = 0.0,
        shown: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        whole = [Phase("", float(phases))] if isinstance(phases, int | float) else list(phases)
        self.what, self.unit, self.note = visible(what), unit, ""
        self.pace = Pace(whole)
        self._clock, self._started = clock, clock()
        self._before = self._counted = float(before)
        self._count = count
        self._shown = _shown if shown is None else shown
        self._lined = self._started - LINE_SECONDS + QUIET_SECONDS
        self._open = False
        self.pace.phase.observe(self._started, 0.0)

    def __enter__(self) -> Bar:
        self._open = True
        if self._shown:
            _bars.append(self)
            _refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the line away."""
        if not self._open:
            return
        self._open = False
        LOG.debug("%s ended after %.1f s", self.line(), self._clock() - self._started)
        if self._shown:
            _bars.remove(self)
            _refresh()

    def begin(self, ago: float = 0.0) -> None:
        """The work begins now, or began so many seconds ago: what came before was loading."""
        with _lock:
            self.pace.phase.begin(self._clock() - ago)

    def enter(self, phase: str, ago: float = 0.0) -> None:
        """A phase begins now, or began so many seconds ago."""
        with _lock:
            self.pace.enter(phase, self._clock() - ago)
            self._counted, self.note = 0.0, ""

    def add(self, work: float = 1.0, counted: float | None = None) -> None:
        """So much more is done, and for people so many more."""
        with _lock:
            self.update(self.pace.phase.done + work, self._counted + (work if counted is None else counted))

    def skip(self, work: float, counted: float = 1.0) -> None:
        """So much turned out to have been done by an earlier start."""
        with _lock:
            self.pace.phase.total -= work
            self._before += counted
            self._counted += counted

    def update(self, done: float, counted: float | None = None, note: str | None = None) -> None:
        """Say where the work stands.

        Parameters
        ----------
        done : float
            Work of this start, in this phase.
        counted : float, optional
            For people, those of earlier starts included; by default the work itself.
        note : str, optional
            A word more, shown where there is room.
        """
        with _lock:
            self.pace.phase.observe(self._clock(), done)
            self._counted = done if counted is None else counted
            if note is not None:
                self.note = visible(note)
        self._tell()

    def _tell(self) -> None:
        """A plain line, if it is time for one."""
        now = self._clock()
        if now - self._lined < max(LINE_SECONDS, LINE_SHARE * (now - self._started)):
            return
        self._lined = now
        live = _live is not None or not self._shown
        LOG.log(logging.DEBUG if live else logging.INFO, "%s", self.line())

    def line(self) -> str:
        """All of it, as a plain line."""
        facts = [self._amount(), self._speed(), self._left(), self.note]
        return f"{self._name}: {', '.join(fact for fact in facts if fact)}"

    @property
    def _name(self) -> str:
        name = visible(self.pace.phase.name)
        return f"{self.what}: {name}" if name else self.what

    @property
    def _total(self) -> float:
        """What is counted up to, in this phase."""
        phase = self.pace.phase
        return phase.total + phase.before if self._count is None else self._count

    def _amount(self) -> str:
        total, counted = self._total, self._counted + self.pace.phase.before
        if not isfinite(total) or not total:
            return f"{counted:,.0f} {self.unit}".rstrip() if counted else ""
        if self.unit == "B":
            return f"{format_size(counted)} of {format_size(total)}"
        if total >= MANY:
            return f"{counted / total:.0%}" + (f" of {format_count(total)} {self.unit}" if self.unit else "")
        return f"{counted:,.0f}/{total:,.0f} {self.unit}".rstrip()

    def _speed(self) -> str:
        """What is counted, by the second: the work's rate times what a unit of it was worth."""
        phase = self.pace.phase
        rate = phase.rate
        if rate is None or not self.unit or phase.done <= 0:
            return ""
        if self._count is not None:
            rate *= (self._counted - self._before) / phase.done
        if self.unit == "B":
            return f"{format_size(rate)}/s"
        if rate >= MANY:
            return f"{rate / MANY:,.1f} M {self.unit}/s"
        if rate >= 1:
            return f"{rate:,.{0 if rate >= 100 else 1}f} {self.unit}/s"
        return f"{format_seconds(1 / rate)} each" if rate > 0 else ""

    def _left(self) -> str:
        """To the end; to that of the phase while the speed of a later one is not known."""
        now, phase = self._clock(), self.pace.phase
        left = self.pace.left(now) if any(one.total for one in self.pace.phases) else None
        if left is not None:
            return f"{_rounded(left)} left"
        left = phase.left(now) if phase.total else None
        if left is not None:
            return f"{_rounded(left)} left of {phase.name}"
        return f"{_rounded(now - self._started)} so far"

    @property
    def share(self) -> float | None:
        """Of the whole, by what is counted or by time; None where it is not known."""
        now = self._clock()
        if len(self.pace.phases) > 1:
            left, spent = self.pace.left(now), now - self._started
            return None if left is None else spent / max(spent + left, 1e-9)
        done = self._counted + self.pace.phase.before
        return min(1.0, done / self._total) if self._total else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        width = options.max_width - 1
        amount, left = self._amount(), self._left()
        share = self.share
        told = [self._name]
        for fact in (left, amount, self._speed(), self.note):  # as many as there is room for
            if fact and sum(map(cells, told)) + 2 * len(told) + cells(fact) <= width:
                told.append(fact)
        if amount in told[2:]:
            told[1:3] = amount, left
        text = Text(told[0], no_wrap=True, overflow="ignore")
        room = min(40, width - sum(map(cells, told)) - 2 * len(told))
        if share is not None and room >= NARROW:
            text.append("  ").append_text(_drawn(share, room))
        for fact in told[1:]:
            text.append(f"  {fact}")
        yield text


def _rounded(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 59.5 else format_seconds(seconds)


def _drawn(share: float, width: int) -> Text:
    from rich.text import Text

    done = int(share * width)
    bar = Text(PARTS[0] * done, style="green")
    if done < width:
        bar.append(PARTS[2] + PARTS[0] * (width - done - 1), style="bright_black")
    return bar


def counted(items: Iterable[T], what: str, total: float, unit: str) -> Iterator[T]:
    """Go through items under a bar that counts them; their number may be 0, which is not known."""
    step = max(1, int(total) // 1000)
    with Bar(what, total, unit) as bar:
        for number, item in enumerate(items, 1):
            yield item
            if number % step == 0:
                bar.update(number)


class _Shown:
    """What the live line shows: the bar that was opened last."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _bars[-1:]


def _refresh() -> None:
    """Start or stop the live line as bars open and close; never with the lock, which its thread may wait for."""
    global _live
    if _bars and _live is None and screen.watched(screen.stderr()):
        from rich.console import Console
        from rich.live import Live

        console = Console(file=screen.stderr(), soft_wrap=True, highlight=False, markup=False, emoji=False)
        _live = Live(
            _Shown(),
            console=console,
            refresh_per_second=REFRESHES,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        _live.start()
    elif not _bars and _live is not None:
        live, _live = _live, None
        live.stop()


@contextmanager
def _suspended() -> Iterator[None]:
    """Without the live line meanwhile."""
    live = _live
    if live is None:
        yield
        return
    live.stop()
    try:
        yield
    finally:
        live.start()


screen.suspended = _suspended


def hub_bar(bar: Bar) -> type:
    """A class in place of the hub's own bars, which counts bytes on ours."""
    from tqdm.auto import tqdm

    class HubBar(tqdm):
        """Of one download; those of files are of no use beside those of bytes."""

        def display(self, *_: object, **__: object) -> None:
            """Show nothing of its own."""

        def update(self, n: float | None = 1) -> bool | None:
            """Take what has come."""
            shown = super().update(n)
            if self.unit == "B":
                bar.pace.phase.total = max(float(self.total or 0), bar.pace.phase.total)
                bar.update(max(float(self.n), bar.pace.phase.done))
            return bool(shown)

    return HubBar


def print_line(text: str) -> None:
    """A line on stderr, above the live one if there is one."""
    live = _live
    if live is None:
        screen.complain(text)
    else:
        live.console.print("\n".join(wrap(visible(text), live.console.width)), crop=False)
