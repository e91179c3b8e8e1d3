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
from tinyonn.experts.need_centres import EVENING, ROUNDS, find_centres
from tinyonn.experts.need_curves import Curves, needed_budgets, shares_under
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
        reader = self.run.store.reader()
        filled = {segment.slice for segment in reader.segments if segment.samples}
        slices = tuple(name for name in self.run.slices if name in filled)
        data = NeedData(reader, self.source, slices, POWER / 2)
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
        needs = {name: needs_KS[:, number].tolist() for number, name in enumerate(slices)}
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
