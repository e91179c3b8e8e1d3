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

import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn.dense.parameters import Parameter
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
    task_needs,
)
from tinyonn.experts.select import Spread, allocate, select
from tinyonn.experts.selection import Selection, SelectOptions
from tinyonn.experts.source import MOST_CELLS, Band, RunSource, digest, tensors_outside
from tinyonn.files import file_checksum, read_derived, read_json, write_json
from tinyonn.run import Run
from tinyonn.score.stage import task_groups
from tinyonn.workers.tasks import Compute


@dataclass(frozen=True, eq=False)
class Curves:
    """What every tensor keeps under growing budgets.

    Attributes
    ----------
    budgets_L : float [L]
        Ascending, shares of all weights.
    shares_LT : float [L, T]
        Of the tensors' own weights.
    weights : int
        Of all tensors.
    """

    budgets_L: np.ndarray
    shares_LT: np.ndarray
    weights: int


def shares_under(budget: float, curves: Curves) -> np.ndarray:
    """What every tensor keeps of itself under a budget, float [T]: `needed_budgets` the other way round."""
    if budget <= curves.budgets_L[0]:
        return np.asarray(curves.shares_LT[0] * budget / curves.budgets_L[0])
    logs_LT = np.log(np.maximum(curves.shares_LT, 1e-9))
    at = np.log(budget), np.log(curves.budgets_L)
    return np.asarray(np.exp([np.interp(*at, logs_L) for logs_L in logs_LT.T]))


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


LOG = logging.getLogger(__name__)
FORMAT = 1
POWER = 0.7  # of the gradient; 1 would be the Taylor estimate of the loss, which trusts few samples too much
DEPTH = 3.5  # needs below e**-3.5 of the budget count as equal: such a weight is kept at all costs
HEIGHT = 1.0  # and above e times the budget: such a weight is kept for other slices
LEVELS = (0.6, 0.3, 0.1, 0.03)  # of the budget, at which the allocation is asked
SAMPLE = 1 << 16  # weights that the centres are found from
NEEDS = "needs.json"  # beside the labels: what every slice needs of every expert
COUNTS = "counts.json"  # beside the labels, once all else is there: weights of every expert in each tensor


@dataclass(frozen=True)
class NeedOptions:
    """What decides the experts beside the selection; `seed` is of the sample and of k-means."""

    experts: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.experts <= MOST_CELLS:
            raise InputError(f"experts.count = {self.experts}; give 1 to {MOST_CELLS} beside the core")


