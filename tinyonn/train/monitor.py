"""What a training shows while it runs: JSON lines, a tracker, alarms, and the load of every expert over time.

``steps.jsonl`` has a line for each step, from 1 on: its values, the samples that chose each expert (``load``), and what
is taken over the last steps (the window): ``load_cv``, the coefficient of variation std / mean of the load over
experts; ``load_dead``, the share of experts that nothing chose; ``load_entropy``, the load's entropy over its largest
possible value. One process writes it, the first of a group.

Alarms follow from the window alone: numbers in, sentences out. With ``n_e`` the samples of the window that chose
expert ``e``, ``S`` its samples and ``k = sum_e n_e / S``:

- *high*: ``n_e / S > 80 %``: nearly every sample has the expert, so it is not chosen any more (only asked where at most
  half of the experts run; at ``k = 1`` this is its share of the load);
- *low*: ``n_e / sum(n) < 0.1 %`` of the load, once the window holds enough choices to tell;
- *collapse*: the ``ceil(k)`` experts that are chosen most hold over 95 % of the load: all samples are routed alike;
- *spike*: a value above the median of its window by 20 % and by 8 deviations (1.4826 times the median deviation);
- *not finite*: any value is NaN or infinite.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from tinyonn.files import line_of, read_log, sync, write_whole

FILE = "steps.jsonl"
FORMER = (
    "monitor.jsonl",
    "curve.jsonl",
)  # of earlier versions: the same lines; their values alone, steps from 0
HEAT_MAP = "load.png"
SPIKES = ("loss", "gradient_norm")  # values whose jumps are alarms
PNG_DPI = 110
COLUMNS = 400  # of a heat map, at most
BRIGHTEST = 4.0  # times the mean load


class Scalars(Protocol):
    """Where scalars go; a `tinyonn.show.track.Tracker`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send scalars by name."""


@dataclass(frozen=True)
class StepFacts:
    """One step, all workers together.

    Attributes
    ----------
    step : int
        Steps done with this one: from 1.
    values : mapping
        Loss and its parts, learning rate, gradient norm, gate entropy, active weights per token, surprise, ...
    load_E : int64 [E] or None
        Samples that chose each expert; None without a router, or while all experts are on.
    samples, tokens : int
        Of the step.
    seconds : float
        That it took.
    """

    step: int
    values: Mapping[str, float]
    load_E: Int64 | None
    samples: int
    tokens: int
    seconds: float


def load_cv(load_E: Int64) -> float:
    """Standard deviation of the load over experts, divided by its mean; 0 without any."""
    mean = load_E.mean()
    return float(load_E.std() / mean) if mean > 0 else 0.0


def load_dead(load_E: Int64) -> float:
    """Share of experts that nothing chose."""
    return float((load_E == 0).mean())


def load_entropy(load_E: Int64) -> float:
    """Entropy of the load divided by ``log E``: 1 if it is even, 0 if one expert has all of it."""
    share_E = load_E[load_E > 0] / max(1, load_E.sum())
    return float(-(share_E * np.log(share_E)).sum() / math.log(load_E.size)) if load_E.size > 1 else 1.0


class Monitor:
    """Takes the facts of every step.

    Parameters
    ----------
    folder : Path
        Of the training; made if it is not there.
    tracker : Tracker, optional
        Gets every value too.
    window : int
        Steps that averages and alarms look back on; alarms about the load wait for half of them.
    tell : callable
        Gets the alarms as sentences.
    shared : sequence of int
        Experts that are always on: not chosen, and left out of what is said about the load.
    resumed : int
        Steps done before; lines of later ones are taken out, and the window is filled from those that stay.
    """

    def __init__(
        self,
        folder: Path,
        tracker: Scalars | None = None,
        window: int = 50,
        tell: Callable[[str], None] = lambda line: None,
        shared: Sequence[int] = (),
        resumed: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = steps_file(folder)
        self._tracker, self._tell, self._shared, self._window = tracker, tell, tuple(shared), window
        self._loads: deque[tuple[Int64, int]] = deque(maxlen=window)
        self._values: dict[str, deque[float]] = {name: deque(maxlen=window) for name in SPIKES}
        self._times: deque[tuple[int, float]] = deque(maxlen=window)
        self._stage: float | None = None
        self._watch = Watch(window)
        self.line: dict[str, Any] = {}  # the last that was written
        cut_lines(self.path, resumed)
        for line in read_lines(self.path):
            self._remember(_facts(line))

    def record(self, facts: StepFacts) -> list[Alarm]:
        """Write a step down, send it on; the alarms that are new with it."""
        self._enter(facts.values.get("stage"))
        alarms = self._alarms_of(facts)
        self._remember(facts)
        load_E, samples = self.window_load()
        over_window: dict[str, float] = {"tokens_per_second": self._speed()}
        if load_E is not None:
            free = np.setdiff1d(np.arange(load_E.size), self._shared)
            load_F = load_E[free]
            over_window |= {
                "load_cv": load_cv(load_F),
                "load_dead": load_dead(load_F),
                "load_entropy": load_entropy(load_F),
            }
            if 2 * len(self._loads) >= self._window:  # a few batches alone may look like anything
                alarms += load_alarms(load_F, samples, free)
        new = self._watch.fresh(facts.step, alarms, ("spike", "not finite", "high", "low", "collapse"))
        values = {**facts.values, **over_window}
        self.line = line = {
            "step": facts.step,
            "samples": facts.samples,
            "tokens": facts.tokens,
            "seconds": round(facts.seconds, 6),
            "values": {name: value if math.isfinite(value) else None for name, value in values.items()},
        }
        if facts.load_E is not None:
            line["load"] = [int(count) for count in facts.load_E]
        if new:
            line["alarms"] = [alarm.message for alarm in new]
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line_of(line))
        if self._tracker is not None:
            self._tracker.log(
                facts.step, {name: value for name, value in values.items() if math.isfinite(value)}
            )
        for alarm in new:
            self._tell(f"step {facts.step}: {alarm.message}")
        return new

    def window_load(self) -> tuple[Int64 | None, int]:
        """Load of every expert and number of samples over the window."""
        if not self._loads:
            return None, 0
        return np.sum([load for load, _ in self._loads], axis=0), sum(count for _, count in self._loads)

    def mean(self, name: str) -> float:
        """Mean of one of `SPIKES` over the window; NaN before the first step."""
        values = self._values[name]
        return float(np.mean(values)) if values else math.nan

    def sync(self) -> None:
        """Bring the lines to the disk, before a checkpoint that counts on them."""
        if self.path.exists():
            sync(self.path)

    def close(self) -> Path | None:
        """Draw the heat map, if matplotlib is there and experts were chosen; its path."""
        return plot_load(self.path, self.path.with_name(HEAT_MAP))

    def _enter(self, stage: float | None) -> None:
        """Losses of another stage are made of other parts, its steps of other work: they say nothing of this one's."""
        if stage != self._stage:
            for values in self._values.values():
                values.clear()
            self._times.clear()
            self._stage = stage

    def _alarms_of(self, facts: StepFacts) -> list[Alarm]:
        spikes = [
            spike_alarm(name, facts.values[name], self._values[name])
            for name in SPIKES
            if name in facts.values
        ]
        return [alarm for alarm in (finite_alarm(facts.values), *spikes) if alarm is not None]

    def _remember(self, facts: StepFacts) -> None:
        self._enter(facts.values.get("stage"))
        for name, values in self._values.items():
            if name in facts.values:
                values.append(facts.values[name])
        self._times.append((facts.tokens, facts.seconds))
        if facts.load_E is not None:
            self._loads.append((facts.load_E, facts.samples))

    def _speed(self) -> float:
        tokens, seconds = (sum(column) for column in zip(*self._times, strict=True))
        return tokens / seconds if seconds > 0 else 0.0


