"""Experts by need: what is kept is grouped by which slices need it, and how much.

A slice keeps in each tensor the weights of the highest |W| g^0.7, g being the geometric mean of |dL/dW| over its
samples, as many as the allocation gives the tensor. Its *need* of a weight is the smallest budget under which it would
keep it, as a share of all linear weights. Weights that the same slices need to the same degree make up an expert: a
prompt of one slice is then served by few experts, and those hold little that it does not need. (Cells of records have
no weights in them, and slices' records differ in strength first of all: experts made of them are on for every prompt.)

Data flow:

1. weights, records of every slice → histograms by tensor and slice (tasks)
2. allocation under several budgets → tables: bin of the histogram → log of the need over the budget
3. what is kept outside the core, from `select` → a sample → k-means → centres
4. centres → a label for every weight, one file for each tensor (tasks) → `NeedSource`, and the selection by its labels

Shape suffixes: ``S`` slices, ``T`` tensors, ``L`` budgets, ``K`` experts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn.base.parameters import Parameter
from tinyonn.engine import Compute
from tinyonn.errors import InputError
from tinyonn.experts.need_passes import (
    BINS,
    Counts,
    Float32,
    NeedData,
    count_needs,
    label_needs,
    label_path,
    sample_needs,
    task_bytes,
)
from tinyonn.experts.options import Selection, SelectOptions
from tinyonn.experts.select import allocate, select
from tinyonn.experts.source import MOST_CELLS, Band, RunSource, digest, tensors_outside
from tinyonn.run import Run
from tinyonn.score.stage import task_groups

FORMAT = 1
POWER = 0.7  # of the gradient; 1 would be the Taylor estimate of the loss, which trusts few samples too much
DEPTH = (
    3.5  # a weight needed under e**-3.5 of the budget is needed at all costs: needs below that count as equal
)
LEVELS = (1.0, 0.6, 0.3, 0.1, 0.03)  # of the budget, at which the allocation is asked
SAMPLE = 1 << 18  # weights that the centres are found from
ROUNDS = 50  # of k-means, at most


@dataclass(frozen=True)
class NeedOptions:
    """What decides the experts beside the selection.

    Attributes
    ----------
    experts : int
    seed : int
        Of the sample and of k-means.
    """

    experts: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.experts <= MOST_CELLS:
            raise InputError(f"experts.count = {self.experts}; give 1 to {MOST_CELLS} beside the core")


class NeedSource:
    """A run's source whose labels are experts by need.

    Parameters
    ----------
    source : RunSource
        Without labels.
    folder : Path
        Of the labels; all workers must reach it.
    experts : int
    identity : str
        Digest of what labels and records were made from.
    """

    trunk: tuple[str, ...] = ()

    def __init__(self, source: RunSource, folder: Path, experts: int, identity: str) -> None:
        self._source, self._folder = source, folder
        self.cells, self.identity = experts, identity
        self.parameters, self.slices = source.parameters, source.slices
        self.transposed: Collection[str] = source.transposed

    def attributes(self, name: str) -> Mapping[str, Any]:
        """Of the tensor's records."""
        return self._source.attributes(name)

    def band(self, name: str, first: int, last: int, needs: Collection[str]) -> Band:
        """Rows [first, last) with what is needed."""
        band = self._source.band(name, first, last, set(needs) - {"labels"})
        if "labels" not in needs:
            return band
        labels = np.load(label_path(self._folder, name), mmap_mode="r", allow_pickle=False)[first:last]
        return replace(band, labels=np.ascontiguousarray(labels))


