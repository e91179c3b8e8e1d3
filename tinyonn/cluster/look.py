"""A look at some weights of every tensor, and what follows for all: how needs are told, what the centres are of.

Data flow: tasks read a few bands of each tensor (`look_at`) → counts by bin of every slice's need, of the worth that
spreads a budget, and of the score; some weights are drawn → in one process the allocation under several budgets
(`curves_of`), a table from bins to coordinates for each tensor (`tables_of`), and the coordinates of those drawn
weights that an expert would hold (`points_of`).

Shape suffixes: ``S`` slices, ``F`` features, ``N`` weights, ``T`` tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numba import njit

from tinyonn.cluster.features import Space, TensorBins
from tinyonn.cluster.needs import BINS, Counts, Curves, Float32, NeedData, need_table
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.select.cuts import TensorView
from tinyonn.select.select import WORTH, Counting, Histogram, apportion, groups_bytes, spread_budget
from tinyonn.select.selection import SelectOptions
from tinyonn.store.arrays import band_rows, bands, spread
from tinyonn.store.records import UInt16, dither_bits, dither_seed

LOOKED_AT_BANDS = 2  # of a tensor, evenly spread: at most 8 million weights
LEVELS = (0.6, 0.3, 0.1, 0.03)  # of the budget, at which the allocation is asked
DRAWN = 1 << 18  # weights of all tensors together
POINTS = 1 << 16  # of these, that the centres are found from

Shares = Mapping[float, Mapping[str, float]]  # by budget, by tensor


@dataclass(frozen=True)
class LookData:
    """What a look is made of; sent to the workers.

    Attributes
    ----------
    needs : NeedData
    space : Space
    selection : SelectOptions
    share : float
        Of the weights looked at in a tensor that is read whole, how many are drawn; of others more.
    seed : int
        Of the draw.
    """

    needs: NeedData
    space: Space
    selection: SelectOptions
    share: float
    seed: int


@dataclass(frozen=True, eq=False)
class Look:
    """What is seen of a tensor.

    Attributes
    ----------
    counts_SB : int32 [S, bins]
        Weights looked at, by bin of each slice's need.
    worth, score : (bins, counts)
        The same by worth (of a `global` allocation) and by score.
    drawn_FN : uint16 [F, N]
        Bins of those drawn.
    score_N : uint16 [N]
        Upper 16 bits of their score's key.
    at_N : int64 [N]
        Their places in the tensor, flat.
    """

    counts_SB: np.ndarray
    worth: Histogram | None
    score: Histogram
    drawn_FN: UInt16
    score_N: UInt16
    at_N: Counts


def look_at(data: LookData, parameters: tuple[Parameter, ...]) -> list[Look]:
    """A task: a look at some tensors."""
    return [_look(data, parameter) for parameter in parameters]


def looked_at(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Bands of rows of a tensor that are looked at."""
    return spread(list(bands(shape)), LOOKED_AT_BANDS)


def _look(data: LookData, parameter: Parameter) -> Look:
    source, slices = data.needs.source, len(data.space.slices)
    tensor = TensorBins(data.needs, data.space, parameter)
    ranked = TensorView(source, parameter, data.selection)
    valued = (
        TensorView(source, parameter, data.selection, WORTH)
        if data.selection.allocation == "global"
        else None
    )
    reads = data.space.reads | ranked.needs | (valued.needs if valued else set())
    counts_SB = np.zeros((slices, BINS), np.int32)
    worth, score = Counting(), Counting()
    spans = looked_at(parameter.shape)
    seen = sum(last - first for first, last in spans) / parameter.shape[0]
    limit = np.uint64(min(2**32 - 1, int(data.share / seen * 2**32)))
    seed = np.uint64(dither_seed(data.seed, "need", parameter.name))
    drawn, scores, places = [], [], []
    for first, last in spans:
        band = source.band(parameter.name, first, last, reads)
        bins_FN = tensor.of(band).reshape(data.space.own, -1)
        for bins_N, its in zip(bins_FN[:slices], counts_SB, strict=True):
            _count(bins_N, its)
        keys_N = ranked.keys(band).reshape(-1)
        score.add(keys_N)
        if valued:
            worth.add(valued.keys(band))
        begin = first * prod(parameter.shape[1:])
        chosen_N = np.empty(keys_N.size, np.bool_)
        _draw(np.uint64(begin), seed, limit, chosen_N)
        drawn.append(bins_FN[:, chosen_N])
        scores.append((keys_N[chosen_N] >> np.uint32(16)).astype(np.uint16))
        places.append(begin + np.flatnonzero(chosen_N))
    return Look(
        counts_SB,
        worth.histogram if valued else None,
        score.histogram,
        np.concatenate(drawn, axis=1),
        np.concatenate(scores),
        np.concatenate(places),
    )


def share_drawn(parameters: Sequence[Parameter]) -> float:
    """Of all weights, so that `DRAWN` come together."""
    return min(1.0, DRAWN / sum(parameter.size for parameter in parameters))