def steps_file(folder: Path) -> Path:
    """Where a training's lines are; those of an earlier version take that name first."""
    path, lines = folder / FILE, folder / FORMER[0]
    if lines.is_file() and not path.exists():
        lines.rename(path)
    return path


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a training's steps; damaged ones are left out with a warning, one that a kill cut off without."""
    return read_log(path)


def cut_lines(path: Path, done: int) -> None:
    """Leave the lines of the first `done` steps; one that a kill left unfinished goes too."""
    if not path.is_file():
        return
    kept = [line for line in read_lines(path) if line["step"] <= done]
    write_whole(path, "".join(map(line_of, kept)))


def load_over_time(path: Path, columns: int = COLUMNS) -> tuple[np.ndarray[Any, Any], int, int]:
    """The load of every expert in stretches of steps of like length."""
    loads = [(line["step"], line["load"]) for line in read_lines(path) if "load" in line]
    if not loads:
        return np.zeros((0, 0)), 0, 0
    load_SE = np.array([load for _, load in loads], dtype=np.float64)
    edges = np.linspace(0, len(loads), min(columns, len(loads)) + 1).astype(int)[:-1]
    load_CE = np.add.reduceat(load_SE, edges, axis=0)
    mean_C1 = load_CE.mean(axis=1, keepdims=True)
    return (load_CE / np.where(mean_C1 > 0, mean_C1, 1)).T, loads[0][0], loads[-1][0]


