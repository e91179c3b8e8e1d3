"""What cutting some of the tensors costs, and which shares under a budget cost least: measured, not assumed.

Tensors are put into groups by kind and depth. Losses are those of *training* samples; the held-out ones are not seen.

1. `measure`: every group alone is cut to some shares, the rest is whole: a curve of loss against share for each, from
   which `solve` predicts the best shares. Losses of groups that are cut together do not add
   up, though, so that is only where the search begins.
2. `search`: at the budget itself, one group's shares are raised or lowered, all others scaled so that the budget holds,
   and what lowers the loss stays (coordinate descent on the logarithms of the shares, with shrinking steps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.errors import InputError
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.loss import Batch, losses
from tinyonn.score.scores import score_named
from tinyonn.score.source import Source
from tinyonn.select.select import apportion
from tinyonn.store.arrays import bands

SHARES = (0.03, 0.1, 0.25, 0.5)
DEPTHS = 8  # groups of layers
STEP = 1.35  # first factor on a group's share
SHRINK = 0.6  # of the step's logarithm, after each round
ROUNDS = 3
GAIN = 1e-4  # nats that a step must win
GRID = 80  # points of an interpolated curve
QUANTILES = 1 << 16


@dataclass(frozen=True)
class Group:
    """Tensors that get one share, or whose shares rise and fall together.

    Attributes
    ----------
    name : str
        Kind and layers: ``up_proj/0-1``.
    tensors : tuple of str
    """

    name: str
    tensors: tuple[str, ...]


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


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Attributes
    ----------
    shares : dict of str to float
        By tensor.
    start, loss : float
        Nats on the samples it was searched with, before and after.
    passes : int
        Evaluations that it took.
    """

    shares: dict[str, float]
    start: float
    loss: float
    passes: int


def groups_by_depth(parameters: Sequence[Parameter], depths: int = DEPTHS) -> list[Group]:
    """Tensors of a kind in neighbouring layers, as many groups of layers as wanted (or as there are layers).

    From three on, the first and the last layer are groups of their own: they are unlike their neighbours.
    """
    layers = sorted({parameter.layer for parameter in parameters if parameter.layer is not None})
    depths = min(depths, max(len(layers), 1))
    if depths > 2:
        inner = np.array_split(layers[1:-1], depths - 2)
        parts = [layers[:1], *(part.tolist() for part in inner), layers[-1:]]
    else:
        parts = [part.tolist() for part in np.array_split(layers, depths)]
    groups = []
    for kind in dict.fromkeys(kind_of(parameter) for parameter in parameters):
        for part in parts:
            names = tuple(p.name for p in parameters if kind_of(p) == kind and p.layer in part)
            if names:
                span = f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}"
                groups.append(Group(f"{kind}/{span}", names))
    return groups


def passes_of_measuring(groups: Sequence[Group], shares: Sequence[float] = SHARES) -> int:
    """Evaluations of the samples that `measure` takes."""
    return 1 + len(groups) * len(shares)


def most_passes_of_search(groups: Sequence[Group], starts: int, rounds: int = ROUNDS) -> int:
    """Evaluations that `search` takes at most."""
    return starts + 2 * rounds * len(groups)


