"""How many weights every tensor keeps under one budget: pure functions of sizes, histograms and measured curves.

=========== ======================================================================================================
uniform     the same share everywhere
given       shares in the given proportions, by tensor, kind and layer, or kind
global      one cut through all tensors, by a score that is comparable across them
outlier     shares that rise with a layer's share of outliers: OWL (Yin et al. 2023, https://arxiv.org/abs/2310.05175)
measured    the least predicted loss, from measured curves of loss against kept share
=========== ======================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.errors import InputError
from tinyonn.store.records import Float64

Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Curve:
    """Loss of the model when only these tensors are cut, all to the same share.

    Attributes
    ----------
    tensors : tuple of str
        Names; every tensor that is cut is in exactly one curve.
    shares : tuple of float
        Increasing, in (0, 1].
    losses : tuple of float
        As many.
    """

    tensors: tuple[str, ...]
    shares: tuple[float, ...]
    losses: tuple[float, ...]


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


def cell_counts(rest: int, balance: float, marked: Counts, there: Counts) -> Counts:
    """How many weights outside the core each cell of a tensor keeps.

    Parameters
    ----------
    rest : int
        Of all cells.
    balance : float
        How far this follows a cell's size rather than what the tensor as a whole would keep of it.
    marked, there : int64 [cells]
        What it would keep; what is outside the core.

    Returns
    -------
    int64 [cells]
    """
    wanted = (1 - balance) * marked + balance * rest * (there / max(int(there.sum()), 1))
    return apportion(rest, wanted, there)


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


def global_counts(histograms: Sequence[tuple[np.ndarray, np.ndarray]], total: int) -> Counts:
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


def outlier_counts(
    layers: Sequence[int | None], sizes: Any, outliers: Any, total: int, spread: float
) -> Counts:
    """Shares by layer that rise linearly with its share of outliers, from ``−spread`` to ``+spread`` about the mean.

    Parameters
    ----------
    layers : sequence of int or None
        Of every tensor; tensors of a layer get the same share.
    sizes, outliers : int [tensors]
        Weights, and how many of them are outliers.
    total : int
    spread : float
        λ of the paper.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    outliers = np.asarray(outliers, dtype=np.float64)
    _, layer = np.unique([-1 if number is None else number for number in layers], return_inverse=True)
    ratio = np.bincount(layer, outliers) / np.bincount(layer, sizes)
    span = ratio.max() - ratio.min()
    scaled = (ratio - ratio.min()) / span * 2 * spread if span > 0 else np.zeros(ratio.size)
    mean = float((scaled[layer] * sizes).sum() / sizes.sum())
    share = np.clip(total / sizes.sum() + scaled[layer] - mean, 1e-6, 1.0)
    return apportion(total, share * sizes, sizes)


def outliers_of(bins: np.ndarray, counts: np.ndarray, values: Float64, times: float) -> int:
    """How many weights lie above so many times the mean: bins uint16, counts, value of every bin float64 [65536]."""
    held = values[bins]
    mean = float(held @ counts) / int(counts.sum())
    return int(counts[held > times * mean].sum())


def solve(curves: Sequence[Curve], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Counts with the least predicted loss: the sum over curves of each one's lower convex hull at its tensors' share.

    On convex curves the best use of every further weight is where the loss falls most, so that taking the hulls' pieces
    from the steepest on is optimal; the last piece is cut to the total. Tensors of a curve get one share, and none less
    than its first, below which nothing was measured; if the total is below all these, they are scaled down to it.

    Parameters
    ----------
    curves : sequence of Curve
    sizes : mapping of str to int
        Of every tensor that is cut.
    total : int

    Returns
    -------
    dict of str to int
        Weights to keep by tensor, with this sum.

    Raises
    ------
    InputError
        Curves that miss a tensor, hold one twice or one unknown, or are no curves.
    """
    _check_curves(curves, sizes)
    group_sizes = np.array([sum(sizes[name] for name in curve.tensors) for curve in curves], np.int64)
    exact = np.array([curve.shares[0] for curve in curves]) * group_sizes
    left = total - exact.sum()
    pieces = []  # (fall of loss per weight, curve, weights)
    for number, curve in enumerate(curves):
        shares, losses = hull(curve)
        for i in range(len(shares) - 1):
            weights = (shares[i + 1] - shares[i]) * float(group_sizes[number])
            pieces.append(((losses[i] - losses[i + 1]) / weights, number, weights))
    for _, number, weights in sorted(pieces, key=lambda piece: -piece[0]):
        taken = max(min(weights, left), 0.0)
        exact[number] += taken
        left -= taken
    counts = apportion(total, exact, group_sizes)
    out: dict[str, int] = {}
    for curve, count in zip(curves, counts, strict=True):
        its = [sizes[name] for name in curve.tensors]
        out.update(zip(curve.tensors, apportion(int(count), its, its).tolist(), strict=True))
    return out


def hull(curve: Curve) -> tuple[list[float], list[float]]:
    """The curve's lower convex hull, never rising, from its first share to 1: shares and losses."""
    shares, losses = list(curve.shares), list(np.minimum.accumulate(curve.losses))
    if shares[-1] < 1:
        shares, losses = [*shares, 1.0], [*losses, losses[-1]]
    kept: list[int] = []
    for i in range(len(shares)):
        while len(kept) > 1 and _above(shares, losses, kept[-2], kept[-1], i):
            kept.pop()
        kept.append(i)
    return [float(shares[i]) for i in kept], [float(losses[i]) for i in kept]


def _above(x: Sequence[float], y: Sequence[float], a: int, b: int, c: int) -> bool:
    """Whether point b lies on or above the line from a to c."""
    return (y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a])


def _check_curves(curves: Sequence[Curve], sizes: Mapping[str, int]) -> None:
    names = [name for curve in curves for name in curve.tensors]
    wrong = next((name for name in names if name not in sizes or names.count(name) > 1), None)
    missing = next((name for name in sizes if name not in names), None)
    if wrong is not None or missing is not None:
        problem = f"{missing} is in no curve" if wrong is None else f"{wrong} is not cut, or in two curves"
        raise InputError(f"measured allocation: {problem}; measure every tensor that is cut exactly once")
    for curve in curves:
        x, y = np.array(curve.shares), np.array(curve.losses)
        good = x.size > 0 and x.size == y.size and bool(np.isfinite(y).all())
        if not good or not (x[0] > 0 and x[-1] <= 1 and bool((np.diff(x) > 0).all())):
            raise InputError(
                f"measured allocation: the curve of {curve.tensors[0]} has shares {list(curve.shares)} and losses "
                f"{list(curve.losses)}; shares must increase within (0, 1], losses be finite and as many"
            )