def curves_of(
    looks: Sequence[Look],
    parameters: Sequence[Parameter],
    options: SelectOptions,
    total: int,
    searched: Shares,
) -> Curves:
    """The allocation of a budget, and of what was searched or what lies below.

    Parameters
    ----------
    looks : sequence of Look
        Of every tensor.
    parameters : sequence of Parameter
        Those outside the trunk.
    options : SelectOptions
    total : int
        The budget in weights.
    searched : mapping of float to mapping
        Budget to shares by tensor that were found for it; those below the budget count.
    """
    sizes = np.array([parameter.size for parameter in parameters])
    weights = int(sizes.sum())
    points: dict[int, np.ndarray] = {}
    worths = [
        (look.worth[0], apportion(size, look.worth[1], np.full(look.worth[1].size, size)))
        for look, size in zip(looks, sizes.tolist(), strict=True)
        if look.worth is not None
    ]

    def add(asked: SelectOptions, budgets: list[int]) -> None:
        for budget in budgets:
            if budget >= sizes.size:
                points[budget] = spread_budget(parameters, asked, budget, worths)

    found = {
        round(budget * weights) if budget <= 1 else int(budget): shares for budget, shares in searched.items()
    }
    found = {budget: shares for budget, shares in found.items() if budget < total}
    for budget, shares in found.items():
        asked = replace(options, allocation="given", shares=dict(shares))
        below = [round(budget * level) for level in LEVELS if level < 0.5 and budget == min(found)]
        add(asked, [budget, *below])
    add(options, [total, *(round(total * level) for level in LEVELS if not found)])
    budgets = sorted(points)
    shares_LT = np.stack([points[budget] / sizes for budget in budgets])
    return Curves(np.array(budgets) / weights, shares_LT, total / weights)


def tables_of(looks: Sequence[Look], curves: Curves, space: Space) -> list[Float32]:
    """From bins to coordinates: float32 [F, bins] for each tensor."""
    return [space.table(need_table(look.counts_SB, curves, number)) for number, look in enumerate(looks)]


def coordinates(look: Look, table_FB: Float32, place_A: Float32, which: np.ndarray) -> Float32:
    """Of some of a tensor's drawn weights: float32 [N, F + A]."""
    bins_FN = look.drawn_FN[:, which].astype(np.int64)
    own_NF = np.take_along_axis(table_FB, bins_FN, axis=1).T
    return np.concatenate([own_NF, np.tile(place_A, (len(own_NF), 1))], axis=1).astype(np.float32)


def points_of(
    looks: Sequence[Look],
    tables: Sequence[Float32],
    parameters: Sequence[Parameter],
    space: Space,
    curves: Curves,
    core: float,
) -> Float32:
    """Coordinates of the drawn weights that an expert would hold: kept under the budget, and not in the core.

    Parameters
    ----------
    core : float
        Share of the budget.

    Returns
    -------
    float32 [N, axes]
        At most `POINTS`.

    Raises
    ------
    InputError
        All that is kept is in the core.
    """
    kept_T = curves.shares_LT[-1]
    core_T = _core_shares(kept_T, core, curves)
    points = []
    for number, (look, parameter) in enumerate(zip(looks, parameters, strict=True)):
        least, most = (_bin_at(look.score, share) for share in (kept_T[number], core_T[number]))
        which = np.flatnonzero((look.score_N >= least) & (look.score_N < most))
        points.append(coordinates(look, tables[number], space.place(parameter), which))
    points_NA = np.concatenate(points)
    if not len(points_NA):
        raise InputError(f"experts.core = {core:g} leaves nothing for experts; give a smaller core")
    return points_NA[np.unique(np.linspace(0, len(points_NA) - 1, POINTS).astype(np.int64))]


def _core_shares(kept_T: Any, core: float, curves: Curves) -> Any:
    """What of every tensor is core, float [T]: what it keeps under a budget of the core's size."""
    budget = core * curves.budget
    if budget <= curves.budgets_L[0]:
        return curves.shares_LT[0] * budget / curves.budgets_L[0]
    logs_LT = np.log(np.maximum(curves.shares_LT, 1e-9))
    at = np.log(budget), np.log(curves.budgets_L)
    return np.minimum(np.exp([np.interp(*at, logs_L) for logs_L in logs_LT.T]), kept_T)


def _bin_at(histogram: Histogram, share: float) -> int:
    """The bin that a share of the weights reaches; above all where it is 0."""
    bins, counts = histogram
    wanted = share * counts.sum()
    if wanted < 0.5:
        return 1 << 16
    reaching = np.cumsum(counts[::-1])[::-1]
    return int(bins[np.flatnonzero(reaching >= wanted - 0.5)[-1]])


def look_bytes(shape: tuple[int, ...], space: Space) -> int:
    """Memory of a task that looks at a tensor: a band's weights, records, scores, levels and bins; the counts of all
    bins.
    """
    band = band_rows(shape) * prod(shape[1:])
    parameter = Parameter("", shape, None, "linear")
    return (
        groups_bytes(parameter)
        + band * (4 + 2 + 2 * space.own + 1)
        + len(space.slices) * BINS * 4
        + (2 << 19)
    )


@njit(nogil=True, cache=True)
def _count(bins_N: Any, counts: Any) -> None:
    for i in range(bins_N.size):
        counts[bins_N[i]] += 1


@njit(nogil=True, cache=True)
def _draw(first: Any, seed: Any, limit: Any, out_N: Any) -> None:
    for i in range(out_N.size):
        out_N[i] = (dither_bits(seed, first + np.uint64(i)) & np.uint64(0xFFFFFFFF)) <= limit
