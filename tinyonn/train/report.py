"""What `tinyonn train` shows: a line while it runs, a table and JSON values at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinyonn.sheet import Sheet, whole
from tinyonn.sizes import format_count, format_seconds, format_size

ENDS = 20  # steps at the beginning and at the end that losses are averaged over
PARTS = ("kl", "ce", "hidden", "balance", "z", "profile")


@dataclass(frozen=True)
class TrainReport:
    """What a call of `train_run` did.

    Attributes
    ----------
    location, folder, model : str
        Of the run, of its training, of the trained model.
    steps, resumed : int
        Steps in all, and those that were done before this call.
    workers : int
    device : str
    losses : dict of str to [float, float]
        Loss and its parts, means over the first and the last steps, nats.
    loads : dict of str to float
        Of the last step's window: ``load_cv``, ``load_dead``, ``load_entropy``; empty without a router.
    active_weights : float or None
        Mean expert weights per token, core included.
    tokens : int
        Trained on, padding not counted.
    tokens_per_second : float
    need_bytes, peak_worker_bytes : int
        Memory as planned and as used, of a worker.
    planned_rss_bytes, planned_disk_bytes : int
        Of all workers on a machine together, and on the disk.
    alarms : list of str
    pictures : list of str
    fresh : bool
        False if there was nothing to do.
    restarts : int
        Times that this call's group was started again after a loss.
    """

    location: str
    folder: str
    model: str
    steps: int
    resumed: int
    workers: int
    device: str
    losses: dict[str, list[float]]
    loads: dict[str, float]
    active_weights: float | None
    tokens: int
    tokens_per_second: float
    need_bytes: int
    peak_worker_bytes: int
    alarms: list[str]
    pictures: list[str]
    train_seconds: float
    fresh: bool
    restarts: int = 0
    planned_rss_bytes: int = 0
    planned_disk_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> Sheet:
        """For people."""
        speed = f"{self.tokens_per_second:,.0f} tokens/s with {self.workers} worker(s) on {self.device}"
        lines = [
            f"{self.steps:,} steps, {self.tokens:,} tokens, {speed}",
            f"memory of a worker {format_size(self.peak_worker_bytes)}, planned {format_size(self.need_bytes)}",
        ]
        if self.active_weights is not None:
            lines.append(f"{format_count(self.active_weights)} expert weights active per token")
        if self.loads:
            lines.append(
                f"load of experts: variation {self.loads['load_cv']:.2f}, {self.loads['load_dead']:.0%} dead"
            )
        if not self.fresh:
            lines.append("nothing to do: trained already")
        elif self.resumed:
            lines.append(
                f"went on from step {self.resumed:,}; this call took {format_seconds(self.train_seconds)}"
            )
        else:
            lines.append(f"trained in {format_seconds(self.train_seconds)}")
        if self.restarts:
            lines.append(f"workers were lost {self.restarts} time(s)")
        lines += [f"alarm: {alarm}" for alarm in self.alarms[-3:]]
        sheet = Sheet(f"trained {whole(self.model)}", lines).text("loss").number("first steps", "last steps")
        for name, (first, last) in self.losses.items():
            sheet.add(name, f"{first:.4f}", f"{last:.4f}")
        return sheet


def step_facts(line: Mapping[str, Any]) -> str:
    """Losses and speed of a step of the monitor, for people.

    Parameters
    ----------
    line : mapping
        Of ``monitor.jsonl``.
    """
    values = line["values"]
    shown = [f"{name} {values[name]:.3f}" for name in ("loss", "kl", "ce") if values.get(name) is not None]
    if values.get("active_experts") is not None:
        shown.append(f"{values['active_experts']:.0f} experts on")
    if values.get("tokens_per_second"):
        shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(shown)


def ends(lines: Sequence[Mapping[str, Any]], count: int = ENDS) -> dict[str, list[float]]:
    """Loss and parts, means over the first and the last lines that have them; the warm start left out."""
    main = [line["values"] for line in lines if line["values"].get("stage", 1)]
    found = {}
    for name in ("loss", *PARTS):
        known = [values[name] for values in main if values.get(name) is not None]
        if known:
            few = max(1, min(count, len(known) // 4))
            found[name] = [math.fsum(part) / few for part in (known[:few], known[-few:])]
    return found