class Trials:
    """The model under any shares: masks of the highest scores in each tensor, and the loss with them.

    Parameters
    ----------
    dense : DenseWeights
    source : Source
    score : str
        That decides which of a tensor's weights are kept.
    batches : sequence of Batch
        Training samples.

    Notes
    -----
    Holds two bytes per weight: its rank in its tensor, in 65,536 steps.
    """

    def __init__(
        self,
        dense: DenseWeights,
        source: Source,
        score: str,
        batches: Sequence[Batch],
    ) -> None:
        self.dense, self.batches = dense, batches
        self.sizes = {parameter.name: parameter.size for parameter in dense.parameters}
        self.passes = 0
        self._ranks = {p.name: _ranks(source, p, score) for p in dense.parameters}

    def loss(self, shares: Mapping[str, float]) -> float:
        """Mean over slices, nats; tensors without a share stay whole."""
        self.passes += 1
        masks = (
            (name, self._ranks[name] < round(share * QUANTILES) - QUANTILES // 2)
            for name, share in shares.items()
            if share < 1
        )
        with self.dense.masked(masks) as model:
            return losses(model, self.batches).mean


def _ranks(source: Source, parameter: Parameter, score: str) -> torch.Tensor:
    """int16 from -32768 for the highest scores of a tensor to 32767 for the lowest, steps of equal mass."""
    of_band = score_named(score).prepare(source, parameter)
    needs = score_named(score).needs
    parts = [of_band(source.band(parameter.name, *span, needs)) for span in bands(parameter.shape)]
    values = np.concatenate([part.reshape(-1) for part in parts])
    places = np.empty(values.size, np.int16)
    order = np.argsort(-values, kind="stable")
    places[order] = np.arange(values.size, dtype=np.int64) * QUANTILES // values.size - QUANTILES // 2
    return torch.from_numpy(places.reshape(parameter.shape))


def measure(
    trials: Trials,
    groups: Sequence[Group],
    shares: Sequence[float] = SHARES,
    tick: Callable[[], None] = lambda: None,
) -> list[Curve]:
    """Loss when only one group is cut, for every group and share.

    Parameters
    ----------
    trials : Trials
    groups : sequence of Group
    shares : sequence of float
        Increasing, in (0, 1).
    tick : callable
        Called after each pass; there are `passes_of_measuring`.

    Returns
    -------
    list of Curve
        Of the groups; share 1 is the dense model.
    """
    dense = trials.loss({})
    tick()
    curves = []
    for group in groups:
        found = []
        for share in shares:
            found.append(trials.loss(dict.fromkeys(group.tensors, share)))
            tick()
        curves.append(Curve(group.tensors, (*shares, 1.0), (*found, dense)))
    return curves


def smooth(curve: Curve) -> Curve:
    """A curve on a fine grid of shares: what it adds to the dense loss falls like powers of the share between points.

    Straight pieces between few points would put every share on one of the points.
    """
    added = np.maximum(np.array(curve.losses[:-1]) - curve.losses[-1], 1e-6)
    added = np.maximum.accumulate(added[::-1])[::-1]
    if len(added) < 2:
        return curve
    x, y = np.log(curve.shares[:-1]), np.log(added)
    grid = np.linspace(x[0] - 0.5, 0, GRID)
    found = np.interp(grid, x, y)
    first, last = (y[1] - y[0]) / (x[1] - x[0]), min(-2.0, (y[-1] - y[-2]) / (x[-1] - x[-2]))
    found = np.where(grid < x[0], y[0] + first * (grid - x[0]), found)
    found = np.where(grid > x[-1], y[-1] + last * (grid - x[-1]), found)
    found = np.exp(found)
    found[-1] = 0
    return Curve(curve.tensors, tuple(np.exp(grid).tolist()), tuple((curve.losses[-1] + found).tolist()))


def predicted(curves: Sequence[Curve], sizes: Mapping[str, int], budget: float) -> dict[str, float]:
    """Shares by tensor with the least predicted loss for a share of all weights."""
    counts = solve([smooth(curve) for curve in curves], sizes, round(budget * sum(sizes.values())))
    return {name: counts[name] / sizes[name] for name in sizes}


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
        raise InputError(f"curves of losses: {problem}; measure every tensor that is cut exactly once")
    for curve in curves:
        x, y = np.array(curve.shares), np.array(curve.losses)
        good = x.size > 0 and x.size == y.size and bool(np.isfinite(y).all())
        if not good or not (x[0] > 0 and x[-1] <= 1 and bool((np.diff(x) > 0).all())):
            raise InputError(
                f"curves of losses: the curve of {curve.tensors[0]} has shares {list(curve.shares)} and losses "
                f"{list(curve.losses)}; shares must increase within (0, 1], losses be finite and as many"
            )


def scaled(shares: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> dict[str, float]:
    """Shares in the same proportions, none above 1, that keep a share of all weights."""
    total = budget * sum(sizes.values())
    low, high = 1e-9, 1e9
    for _ in range(100):
        middle = math.sqrt(low * high)
        kept = sum(min(1.0, middle * share) * sizes[name] for name, share in shares.items())
        low, high = (middle, high) if kept < total else (low, middle)
    return {name: min(1.0, high * share) for name, share in shares.items()}


def search(
    trials: Trials,
    groups: Sequence[Group],
    starts: Sequence[Mapping[str, float]],
    budget: float,
    rounds: int = ROUNDS,
    tick: Callable[[], None] = lambda: None,
) -> Found:
    """Coordinate descent from the best start.

    Parameters
    ----------
    trials : Trials
    groups : sequence of Group
    starts : sequence of mapping
        Shares by tensor, of every tensor that is cut; scaled to the budget.
    budget : float
        Share of all weights.
    rounds : int
    tick : callable
        Called after each pass; there are at most `most_passes_of_search`.
    """
    passes = trials.passes

    def loss(shares: Mapping[str, float]) -> float:
        found = trials.loss(shares)
        tick()
        return found

    tried = [scaled(start, trials.sizes, budget) for start in starts]
    found = [loss(shares) for shares in tried]
    place = int(np.argmin(found))
    best, shares = found[place], tried[place]
    step = STEP
    for _ in range(rounds):
        for group in groups:
            for factor in (step, 1 / step):
                moved = {n: share * (factor if n in group.tensors else 1.0) for n, share in shares.items()}
                moved = scaled(moved, trials.sizes, budget)
                new = loss(moved)
                if new < best - GAIN:
                    best, shares = new, moved
                    break
        step **= SHRINK
    return Found(dict(shares), found[place], best, trials.passes - passes)
