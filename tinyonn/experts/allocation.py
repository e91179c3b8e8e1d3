"""How many weights every tensor keeps under one budget: pure functions of sizes and histograms.

=========== ======================================================================================================
uniform     the same share everywhere
given       shares in the given proportions, by tensor, kind and layer, or kind
global      one cut through all tensors, by a score that is comparable across them
=========== ======================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.errors import InputError
from tinyonn.store.records import Float64

Counts = np.ndarray[Any, np.dtype[np.int64]]


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
