"""What `tinyonn tune` shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tinyonn.sheet import Sheet, whole
from tinyonn.sizes import format_seconds


@dataclass(frozen=True)
class TuneReport:
    """What a search found.

    Attributes
    ----------
    best : dict of str to float
        By dotted names of `TrainOptions`.
    loss, first_loss : float
        Of the best trial, and of the options as they were given (NaN if they are out of range or were given up), nats.
    finished, pruned : int
        Trials.
    """

    location: str
    best: dict[str, float]
    loss: float
    first_loss: float | None
    finished: int
    pruned: int
    steps: int
    tune_seconds: float

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> Sheet:
        """For people."""
        given = "" if self.first_loss is None else f", {self.first_loss:.4f} with the options as given"
        notes = [
            f"{self.loss:.4f} nats after {self.steps:,} steps{given}",
            f"{self.finished:,} trials and {self.pruned:,} that were given up, in {format_seconds(self.tune_seconds)}",
        ]
        sheet = Sheet(f"tuned {whole(self.location)}", notes).text("option").number("best")
        for name, value in self.best.items():
            sheet.add(f"train.{name}", f"{value:.3g}")
        return sheet
