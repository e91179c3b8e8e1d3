"""What each part of a record is worth to the cut: the loss where it is dealt anew among the weights of a tensor.

    python benchmarks/bits.py storage/RUN --config FILE [--budgets 0.5 0.315 0.1] [--samples 56] [--json]

The run is scored. The default selection is made from the run's rows as they are, and from rows in which one field's
codes are shuffled within every band: its distribution stays, what it says of a weight goes. A field that changes
nothing earns nothing here; ``score`` is read by no selection, and neither is ``freq`` by the default one. All but the
weights' own values is gone where ``act`` and ``grad`` are both shuffled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cells import held_out
from benchmarks.report import Goal, at_least, finish
from tinyonn.config import load_config
from tinyonn.dense.parameters import Parameter
from tinyonn.evaluate.baselines import masks_of
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.intervals import interval_of, resampled
from tinyonn.evaluate.loss import Losses, batches_of, losses
from tinyonn.run import open_run
from tinyonn.score.scores import name_of
from tinyonn.score.source import Band, RunSource
from tinyonn.select.select import select
from tinyonn.select.selection import select_options
from tinyonn.store.records import SHIFTS, dither_seed

SHUFFLED = {
    "as recorded": (),
    "act shuffled": ("act",),
    "grad shuffled": ("grad",),
    "freq shuffled": ("freq",),
    "score shuffled": ("score",),
    "act and grad shuffled": ("act", "grad"),
}


@dataclass(frozen=True)
class ShuffledSource:
    """A run's source with some fields of the records dealt anew."""

    source: RunSource
    fields: tuple[str, ...]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """As of the source."""
        return self.source.parameters

    @property
    def cells(self) -> int:
        """As of the source."""
        return self.source.cells

    @property
    def slices(self) -> int:
        """As of the source."""
        return self.source.slices

    @property
    def transposed(self) -> Collection[str]:
        """As of the source."""
        return self.source.transposed

    @property
    def identity(self) -> str:
        """Another for other fields."""
        return self.source.identity + "".join(self.fields)

    def attributes(self, name: str) -> Mapping[str, Any]:
        """As of the source."""
        return self.source.attributes(name)

    def band(self, name: str, first: int, last: int, needs: Collection[str]) -> Band:
        """With the fields' codes shuffled, the same way at every call."""
        band = self.source.band(name, first, last, needs)
        if band.records is None:
            return band
        records = band.records.copy()
        for field in self.fields:
            generator = np.random.default_rng(dither_seed(first, field, name))
            codes = (records >> SHIFTS[field]) & 15
            dealt = generator.permutation(codes.reshape(-1)).reshape(codes.shape)
            records = records & np.uint16(0xFFFF ^ (15 << SHIFTS[field])) | dealt << np.uint16(SHIFTS[field])
        return replace(band, records=records)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.315, 0.1])
    parser.add_argument("--split", default="development")
    parser.add_argument("--samples", type=int, default=56, help="about so many of the split")
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    config = load_config(wanted.config)
    dense = DenseWeights(config.model)
    source = RunSource(open_run(str(wanted.run)), dense.rows, dense.transposed, labels=False)
    batches = batches_of(held_out(wanted.run, config, wanted.split, wanted.samples))
    with torch.no_grad():
        whole = losses(dense.model, batches)
    rows = [["dense, as recorded", *[f"{whole.mean:.4f}"] * len(wanted.budgets)]]
    found: dict[str, list[Losses]] = {}
    for name, fields in SHUFFLED.items():
        shuffled, cells = ShuffledSource(source, fields), []
        for number, budget in enumerate(wanted.budgets):
            asked = replace(select_options(config.experts, name_of(source.scored_by)), budget=budget)
            with torch.no_grad(), dense.masked(masks_of(select(shuffled, asked), shuffled)) as model:
                found.setdefault(name, []).append(losses(model, batches))
            own, plain = found[name][number], found["as recorded"][number]
            draws = resampled([plain, own])
            off = None if draws is None or own is plain else interval_of(draws[1] - draws[0])
            behind = "" if off is None else f" {own.mean - plain.mean:+.4f} [{off.low:+.4f}, {off.high:+.4f}]"
            cells.append(f"{own.mean:.4f}{behind}")
        rows.append([name, *cells])
        print(*rows[-1], sep="   ", flush=True)
    goals: list[Goal] = [
        at_least(f"{name} at {budget:.1%}, nats", of[number].mean - found["as recorded"][number].mean, 0.0)
        for name, of in found.items()
        if name in ("act shuffled", "grad shuffled")
        for number, budget in enumerate(wanted.budgets)
    ]
    figures = {
        name: dict(zip(map(str, wanted.budgets), [one.mean for one in of], strict=True))
        for name, of in found.items()
    }
    columns = ("records", *(f"{budget:.1%} kept" for budget in wanted.budgets))
    finish("bits", columns, rows, goals, wanted.json, {"dense": whole.mean, **figures})


if __name__ == "__main__":
    main()
