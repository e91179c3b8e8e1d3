"""Which weights are kept: exactly a budget, cut to the weight, in bounded memory.

1. The budget is allocated across tensors (`allocate`); after that every tensor is cut on its own.
2. In a tensor the highest scores up to its budget are kept, and the core's share of them, the highest, is its core.
3. The rest goes to the experts of its labels.

=========== ======================================================================================================
uniform     the same share everywhere
given       shares in the given proportions, by tensor, kind and layer, or kind
global      one cut through all tensors, by a score that is comparable across them: |W · g|
=========== ======================================================================================================

Every cut is exact (``tinyonn.select.cuts``), so the groups follow from a tensor's two cuts, in any band order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numba import njit

from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.errors import CapacityError, InputError
from tinyonn.score.source import Band, Source, tensors_outside
from tinyonn.score.stage import task_groups
from tinyonn.select.cuts import DIGIT, GATHERED, HELD_BYTES, WEIGHT_BYTES, TensorView, UInt32, cut_tensors
from tinyonn.select.selection import Selection, SelectOptions
from tinyonn.store.arrays import band_rows, bands
from tinyonn.store.records import Float64, UInt8
from tinyonn.workers.tasks import Call, Compute

Counts = np.ndarray[Any, np.dtype[np.int64]]
Histogram = tuple[
    np.ndarray, np.ndarray
]  # bins uint16, increasing with the score, and how many weights lie in each


def apportion(total: int, weights: Any, limits: Any) -> Counts:
    """Split a total in proportion to weights, to the unit (largest remainders), none above its limit.

    Parameters
    ----------
    total : int
        At most the sum of the limits of what has a weight.
    weights : float or int [n]
        >= 0.
    limits : int [n]

    Returns
    -------
    int64 [n], with this sum
    """
    weights = np.asarray(weights, dtype=np.float64)
    limits = np.asarray(limits, dtype=np.int64)
    exact = _levelled(total, weights, limits.astype(np.float64))
    counts: Counts = np.minimum(np.floor(exact).astype(np.int64), limits)
    missing = total - int(counts.sum())
    order = np.argsort(-(exact - counts), kind="stable")
    for index in [i for i in order if weights[i] > 0 and counts[i] < limits[i]][: max(missing, 0)]:
        counts[index] += 1
    for index in order[::-1]:  # floating point may have floored one too few
        step = min(max(int(counts.sum()) - total, 0), int(counts[index]))
        counts[index] -= step
    missing = total - int(counts.sum())
    if missing:
        room = np.where(weights > 0, limits - counts, 0)
        assert missing <= room.sum(), f"{total} do not fit in {limits.sum()}"
        filled = np.minimum(np.cumsum(room), missing)
        counts += np.diff(filled, prepend=0)
    return counts


def _levelled(total: int, weights: Float64, limits: Float64) -> Float64:
    """``min(factor * weight, limit)`` with the factor that gives the total."""
    exact = np.zeros(weights.size)
    full = np.zeros(weights.size, np.bool_)
    while True:
        rest = total - limits[full].sum()
        free = weights[~full].sum()
        exact[full] = limits[full]
        exact[~full] = weights[~full] * (rest / free if free > 0 else 0.0)
        over = ~full & (exact > limits)
        if not over.any():
            return exact
        full |= over


def uniform_counts(sizes: Any, total: int) -> Counts:
    """The same share of every tensor."""
    return apportion(total, sizes, sizes)


def given_counts(parameters: Sequence[Parameter], shares: Mapping[str, float], total: int) -> Counts:
    """Shares in given proportions, scaled to the total; where one would exceed 1, the others take the rest.

    Parameters
    ----------
    parameters : sequence of Parameter
    shares : mapping
        By tensor (``model.layers.0.mlp.up_proj.weight``), by kind and layer (``up_proj/0``), or by kind (``up_proj``);
        the first of these that is there counts.
    total : int

    Raises
    ------
    InputError
        A tensor without a share, or a share that fits no tensor or is not above 0.
    """
    used: set[str] = set()
    chosen = []
    for parameter in parameters:
        kind = kind_of(parameter)
        keys = (parameter.name, f"{kind}/{parameter.layer}", kind)
        found = next((key for key in keys if key in shares), None)
        if found is None:
            raise InputError(f"no share is given for {parameter.name}; give one as {', '.join(keys[1:])}")
        used |= {key for key in keys if key in shares}
        chosen.append(shares[found])
    unknown = sorted(set(shares) - used)
    if unknown:
        kinds = sorted({kind_of(parameter) for parameter in parameters})
        raise InputError(
            f"a share is given for {unknown[0]!r}, which fits no tensor; kinds are {', '.join(kinds)}"
        )
    bad = next((key for key, value in shares.items() if not (0 < value < float("inf"))), None)
    if bad is not None:
        raise InputError(f"the share of {bad} is {shares[bad]}; it must be a number above 0")
    sizes = np.array([parameter.size for parameter in parameters])
    return apportion(total, np.array(chosen) * sizes, sizes)


def global_counts(histograms: Sequence[Histogram], total: int) -> Counts:
    """One cut through all tensors.

    Parameters
    ----------
    histograms : sequence of (bins, counts)
        Of each tensor: bins uint16, increasing with the score, and how many weights lie in each.
    total : int
        The bin of the cut is split in proportion to what the tensors have in it.
    """
    every = np.zeros(1 << 16, np.int64)
    for bins, counts in histograms:
        every[bins] += counts
    reaching = np.cumsum(every[::-1])[::-1]  # weights in a bin or above
    cut = int(np.flatnonzero(reaching >= total)[-1])
    above = np.array([counts[bins > cut].sum() for bins, counts in histograms], np.int64)
    inside = np.array([counts[bins == cut].sum() for bins, counts in histograms], np.int64)
    return np.asarray(above + apportion(total - int(above.sum()), inside, inside))


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
    """A tensor of the source."""
    found = next((parameter for parameter in source.parameters if parameter.name == name), None)
    if found is None:
        raise InputError(f"the model has no tensor {name}")
    return found


def select(
    source: Source,
    options: SelectOptions,
    compute: Compute | None = None,
    kept_T: Counts | None = None,
) -> Selection:
    """Choose exactly the budget.

    Parameters
    ----------
    source : Source
    options : SelectOptions
    compute : callable, optional
        From `tinyonn.workers.tasks.computing`, with as many workers as `select_bytes` leaves room for; without it, one
        task after another in this thread. The result does not depend on it.
    kept_T : int64 [tensors], optional
        What every tensor keeps, the budget together, and of it the core in proportion; by default as is allocated.

    Raises
    ------
    InputError
        As `SelectOptions.weights_of`; a score that needs what the source lacks, or that is not a number.
    """
    run = compute if compute is not None else one_by_one
    budget = options.weights_of(source)
    tensors = tensors_outside(source.parameters)
    large = next((p for p in tensors if p.size >= 1 << 32), None)
    if large is not None:
        raise CapacityError(
            f"{large.name} has {large.size:,} weights; at most {2**32:,} of a tensor can be told apart"
        )
    sizes, names = np.array([parameter.size for parameter in tensors]), [p.name for p in tensors]
    cored = round(options.core * budget)
    core_T: Any = kept_T
    if kept_T is None:
        kept_T, *cores = allocate(source, tensors, options, [budget, cored] if cored else [budget], run)
        # The core is spread as a budget of its size is, as far as there are weights to take.
        core_T = np.where(cores[0] > 0, cores[0], 1e-6 * kept_T) if cores else kept_T
    counts = dict(zip(names, kept_T, strict=True))
    core = dict(zip(names, apportion(cored, core_T, kept_T), strict=True))
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


def one_by_one(calls: Sequence[Call]) -> list[Any]:
    """A `Compute` in this thread."""
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
    histograms: list[Histogram] = []
    if options.allocation == "global":
        groups = task_groups(tensors)
        run = compute if compute is not None else one_by_one
        results = run([(worth_histograms, (source, tuple(group), options)) for group in groups])
        by_name = {
            parameter.name: histogram
            for group, result in zip(groups, results, strict=True)
            for parameter, histogram in zip(group, result, strict=True)
        }
        histograms = [by_name[parameter.name] for parameter in tensors]
    return [spread_budget(tensors, options, budget, histograms) for budget in budgets]


def spread_budget(
    tensors: Sequence[Parameter], options: SelectOptions, budget: int, histograms: Sequence[Histogram]
) -> Counts:
    """Weights that every tensor keeps under a budget: int64 [tensors].

    Parameters
    ----------
    tensors : sequence of Parameter
    options : SelectOptions
        Its allocation.
    budget : int
    histograms : sequence of (bins, counts)
        For a `global` allocation: of every tensor's worth, all of its weights counted.
    """
    sizes = np.array([parameter.size for parameter in tensors])
    if options.allocation == "given":
        return given_counts(tensors, options.shares, budget)
    if options.allocation == "uniform":
        return uniform_counts(sizes, budget)
    return global_counts(histograms, budget)


def worth_histograms(
    source: Source, parameters: tuple[Parameter, ...], options: SelectOptions
) -> list[Histogram]:
    """A task: how many weights of each tensor lie in each bin of the worth."""
    found = []
    for parameter in parameters:
        view, counting = TensorView(source, parameter, options, WORTH), Counting()
        for first, last in bands(parameter.shape):
            counting.add(view.keys(view.band(first, last)))
        found.append(counting.histogram)
    return found


class Counting:
    """Counts keys by their upper 16 bits: bins that increase with the score, 128 to a factor of two."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << 16, np.int64)

    def add(self, keys: UInt32) -> None:
        """Keys of any shape."""
        _count_bins(keys.reshape(-1), self._counts)

    @property
    def histogram(self) -> Histogram:
        """Bins that hold anything."""
        bins = np.flatnonzero(self._counts)
        return bins.astype(np.uint16), self._counts[bins]


@njit(nogil=True, cache=True)
def _count_bins(keys: Any, counts: Any) -> None:
    for i in range(keys.size):
        counts[keys[i] >> np.uint32(16)] += 1
