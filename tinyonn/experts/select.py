"""Which weights are kept: exactly a budget, cut to the weight, in bounded memory.

1. The budget is allocated across tensors (``tinyonn.experts.allocation``); after that every tensor is cut on its own.
2. In a tensor the highest scores up to its budget are kept, and the core's share of them, the highest, is its core.
3. The rest goes to the experts of its labels.

Every cut is exact (``tinyonn.experts.cuts``), so the groups follow from a tensor's two cuts, in any band order.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numba import njit

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import CapacityError, InputError
from tinyonn.experts.allocation import apportion, given_counts, global_counts, uniform_counts
from tinyonn.experts.cuts import DIGIT, GATHERED, HELD_BYTES, WEIGHT_BYTES, TensorView, cut_tensors
from tinyonn.experts.selection import Selection, SelectOptions
from tinyonn.experts.source import Band, Source, tensors_outside
from tinyonn.score.stage import task_groups
from tinyonn.store.arrays import band_rows, bands
from tinyonn.store.records import UInt8
from tinyonn.workers.tasks import Call, Compute

__all__ = ["SelectOptions", "Selection", "TensorGroups", "groups_of", "select", "select_bytes"]

LOG = logging.getLogger(__name__)
WORTH = "wg"  # the score by which one cut through all tensors compares their weights


class TensorGroups:
    """The groups of a tensor's weights.

    Parameters
    ----------
    selection : Selection
    source : Source
        The one it was made from, or another with the same records, labels and weights.
    name : str

    Attributes
    ----------
    needs : frozenset of str
        What a band must hold.

    Raises
    ------
    InputError
        Other records or labels; or the tensor is in the trunk.
    """

    def __init__(self, selection: Selection, source: Source, name: str) -> None:
        if selection.identity != source.identity:
            raise InputError(
                f"the selection was made from other records or labels than the present ones ({selection.identity}, now "
                f"{source.identity}); select again, or restore the run that it was made from"
            )
        if name not in selection.tensors:
            raise InputError(f"{name} is in the trunk of the selection and has no groups")
        self.cuts = selection.tensors[name]
        parameter = parameter_named(source, name)
        self._source, self._name = source, name
        self._view = TensorView(source, parameter, selection.options)
        self.needs = self._view.needs

    def of(self, first: int, last: int) -> UInt8:
        """Groups of rows [first, last): uint8 [rows, columns]; k is the core, 255 dropped."""
        return self.of_band(self._source.band(self._name, first, last, self.needs))

    def of_band(self, band: Band) -> UInt8:
        """The same for a band that was read with `needs`."""
        return self._view.groups(band, self.cuts)


def groups_of(
    selection: Selection, source: Source, name: str, first: int = 0, last: int | None = None
) -> UInt8:
    """Groups of some rows of a tensor; for many bands of one, `TensorGroups` looks at it only once.

    Parameters
    ----------
    selection : Selection
    source : Source
    name : str
    first, last : int
        Rows; by default all.

    Returns
    -------
    uint8 [rows, columns]
        0 to k − 1: the expert; k: the core; 255: dropped.
    """
    rows = parameter_named(source, name).shape[0]
    return TensorGroups(selection, source, name).of(first, rows if last is None else last)


def parameter_named(source: Source, name: str) -> Parameter:
    """A tensor of the source.

    Raises
    ------
    InputError
        There is none of this name.
    """
    found = next((parameter for parameter in source.parameters if parameter.name == name), None)
    if found is None:
        raise InputError(f"the model has no tensor {name}")
    return found


@dataclass(frozen=True, eq=False)
class Spread:
    """Budget and core over the tensors.

    Attributes
    ----------
    kept_T : int64 [tensors]
        Weights that each keeps, the budget together.
    core_T : float or int [tensors]
        Proportions of the core.
    """

    kept_T: np.ndarray
    core_T: np.ndarray


def select(
    source: Source,
    options: SelectOptions,
    compute: Compute | None = None,
    spread: Spread | None = None,
) -> Selection:
    """Choose exactly the budget.

    Parameters
    ----------
    source : Source
    options : SelectOptions
    compute : callable, optional
        From `tinyonn.workers.tasks.computing`, with as many workers as `select_bytes` leaves room for; without it, one
        task after another in this thread. The result does not depend on it.
    spread : Spread, optional
        Of budget and core over the tensors; by default the allocation's, and the core in proportion.

    Raises
    ------
    InputError
        As `SelectOptions.weights_of`; a score that needs what the source lacks, or that is not a number.
    """
    run = compute if compute is not None else _one_by_one
    budget = options.weights_of(source)
    tensors = tensors_outside(source.parameters)
    large = next((p for p in tensors if p.size >= 1 << 32), None)
    if large is not None:
        raise CapacityError(
            f"{large.name} has {large.size:,} weights; at most {2**32:,} of a tensor can be told apart"
        )
    if spread is None:
        kept = allocate(source, tensors, options, [budget], run)[0]
        spread = Spread(kept, kept)
    sizes, names = np.array([parameter.size for parameter in tensors]), [p.name for p in tensors]
    counts = dict(zip(names, spread.kept_T, strict=True))
    cored = apportion(round(options.core * budget), spread.core_T, spread.kept_T)
    core = dict(zip(names, cored, strict=True))
    groups = task_groups(tensors)
    calls: list[Call] = [
        (cut_tensors, (source, tuple((p, int(counts[p.name]), int(core[p.name])) for p in group), options))
        for group in groups
    ]
    found = {
        parameter.name: cuts
        for group, result in zip(groups, run(calls), strict=True)
        for parameter, cuts in zip(group, result, strict=True)
    }
    experts = max(source.cells, 1)
    selection = Selection(options, source.identity, experts, budget, {name: found[name] for name in names})
    assert sum(selection.group_sizes) == budget and sizes.sum() >= budget
    if empty := selection.empty_experts:
        LOG.debug(
            "%d of %d experts are empty: %s; a larger budget, a smaller core or fewer cells would fill them",
            *(len(empty), experts, ", ".join(map(str, empty))),
        )
    return selection


def select_bytes(source: Source) -> int:
    """Memory of the largest task."""
    return max(select_needs(source), default=0)


def select_needs(source: Source) -> list[int]:
    """Memory of every task that cuts tensors: its largest tensor's."""
    groups = task_groups(tensors_outside(source.parameters))
    return [max(_task_bytes(parameter) for parameter in group) for group in groups]


