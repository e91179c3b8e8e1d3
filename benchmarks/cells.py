"""What the cells are worth as experts: each kind of text with the few that it needs most, before any training.

    python benchmarks/cells.py storage/RUN --config FILE [--on 10 25 50] [--samples 56] [--json]

The run is scored; it is clustered here if it is not. Its kept weights are put into experts three times: by the cells;
by the same cells dealt anew among the kept weights of each tensor, so that experts have the same sizes in every tensor
and nothing in common (``shuffled``); and not at all: one static mask of as many weights, on the mean over the slices,
for all kinds of text, cut as an assembly of that budget (``static``). Held-out documents of each slice are then
measured with the core and the experts that the slice needs most, by the labels' own summary; of shuffled ones it needs
all alike, so they are drawn. What this shows is the choice of weights alone: nothing is trained, the slice is known.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Goal, at_least, finish
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import Config, load_config
from tinyonn.corpus.file import Sample
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.intervals import interval_of, resampled
from tinyonn.evaluate.loss import Batch, Losses, batches_of, losses
from tinyonn.evaluate.stage import evaluate_options, held_out_corpus, samples_of
from tinyonn.experts.assemble import needs_by_slice
from tinyonn.run import open_run
from tinyonn.score.scores import name_of
from tinyonn.score.source import RunSource
from tinyonn.select.select import groups_of, select
from tinyonn.select.selection import Selection, select_options

Groups = Mapping[str, np.ndarray]  # by tensor the expert of every weight, 255 dropped


def held_out(run: Path, config: Config, split: str, count: int) -> list[Sample]:
    """About so many documents of a split."""
    few = config.evaluate.model_copy(update={"samples": count})
    config = config.model_copy(update={"evaluate": few})
    return samples_of(held_out_corpus(config, evaluate_options(str(run), config, split=split), run), split)


@dataclass(frozen=True)
class World:
    """A run, its model and its held-out documents by slice."""

    config: Config
    dense: DenseWeights
    source: RunSource
    batches: Mapping[str, list[Batch]]

    @classmethod
    def of(cls, run: Path, config: Config, split: str, count: int) -> World:
        """Everything, opened and clustered."""
        cluster_run(str(run), config)
        dense = DenseWeights(config.model)
        source = RunSource(open_run(str(run)), dense.rows, dense.transposed)
        samples = held_out(run, config, split, count)
        known = set(source.clustered["slices"])
        names = sorted({sample.slice for sample in samples} & known)
        if not names:
            raise SystemExit(f"no held-out slice was recorded; there are {', '.join(sorted(known))}")
        return cls(
            config, dense, source, {n: batches_of([s for s in samples if s.slice == n]) for n in names}
        )

    def measured(self, slice: str, masks: Iterator[tuple[str, torch.Tensor]]) -> Losses:
        """Of one slice's documents, with some weights zero."""
        with torch.no_grad(), self.dense.masked(masks) as model:
            return losses(model, self.batches[slice])


def together(parts: list[Losses]) -> Losses:
    """Of slices that do not overlap."""
    return Losses(
        *(
            {name: value for part in parts for name, value in getattr(part, field).items()}
            for field in vars(parts[0])
        )
    )


def shuffled(groups: Groups, core: int, seed: int) -> Groups:
    """Experts dealt anew among the weights of each tensor that are in one."""
    found = {}
    for name, its in groups.items():
        flat = its.reshape(-1).copy()
        places = np.flatnonzero(flat < core)
        flat[places] = flat[np.random.default_rng(seed).permutation(places)]
        found[name] = flat.reshape(its.shape)
    return found


def masks_of(groups: Groups, on: list[int], core: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The core's weights and those of some experts."""
    wanted = np.isin(np.arange(256), [*on, core])
    for name, its in groups.items():
        yield name, torch.from_numpy(wanted[its])


def mean(parts: list[Losses]) -> float:
    """Nats a token over all slices."""
    return together(parts).mean


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--on", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--split", default="development")
    parser.add_argument("--samples", type=int, default=56, help="about so many of the split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    config = load_config(wanted.config)
    world = World.of(wanted.run, config, wanted.split, wanted.samples)
    options = select_options(world.config.experts, name_of(world.source.scored_by))
    selection: Selection = select(world.source, options)
    core, sizes = selection.experts, np.array(selection.group_sizes)
    cells = {name: groups_of(selection, world.source, name) for name in selection.tensors}
    dealt = shuffled(cells, core, wanted.seed)
    needs = needs_by_slice(world.source.clustered)
    total = sum(parameter.size for parameter in world.dense.parameters)
    plain = [world.measured(name, iter(())) for name in world.batches]
    whole = [world.measured(name, masks_of(cells, list(range(core)), core)) for name in world.batches]
    rows = [
        ["dense, as recorded", "100 %", f"{mean(plain):.4f}", ""],
        ["all that is kept", f"{sizes.sum() / total:.1%}", f"{mean(whole):.4f}", ""],
    ]
    goals: list[Goal] = []
    figures: dict[str, float] = {"dense": mean(plain), "kept": mean(whole)}
    draw = np.random.default_rng(wanted.seed)
    for on in wanted.on:
        found: dict[str, list[Losses]] = {"cells": [], "shuffled": [], "static": []}
        active = []
        for name in world.batches:
            needed = np.argsort(needs[name], kind="stable")[:on].tolist()
            count = int(sizes[needed].sum() + sizes[core])
            active.append(count / total)
            found["cells"].append(world.measured(name, masks_of(cells, needed, core)))
            drawn = draw.permutation(core)
            enough = int(np.searchsorted(np.cumsum(sizes[drawn]), sizes[needed].sum())) + 1
            found["shuffled"].append(world.measured(name, masks_of(dealt, drawn[:enough].tolist(), core)))
        asked = replace(options, budget=round(np.mean(active) * total), allocation="global", shares={})
        static = select(world.source, asked)
        every = {tensor: groups_of(static, world.source, tensor) for tensor in static.tensors}
        for name in world.batches:
            found["static"].append(world.measured(name, masks_of(every, list(range(core)), core)))
        draws = resampled([together(its) for its in found.values()])
        losses_of = {what: mean(its) for what, its in found.items()}
        for number, (what, loss) in enumerate(losses_of.items()):
            off = None if draws is None or not number else interval_of(draws[number] - draws[0])
            behind = (
                "" if off is None else f"{loss - losses_of['cells']:+.4f} [{off.low:+.4f}, {off.high:+.4f}]"
            )
            rows.append([f"{on} of {core}, {what}", f"{np.mean(active):.1%}", f"{loss:.4f}", behind])
            figures[f"{what} {on}"] = loss
        goals += [
            at_least(f"{on} on: {what} - cells, nats", losses_of[what] - losses_of["cells"], 0)
            for what in ("shuffled", "static")
        ]
    columns = ("experts on", "of the linear weights", "nats", "behind the cells")
    finish("cells", columns, rows, goals, wanted.json, figures)


if __name__ == "__main__":
    main()