class NeedSource:
    """A run's source whose labels are experts by need."""

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

    @property
    def identity(self) -> str:
        """Digest of what decides the labels."""
        searched = {str(budget): dict(shares) for budget, shares in sorted(self.searched.items())}
        constants = [FORMAT, POWER, DEPTH, HEIGHT, LEVELS, SAMPLE, ROUNDS, EVENING]
        return digest(
            [self.source.identity, asdict(self.options), self.selection.tree(), searched, constants]
        )

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        """What is cut."""
        return tensors_outside(self.source.parameters)

    @property
    def data(self) -> NeedData:
        """What weights' needs are made of."""
        reader = self.run.store.reader()
        filled = {segment.slice for segment in reader.segments if segment.samples}
        slices = tuple(name for name in self.run.slices if name in filled)
        return NeedData(reader, self.source, slices, POWER / 2)

    @property
    def task_bytes(self) -> list[int]:
        """Memory of every task."""
        return task_needs(task_groups(self.tensors), len(self.run.slices))

    @property
    def own_bytes(self) -> int:
        """Memory beside the tasks: numbers of all bins, int64, and their tables, float32, of each tensor and slice; the
        sample and its distances to the centres.
        """
        slices = len(self.run.slices)
        return len(self.tensors) * slices * BINS * 12 + SAMPLE * 4 * (self.options.experts + 4 * slices)

    @property
    def made(self) -> bool:
        """Whether all labels are there."""
        return self._counts() is not None

    def labelled(self) -> NeedSource:
        """The source with labels, which `make` writes."""
        return NeedSource(self.source, self.folder / self.identity, self.options.experts, self.identity)

    def needs(self) -> dict[str, list[float]]:
        """By slice the need of every expert's weights, once they are made.

        The budget under which the slice would keep them, as a multiple of the selection's, geometric mean over the
        expert's weights; e at most, and of experts without weights. Slices without samples are left out.
        """
        tree = read_json(self.folder / self.identity / NEEDS, "delete the folder and assemble again")
        return dict(tree.get("needs", tree))

    def make(self, compute: Compute) -> Selection:
        """Find the experts and write every weight's label, unless they are there already.

        Parameters
        ----------
        compute : callable
            From `tinyonn.workers.tasks.computing`; the result does not depend on it.

        Returns
        -------
        Selection
            Of `labelled`.
        """
        total = self.selection.weights_of(self.source)
        curves = self._curves(total, compute)
        sizes = np.array([parameter.size for parameter in self.tensors])
        kept_T = np.rint(curves.shares_LT[-1] * sizes).astype(
            np.int64
        )  # of the whole budget, the largest there is
        core_T = shares_under(self.selection.core * total / curves.weights, curves) * sizes
        plain = select(self.source, self.selection, compute, Spread(kept_T, core_T))
        counts = self._counts()
        if counts is None:
            own = self.folder / self.identity
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir(parents=True)
            counts = self._label(plain, curves, own, compute)
            checksums = {name: file_checksum(label_path(own, name)) for name in counts}
            write_json(own / COUNTS, {"counts": counts, "crc32": checksums})
        cuts = {
            name: replace(its, kept=np.append(np.array(counts[name], np.int64), its.kept[-1]))
            for name, its in plain.tensors.items()
        }
        return Selection(self.selection, self.identity, self.options.experts, plain.budget, cuts)

    def _counts(self) -> dict[str, list[int]] | None:
        """Weights of every expert by tensor, if all labels are there and as they were written."""
        own = self.folder / self.identity
        tree = read_derived(own / COUNTS)
        if tree is None or read_derived(own / NEEDS) is None:
            return None
        for name, checksum in tree.get("crc32", {}).items():
            path = label_path(own, name)
            if not path.is_file() or file_checksum(path) != checksum:
                LOG.warning("%s is missing or not what was written; the labels are made again", path)
                return None
        return dict(tree.get("counts", tree))

    def _label(self, plain: Selection, curves: Curves, own: Path, compute: Compute) -> dict[str, list[int]]:
        data = self.data
        groups = task_groups(self.tensors)
        names = [parameter.name for group in groups for parameter in group]

        def passed(function: Any, *arguments: Any) -> dict[str, Any]:
            results = compute([(function, (data, *arguments, tuple(group))) for group in groups])
            return dict(zip(names, (its for result in results for its in result), strict=True))

        tables = self._tables(passed(count_needs), plain.budget, curves)
        outside = plain.budget - sum(plain.group_sizes[1:])
        share = min(1.0, SAMPLE / max(1, outside))
        drawn = passed(sample_needs, plain, tables, share, self.options.seed)
        points_NS = np.concatenate([drawn[parameter.name] for parameter in self.tensors])
        centres = find_centres(points_NS, self.options.experts, self.options.seed)
        labelled = passed(label_needs, plain, tables, centres, own)
        counts_TK = np.stack([counts for counts, _ in labelled.values()])
        sums_KS = np.sum([sums for _, sums in labelled.values()], axis=0)
        missing = self.options.experts - counts_TK.shape[1]
        weights_K1 = counts_TK.sum(0)[:, None]
        logs_KS = np.where(weights_K1 > 0, sums_KS / np.maximum(weights_K1, 1), HEIGHT)
        needs_KS = np.exp(np.pad(logs_KS, ((0, missing), (0, 0)), constant_values=HEIGHT))
        needs = {name: needs_KS[:, number].tolist() for number, name in enumerate(data.slices)}
        write_json(own / NEEDS, {"needs": needs})
        counts_TK = np.pad(counts_TK, ((0, 0), (0, missing)))
        return dict(zip(labelled, counts_TK.tolist(), strict=True))

    def _tables(self, counted: Mapping[str, Counts], total: int, curves: Curves) -> dict[str, Float32]:
        """Log of the need over the budget by bin: float32 [S, bins] for each tensor."""
        tables = {}
        for number, parameter in enumerate(self.tensors):
            counts_SB = counted[parameter.name]
            above_SB = counts_SB.sum(1, keepdims=True) - counts_SB.cumsum(1)
            ranks_SB = (above_SB + 0.5 * np.maximum(counts_SB, 1)) / parameter.size
            needs_SB = needed_budgets(ranks_SB, curves.budgets_L, curves.shares_LT[:, number])
            logs_SB = np.log(needs_SB * curves.weights / total)
            tables[parameter.name] = np.clip(logs_SB, -DEPTH, HEIGHT).astype(np.float32)
        return tables

    def _curves(self, total: int, compute: Compute) -> Curves:
        """The allocation of the selection's budget, and of what was searched or what lies below."""
        sizes = np.array([parameter.size for parameter in self.tensors])
        weights = int(sizes.sum())
        points: dict[int, np.ndarray] = {}

        def add(options: SelectOptions, budgets: list[int]) -> None:
            wanted = [budget for budget in budgets if budget >= sizes.size]
            points.update(
                zip(wanted, allocate(self.source, self.tensors, options, wanted, compute), strict=True)
            )

        found = {
            round(budget * weights) if budget <= 1 else int(budget): shares
            for budget, shares in self.searched.items()
        }
        found = {budget: shares for budget, shares in found.items() if budget < total}
        for budget, shares in found.items():
            options = replace(self.selection, allocation="given", shares=dict(shares))
            below = [round(budget * level) for level in LEVELS if level < 0.5 and budget == min(found)]
            add(options, [budget, *below])
        add(self.selection, [total, *(round(total * level) for level in LEVELS if not found)])
        budgets = sorted(points)
        shares_LT = np.stack([points[budget] / sizes for budget in budgets])
        return Curves(np.array(budgets) / weights, shares_LT, weights)


