"""Alarms in words, from what a training showed over its last steps. Pure: numbers in, sentences out.

With ``n_e`` the samples of the window that chose expert ``e``, ``S`` its samples and ``k = sum_e n_e / S``:

- *high*: ``n_e / S > 80 %``: nearly every sample has the expert, so it is not chosen any more (only asked where at most
  half of the experts run; at ``k = 1`` this is its share of the load);
- *low*: ``n_e / sum(n) < 0.1 %`` of the load, once the window holds enough choices to tell;
- *collapse*: the ``ceil(k)`` experts that are chosen most hold over 95 % of the load: all samples are routed alike;
- *spike*: a value above the median of its window by 20 % and by 8 deviations (1.4826 times the median deviation);
- *not finite*: any value is NaN or infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

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
    """What is wrong with the load of a window.

    Parameters
    ----------
    load_E : int64 [E]
        Samples that chose each expert; the caller leaves out experts that are always on.
    samples : int
        Of the window.
    numbers_E : int64 [E], optional
        What the experts are called; 0, 1, ... by default.

    Returns
    -------
    list of Alarm
        ``collapse`` stands in place of ``high``.
    """
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
        """Those that are to be told.

        Parameters
        ----------
        step : int
        alarms : sequence of Alarm
            All that hold now.
        asked : sequence of str
            Kinds that were looked for: those without an alarm are over.
        """
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