def groups_bytes(parameter: Parameter) -> int:
    """Memory of a band while its weights' groups are found: records, weights (as read, as rounded, in float32), scores,
    keys, those for the core, labels, what is kept, groups, and a chunk while it is decoded.
    """
    return band_rows(parameter.shape) * prod(parameter.shape[1:]) * (2 + 8 + 4 + 4 + 4 + 1 + 1 + 1 + 4)


def _task_bytes(parameter: Parameter) -> int:
    held = WEIGHT_BYTES * parameter.size if WEIGHT_BYTES * parameter.size <= HELD_BYTES else 0
    digits = (1 << DIGIT) * (4 + 8)
    return held + digits + min(GATHERED, parameter.size) * 8 + groups_bytes(parameter)


def _one_by_one(calls: Sequence[Call]) -> list[Any]:
    return [function(*arguments) for function, arguments in calls]


def allocate(
    source: Source,
    tensors: Sequence[Parameter],
    options: SelectOptions,
    budgets: Sequence[int],
    compute: Compute | None = None,
) -> list[np.ndarray]:
    """Weights that every tensor keeps under some budgets: int64 [tensors] for each.

    Parameters
    ----------
    source : Source
    tensors : sequence of Parameter
        Those outside the trunk.
    options : SelectOptions
        Its allocation; its own budget counts for nothing.
    budgets : sequence of int
    compute : callable, optional
        As of `select`.
    """
    sizes = np.array([parameter.size for parameter in tensors])
    if options.allocation == "given":
        return [given_counts(tensors, options.shares, budget) for budget in budgets]
    if options.allocation == "uniform":
        return [uniform_counts(sizes, budget) for budget in budgets]
    groups = task_groups(tensors)
    run = compute if compute is not None else _one_by_one
    results = run([(worth_histograms, (source, tuple(group), options)) for group in groups])
    by_name = {
        parameter.name: histogram
        for group, result in zip(groups, results, strict=True)
        for parameter, histogram in zip(group, result, strict=True)
    }
    histograms = [by_name[parameter.name] for parameter in tensors]
    return [global_counts(histograms, budget) for budget in budgets]


def worth_histograms(
    source: Source, parameters: tuple[Parameter, ...], options: SelectOptions
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A task: how many weights of each tensor lie in each bin (upper 16 bits of the key) of the worth."""
    found = []
    for parameter in parameters:
        view = TensorView(source, parameter, options, WORTH)
        counts = np.zeros(1 << 16, np.int64)
        for first, last in bands(parameter.shape):
            _count_bins(view.keys(view.band(first, last)).reshape(-1), counts)
        bins = np.flatnonzero(counts)
        found.append((bins.astype(np.uint16), counts[bins]))
    return found


@njit(nogil=True, cache=True)
def _count_bins(keys: Any, counts: Any) -> None:
    for i in range(keys.size):
        counts[keys[i] >> np.uint32(16)] += 1
