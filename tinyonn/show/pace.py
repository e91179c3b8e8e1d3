"""How fast work goes and how long the rest takes, from what was done by when. Pure: no clock, no output.

Work is counted in units that are proportional to its cost (tokens, weights, planned seconds), and only what was done
since this start counts. With observations ``(t_i, d_i)``, increasing in both, the rate is

    (d_n - d_w) / (t_n - t_w),    t_n - t_w >= max(10 s, (t_n - t_b) / 2)

where b is the end of the first units, which load and compile; one interval that stalls (over ten times the median, and
over three tenths of the window) is left out. Time left is what is undone over the rate, less the time since t_n, but at
most the longest of the last intervals, so that it counts down between units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isinf
from statistics import median

WINDOW = 10.0  # seconds that the rate looks back on at least
STALL = 10.0  # times the median interval
STALL_SHARE = 0.3  # of the window
ROBUST = 8  # intervals from which on a stall can be told from a slow unit
RECENT = 20  # intervals of which the longest is how long the next may take
MOST = 4096  # observations that are kept; then every other one is dropped


def rate_of(observations: Sequence[tuple[float, float]], parallel: int = 1) -> float | None:
    """Work per second.

    Parameters
    ----------
    observations : sequence of (float, float)
        Seconds and work done; the first is the start. Later ones differ in work.
    parallel : int
        Units that are under way at a time: as many end together, first of all those that load and compile.

    Returns
    -------
    float or None
        None before anything is done.
    """
    count = len(observations) - 1
    if count < 1:
        return None
    if count < parallel:  # the others have been under way just as long
        spent = sum(seconds for seconds, _ in observations[1:]) / count - observations[0][0]
        work = (observations[-1][1] - observations[0][1]) / count
        return work * parallel / spent if spent > 0 else None
    last = count - count % parallel  # after as many full rounds
    base = parallel if last > parallel else 0
    end, start = observations[last][0], observations[base][0]
    reach = max(WINDOW, (end - start) / 2)
    first = last
    while first > base and (end - observations[first][0] < reach or last - first < ROBUST * parallel):
        first -= parallel
    return _mean_rate(observations[first : last + 1 : parallel])


def _mean_rate(window: Sequence[tuple[float, float]]) -> float | None:
    """Work over time of a window, without a stall in it."""
    seconds, work = window[-1][0] - window[0][0], window[-1][1] - window[0][1]
    spans = [later[0] - earlier[0] for earlier, later in pairwise(window)]
    if len(spans) >= ROBUST:
        longest = max(range(len(spans)), key=spans.__getitem__)
        if spans[longest] > max(STALL * median(spans), STALL_SHARE * seconds):
            seconds -= spans[longest]
            work -= window[longest + 1][1] - window[longest][1]
    return work / seconds if seconds > 0 and work > 0 else None


@dataclass
class Phase:
    """A part of the work that goes at a speed of its own.

    Attributes
    ----------
    name : str
    total : float
        Work of this start; infinite where it is not known.
    expected : float or None
        Work per second before there are observations.
    parallel : int
    before : float
        Work of earlier starts, which says nothing of the speed.
    observations : list of (float, float)
    """

    name: str
    total: float
    expected: float | None = None
    parallel: int = 1
    before: float = 0.0
    observations: list[tuple[float, float]] = field(default_factory=list)

    @property
    def done(self) -> float:
        """Work so far."""
        return self.observations[-1][1] if self.observations else 0.0

    @property
    def rate(self) -> float | None:
        """Work per second as observed, else as expected."""
        return rate_of(list(self.observations), self.parallel) or self.expected

    def begin(self, seconds: float) -> None:
        """Start now: what came before was loading."""
        self.observations[:] = [(seconds, 0.0)]

    def observe(self, seconds: float, done: float) -> None:
        """Take what is done by now; the first call is the start."""
        if self.observations and done <= self.done:
            return
        self.observations.append((seconds, done))
        if len(self.observations) > MOST:
            del self.observations[self.parallel + 1 : -1 : 2]

    def left(self, seconds: float) -> float | None:
        """Seconds to its end; None if its speed or its end is not known yet."""
        if isinf(self.total):
            return None
        undone = max(0.0, self.total - self.done)
        if undone == 0:
            return 0.0
        rate = self.rate
        if rate is None:
            return None
        if not self.observations:
            return undone / rate
        recent = self.observations[-(self.parallel + RECENT) :]
        usual = max((b[1] - a[1] for a, b in pairwise(recent)), default=undone) / rate
        waited = min(max(0.0, seconds - self.observations[-1][0]), usual)
        return max(0.0, undone / rate - waited)


@dataclass
class Pace:
    """Phases one after another.

    Attributes
    ----------
    phases : list of Phase
    """

    phases: list[Phase]
    _now: int = 0

    @property
    def phase(self) -> Phase:
        """Under way."""
        return self.phases[self._now]

    def enter(self, name: str, seconds: float) -> None:
        """Begin a phase; those before it are done."""
        self._now = next(number for number, phase in enumerate(self.phases) if phase.name == name)
        self.phase.begin(seconds)

    def left(self, seconds: float) -> float | None:
        """Seconds to the end of the last phase; None if a phase's speed is not known yet."""
        parts = [phase.left(seconds) for phase in self.phases[self._now :]]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None