def plot_load(source: Path, picture: Path) -> Path | None:
    """Draw the load of every expert over time; None without matplotlib or without loads."""
    load_EC, first, last = load_over_time(source)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if load_EC.size == 0:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    extent = (first - 0.5, last + 0.5, load_EC.shape[0] - 0.5, -0.5)
    image = axes.imshow(
        load_EC, aspect="auto", interpolation="nearest", vmin=0, vmax=BRIGHTEST, cmap="viridis", extent=extent
    )
    axes.set(xlabel="step", ylabel="expert", title="load of every expert, as a multiple of the mean")
    figure.colorbar(image, ax=axes)
    side = picture.with_suffix(".part.png")
    figure.savefig(side, dpi=PNG_DPI)
    side.replace(picture)
    return picture


def _facts(line: Mapping[str, Any]) -> StepFacts:
    load = np.array(line["load"], dtype=np.int64) if "load" in line else None
    values = {name: math.nan if value is None else value for name, value in line["values"].items()}
    return StepFacts(line["step"], values, load, line["samples"], line["tokens"], line["seconds"])


Int64 = np.ndarray[Any, np.dtype[np.int64]]
Kind = Literal["high", "low", "collapse", "spike", "not finite"]

HIGH_SHARE = 0.8  # of the samples
LOW_SHARE = 0.001  # of the load
COLLAPSE_SHARE = 0.95  # of the load
SPIKE_SHARE, SPIKE_DEVIATIONS = 0.2, 8.0
SPIKE_HISTORY = 10  # values before a spike can be told
NAMED = 12  # experts that a sentence lists
REMEDY = "raise the rate of the selection bias, or the weight of the balance loss if the router has a learning rate"


@dataclass(frozen=True)
class Alarm:
    """Something that a person should know.

    Attributes
    ----------
    kind : str
    message : str
        A sentence with the value, the limit and the remedy.
    subjects : tuple of int or str
        The experts or values concerned.
    """

    kind: Kind
    message: str
    subjects: tuple[int, ...] | tuple[str, ...]