ROUNDS = 30  # of k-means, at most
EVENING = 60  # rounds in which its clusters become of about equal sizes


def find_centres(points_NS: Float32, experts: int, seed: int) -> tuple[Float32, Float32]:
    """k-means of about equal sizes; the same bits whatever the threads.

    A point belongs to the centre of the least squared distance plus the centre's handicap, which grows where a cluster
    is too large: a power diagram, whose handicaps are the duals of the transport to equal masses (Aurenhammer et al.
    1998). Points that are equal stay together, so clusters of them may be larger.

    Parameters
    ----------
    points_NS : float32 [N, S]
    experts : int
    seed : int

    Returns
    -------
    centres_KS : float32 [K, S]
        What is needed most by all comes first; fewer than asked for if the points are fewer.
    handicaps_K : float32 [K]

    Raises
    ------
    InputError
        No points: all that is kept is in the core.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    rows = np.ascontiguousarray(points_NS, dtype=np.float32)
    distinct = len(np.unique(rows.view(f"V{rows.itemsize * rows.shape[1]}"))) if rows.size else 0
    if not distinct:
        raise InputError("experts.core = 1 leaves nothing for experts; give a smaller core")
    with threadpool_limits(1):
        kmeans = KMeans(min(experts, distinct), n_init=1, max_iter=ROUNDS, random_state=seed)
        centres_KS = kmeans.fit(rows).cluster_centers_
        handicaps_K = _even_out(rows, centres_KS)
    order = np.lexsort((np.arange(len(centres_KS)), centres_KS.mean(1)))
    return (
        np.ascontiguousarray(centres_KS[order], dtype=np.float32),
        np.ascontiguousarray(handicaps_K[order], dtype=np.float32),
    )


def _even_out(points_NS: Float32, centres_KS: Float32) -> Float32:
    """Handicaps of about equal sizes; moves the centres, too."""
    experts, points = len(centres_KS), len(points_NS)
    handicaps_K = np.zeros(experts, np.float32)
    step = float(points_NS.var(0).sum()) / 20
    for turn in range(EVENING):
        away_NK = np.square(centres_KS).sum(1) + handicaps_K - 2 * points_NS @ centres_KS.T
        label_N = away_NK.argmin(1)
        counts_K = np.bincount(label_N, minlength=experts)
        crowd_K = np.log(np.maximum(counts_K * experts / points, 0.02))
        handicaps_K += np.float32(step * (1 - turn / EVENING)) * np.clip(crowd_K, -2, 2).astype(np.float32)
        if turn < 0.7 * EVENING:
            sums_KS = np.stack([np.bincount(label_N, x_N, experts) for x_N in points_NS.T], axis=1)
            filled_K = counts_K > 0
            centres_KS[filled_K] = sums_KS[filled_K] / counts_K[filled_K, None]
    return handicaps_K