@dataclass(frozen=True)
class ByNeed:
    """Experts of a run, before they are made.

    Attributes
    ----------
    run : Run
    source : RunSource
        Without labels.
    options : NeedOptions
    selection : SelectOptions
        Within tensors or rows.
    searched : mapping of float to mapping
        Budget to shares by tensor that were found for it.
    folder : Path
        For the labels.
    """

    run: Run
    source: RunSource
    options: NeedOptions
    selection: SelectOptions
    searched: Mapping[float, Mapping[str, float]]
    folder: Path

    def __post_init__(self) -> None:
        if self.selection.within == "cell":
            raise InputError(
                "experts.within = 'cell' needs cells before experts are made by need; use tensor or row, or by: cells"
            )

    @property
    def identity(self) -> str:
        """Digest of what decides the labels."""
        searched = {str(budget): dict(shares) for budget, shares in sorted(self.searched.items())}
        constants = [FORMAT, POWER, DEPTH, LEVELS, SAMPLE, ROUNDS]
        return digest(
            [self.source.identity, asdict(self.options), self.selection.tree(), searched, constants]
        )

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        """What is cut."""
        return tensors_outside(self.source.parameters, self.selection.trunk)

    @property
    def bytes(self) -> int:
        """Memory of the largest task."""
        return task_bytes(self.tensors, len(self.run.slices))

    def labelled(self) -> NeedSource:
        """The source with labels, which `make` writes."""
        return NeedSource(self.source, self.folder / self.identity, self.options.experts, self.identity)

    def make(self, compute: Compute) -> Selection:
        """Find the experts and write every weight's label, unless they are there already.

        Parameters
        ----------
        compute : callable
            From `tinyonn.engine.computing`; the result does not depend on it.

        Returns
        -------
        Selection
            Of `labelled`.
        """
        plain = select(self.source, self.selection, compute)
        own = self.folder / self.identity
        done = own / "counts.json"
        if done.is_file():
            counts = json.loads(done.read_text("utf-8"))
        else:
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir(parents=True)
            counts = self._label(plain, own, compute)
            side = done.with_suffix(".part")
            side.write_text(json.dumps(counts), "utf-8")
            side.replace(done)
        cuts = {
            name: replace(its, kept=np.append(np.array(counts[name], np.int64), its.kept[-1]))
            for name, its in plain.tensors.items()
        }
        return Selection(self.selection, self.identity, self.options.experts, plain.budget, cuts)

    def _label(self, plain: Selection, own: Path, compute: Compute) -> dict[str, list[int]]:
        slices = tuple(self.run.slices)
        data = NeedData(self.run, self.source, slices, POWER / 2)
        groups = task_groups(self.tensors)
        names = [parameter.name for group in groups for parameter in group]

        def passed(function: Any, *arguments: Any) -> dict[str, Any]:
            results = compute([(function, (data, *arguments, tuple(group))) for group in groups])
            return dict(zip(names, (its for result in results for its in result), strict=True))

        tables = self._tables(passed(count_needs), compute)
        outside = plain.budget - sum(plain.group_sizes[1:])
        share = min(1.0, SAMPLE / max(1, outside))
        drawn = passed(sample_needs, plain, tables, share, self.options.seed)
        points_NS = np.concatenate([drawn[parameter.name] for parameter in self.tensors])
        centres_KS = find_centres(points_NS, self.options.experts, self.options.seed)
        counted = passed(label_needs, plain, tables, centres_KS, own)
        return {
            name: np.pad(its, (0, self.options.experts - its.size)).tolist() for name, its in counted.items()
        }

    def _tables(self, counted: Mapping[str, Counts], compute: Compute) -> dict[str, Float32]:
        """Log of the need over the budget by bin: float32 [S, bins] for each tensor."""
        total = self.selection.weights_of(self.source)
        weights = sum(parameter.size for parameter in self.tensors)
        budgets, shares_LT = self._curves(total, weights, compute)
        tables = {}
        for number, parameter in enumerate(self.tensors):
            counts_SB = counted[parameter.name]
            above_SB = counts_SB.sum(1, keepdims=True) - counts_SB.cumsum(1)
            ranks_SB = (above_SB + 0.5 * np.maximum(counts_SB, 1)) / parameter.size
            needs_SB = needed_budgets(ranks_SB, budgets, shares_LT[:, number])
            tables[parameter.name] = np.clip(np.log(needs_SB * weights / total), -DEPTH, 0).astype(np.float32)
        return tables

    def _curves(self, total: int, weights: int, compute: Compute) -> tuple[np.ndarray, np.ndarray]:
        """Budgets as shares of all weights, ascending, and every tensor's share under each: [L], [L, T]."""
        sizes = np.array([parameter.size for parameter in self.tensors])
        points: dict[int, np.ndarray] = {}
        found = {
            round(budget * weights) if budget <= 1 else int(budget): shares
            for budget, shares in self.searched.items()
        }
        found = {budget: shares for budget, shares in found.items() if budget < total}
        below = min(found, default=total)
        for budget, shares in found.items():
            options = replace(self.selection, allocation="given", shares=dict(shares), curves=())
            wanted = [budget, *(round(budget * level) for level in LEVELS if level < 0.5 and budget == below)]
            points |= dict(
                zip(wanted, allocate(self.source, self.tensors, options, wanted, compute), strict=True)
            )
        wanted = [round(total * level) for level in LEVELS if level == 1 or not found]
        wanted = [budget for budget in wanted if budget >= len(sizes)] or [total]
        points |= dict(
            zip(wanted, allocate(self.source, self.tensors, self.selection, wanted, compute), strict=True)
        )
        budgets = sorted(points)
        return np.array(budgets) / weights, np.stack([points[budget] / sizes for budget in budgets])


def needed_budgets(ranks: Any, budgets_L: Any, shares_L: Any) -> Any:
    """The budget under which a tensor keeps the weights of a rank.

    Parameters
    ----------
    ranks : float [...]
        Share of the tensor's weights that stand higher, above 0.
    budgets_L : float [L]
        Ascending, shares of all weights.
    shares_L : float [L]
        That the tensor keeps of itself under each.

    Returns
    -------
    float [...]
        Between the given budgets and up to 1 by powers, below the smallest in proportion.
    """
    shares = np.maximum.accumulate(np.append(np.maximum(shares_L, 1e-9), 1.0))
    shares = shares * (1 + 1e-9 * np.arange(shares.size))  # rising, where an allocation stands still
    logs, budgets = np.log(shares), np.log(np.append(budgets_L, 1.0))
    found = np.interp(np.log(ranks), logs, budgets)
    return np.exp(np.where(np.log(ranks) < logs[0], np.log(ranks) - logs[0] + budgets[0], found))


def find_centres(points_NS: Float32, experts: int, seed: int) -> Float32:
    """k-means; the same bits whatever the threads.

    Parameters
    ----------
    points_NS : float32 [N, S]
    experts : int
    seed : int

    Returns
    -------
    float32 [K, S]
        What is needed most by all comes first; fewer than asked for if the points are fewer.

    Raises
    ------
    InputError
        No points: all that is kept is in the core.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    distinct = len(np.unique(points_NS, axis=0))
    if not distinct:
        raise InputError("experts.core = 1 leaves nothing for experts; give a smaller core")
    with threadpool_limits(1):
        kmeans = KMeans(min(experts, distinct), n_init=1, max_iter=ROUNDS, random_state=seed, copy_x=False)
        centres_KS = kmeans.fit(np.ascontiguousarray(points_NS, dtype=np.float32)).cluster_centers_
    order = np.lexsort((np.arange(len(centres_KS)), centres_KS.mean(1)))
    return np.ascontiguousarray(centres_KS[order], dtype=np.float32)


assert BINS <= 1 << 16  # bins are uint16
