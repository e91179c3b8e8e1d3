"""The learning rate's schedule: warm up, stay, decay.

    factor(s) = (s + 1) / warmup                    s < warmup
              = 1                                   s < steps - decay
              = floor + (1 - floor) * shape(p)      p = (s - (steps - decay)) / decay, in [0, 1)

with ``shape(p)`` = ``1 - p`` (linear), ``1 - sqrt(p)`` (root) or, exponential, a geometric fall to the floor. Source:
warmup-stable-decay, Hu et al. 2024, MiniCPM, section 4; the root form: Hägele et al. 2024, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinyonn.errors import InputError

Form = Literal["linear", "root", "exponential"]


@dataclass(frozen=True)
class Schedule:
    """Warmup-stable-decay, a pure function of the step.

    Attributes
    ----------
    steps : int
        Of the whole training.
    warmup, decay : int
        Steps at its beginning and end.
    floor : float
        Factor at the end of the decay, 0..1.
    form : {"linear", "root", "exponential"}
        Of the decay; exponential needs a floor above 0.

    Raises
    ------
    InputError
        Phases that do not fit into the steps, or a floor out of range.
    """

    steps: int
    warmup: int = 0
    decay: int = 0
    floor: float = 0.0
    form: Form = "linear"

    def __post_init__(self) -> None:
        if min(self.steps, self.warmup, self.decay) < 0 or self.warmup + self.decay > self.steps:
            raise InputError(
                f"{self.warmup} steps of warmup and {self.decay} of decay do not fit into {self.steps} steps; "
                "shorten them, or train longer"
            )
        if not 0 <= self.floor <= 1:
            raise InputError(f"the floor of the learning rate is {self.floor}; give a factor from 0 to 1")
        if self.form not in ("linear", "root", "exponential"):
            raise InputError(f"decay form {self.form!r} is unknown; use linear, root or exponential")
        if self.form == "exponential" and self.floor == 0:
            raise InputError("an exponential decay never reaches a floor of 0; give one above it, 0.1 say")

    @classmethod
    def of_shares(
        cls,
        steps: int,
        warmup: float = 0.05,
        decay: float = 0.2,
        floor: float = 0.0,
        form: Form = "linear",
    ) -> Schedule:
        """A schedule whose phases are given as shares of the steps.

        Parameters
        ----------
        steps : int
        warmup, decay : float
            Shares, 0..1, rounded to whole steps.
        floor : float
        form : {"linear", "root", "exponential"}

        Returns
        -------
        Schedule
        """
        first = round(steps * warmup)
        return cls(steps, first, min(round(steps * decay), max(steps - first, 0)), floor, form)

    def factor(self, step: int) -> float:
        """Of the peak learning rate at a step, which counts from 0; above 0 before `steps`, `floor` from there on.

        Raises
        ------
        InputError
            A step below 0.
        """
        if step < 0:
            raise InputError(f"step {step} is before the first, 0")
        if step < self.warmup:
            return (step + 1) / self.warmup
        start = self.steps - self.decay
        if step < start:
            return 1.0
        if step >= self.steps:
            return self.floor if self.decay else 1.0
        passed = (step - start) / self.decay
        if self.form == "exponential":
            return float(self.floor**passed)
        return self.floor + (1 - self.floor) * (1 - (passed if self.form == "linear" else passed**0.5))