def load_alarms(load_E: Int64, samples: int, numbers_E: Int64 | None = None) -> list[Alarm]:
    """What is wrong with the load of a window."""
    total, experts = int(load_E.sum()), load_E.size
    if total == 0 or samples == 0:
        return []
    found = []
    numbers_E = np.arange(experts) if numbers_E is None else numbers_E
    chosen = total / samples  # experts of a sample
    if chosen <= experts / 2:
        most = math.ceil(chosen)
        order = np.argsort(-load_E, kind="stable")
        share = float(load_E[order[:most]].sum() / total)
        high_E = load_E > HIGH_SHARE * samples
        high = numbers_E[high_E]
        if share > COLLAPSE_SHARE and experts > most:
            found.append(_collapse(np.sort(numbers_E[order[:most]]), share))
        elif high.size:
            top = float(load_E[high_E].max() / samples)
            text = (
                f"{_experts(high)} on for {'up to ' if high.size > 1 else ''}{top:.0%} of the samples, over "
                f"{HIGH_SHARE:.0%}; right where all kinds of text need it, else {REMEDY}"
            )
            found.append(Alarm("high", text, tuple(int(e) for e in high)))
    low = numbers_E[load_E < LOW_SHARE * total]
    if low.size and total * LOW_SHARE >= 1:
        verb = "holds" if low.size == 1 else "hold"
        text = f"{_experts(low, '')} {verb} less than {LOW_SHARE:.1%} of the load; {REMEDY}"
        found.append(Alarm("low", text, tuple(int(e) for e in low)))
    return found


def _collapse(experts: Int64, share: float) -> Alarm:
    one = experts.size == 1
    who = f"expert {experts[0]} holds" if one else f"the same {experts.size} experts ({_list(experts)}) hold"
    text = f"routing has collapsed: {who} {share:.1%} of the load; {REMEDY}"
    return Alarm("collapse", text, tuple(int(e) for e in experts))


def spike_alarm(name: str, value: float, history: Sequence[float]) -> Alarm | None:
    """Whether a value stands far above those of the window before it."""
    before = np.array([v for v in history if math.isfinite(v)])
    if before.size < SPIKE_HISTORY or not math.isfinite(value):
        return None
    middle = float(np.median(before))
    deviation = 1.4826 * float(np.median(np.abs(before - middle)))
    if value <= middle + max(SPIKE_SHARE * abs(middle), SPIKE_DEVIATIONS * deviation):
        return None
    text = (
        f"{name} jumped to {value:.4g}, its median was {middle:.4g}; if that repeats, lower the learning rate"
    )
    return Alarm("spike", text, (name,))


def finite_alarm(values: Mapping[str, float]) -> Alarm | None:
    """Which values are NaN or infinite."""
    bad = sorted(name for name, value in values.items() if not math.isfinite(value))
    if not bad:
        return None
    text = ", ".join(f"{name} is {values[name]}" for name in bad)
    return Alarm(
        "not finite", f"{text}; lower the learning rate and go on from the last checkpoint", tuple(bad)
    )


@dataclass
class Watch:
    """Tells each alarm once, and again when it comes back or spreads.

    Attributes
    ----------
    repeat : int
        Steps before an alarm that spreads to other experts is told again.
    """

    repeat: int = 50
    _told: dict[str, tuple[int, frozenset[int | str]]] = field(default_factory=dict)

    def fresh(self, step: int, alarms: Sequence[Alarm], asked: Sequence[Kind]) -> list[Alarm]:
        """Those that are to be told."""
        new = []
        for alarm in alarms:
            since, subjects = self._told.get(alarm.kind, (None, frozenset[int | str]()))
            unknown = not subjects.issuperset(alarm.subjects)
            if since is None or (unknown and step - since >= self.repeat):
                new.append(alarm)
                self._told[alarm.kind] = (step, subjects | frozenset(alarm.subjects))
        for kind in set(asked) - {alarm.kind for alarm in alarms}:
            self._told.pop(kind, None)
        return new


def _experts(numbers: Int64, verb: str = "is") -> str:
    if numbers.size == 1:
        return f"expert {numbers[0]} {verb}".strip()
    return f"{numbers.size} experts ({_list(numbers)}) {'are' if verb else ''}".strip()


def _list(numbers: Int64) -> str:
    text = ", ".join(str(number) for number in numbers[:NAMED])
    return text + (", ..." if numbers.size > NAMED else "")
