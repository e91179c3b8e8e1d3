"""The centres of the cells: k-means of about equal sizes over a sample, and the numbers that cells keep.

Shape suffixes: ``N`` points, ``K`` cells, ``A`` axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyonn.cluster.needs import Float32
from tinyonn.store.records import Float64

ROUNDS = 30  # of k-means, at most
EVENING = 60  # rounds in which its clusters become of about equal sizes
NEEDS = "need "  # before the slice's name in an axis's


@dataclass(frozen=True, eq=False)
class Centres:
    """Where the cells lie: a weight is in the cell of the least squared distance plus handicap.

    Attributes
    ----------
    means_KA : float32 [K, A]
    handicaps_K : float32 [K]
    cost : float
        Of even sizes: mean squared distance of the sample's points to their centres, over that of plain k-means.
    """

    means_KA: Float32
    handicaps_K: Float32
    cost: float

    def numbered(self, numbers: np.ndarray) -> Centres:
        """With cell k renamed to ``numbers[k]``."""
        order = np.argsort(numbers)
        return Centres(self.means_KA[order], self.handicaps_K[order], self.cost)


def find_centres(
    points_NA: Float32, cells: int, seed: int, even: bool = True, start_KA: Float32 | None = None
) -> Centres:
    """k-means, then clusters of about equal sizes; the same bits whatever the threads.

    A point belongs to the centre of the least squared distance plus the centre's handicap, which grows where a cluster
    is too large: a power diagram, whose handicaps are the duals of the transport to equal masses (Aurenhammer et al.
    1998). Points that are equal stay together, so clusters of them may be larger.

    Parameters
    ----------
    points_NA : float32 [N, A]
        At least one.
    cells : int
    seed : int
    even : bool
        Even sizes out.
    start_KA : float32 [K, A], optional
        Centres to begin with; by default k-means++. With fewer distinct points than cells it counts for nothing.

    Returns
    -------
    Centres
        Without a start, lowest coordinates first: what is needed most by all; fewer than asked for if the points are
        fewer.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    rows = np.ascontiguousarray(points_NA, dtype=np.float32)
    distinct = len(np.unique(rows.view(f"V{rows.itemsize * rows.shape[1]}")))
    start: Any = start_KA if start_KA is not None and distinct >= cells else "k-means++"
    with threadpool_limits(1):
        kmeans = KMeans(min(cells, distinct), init=start, n_init=1, max_iter=ROUNDS, random_state=seed)
        means_KA = kmeans.fit(rows).cluster_centers_
        plain = float(kmeans.inertia_)
        handicaps_K, cost = np.zeros(len(means_KA), np.float32), 1.0
        if even:
            handicaps_K = _even_out(rows, means_KA)
            cost = _spread(rows, means_KA, handicaps_K) / plain if plain > 0 else 1.0
    order = np.arange(len(means_KA))
    if isinstance(start, str):
        order = np.lexsort((order, means_KA.mean(1)))
    return Centres(
        np.ascontiguousarray(means_KA[order], dtype=np.float32),
        np.ascontiguousarray(handicaps_K[order], dtype=np.float32),
        cost,
    )


def _even_out(points_NA: Float32, means_KA: Float32) -> Float32:
    """Handicaps of about equal sizes; moves the centres, too."""
    cells, points = len(means_KA), len(points_NA)
    handicaps_K = np.zeros(cells, np.float32)
    step = float(points_NA.var(0).sum()) / 20
    for turn in range(EVENING):
        label_N = _nearest(points_NA, means_KA, handicaps_K)
        counts_K = np.bincount(label_N, minlength=cells)
        crowd_K = np.log(np.maximum(counts_K * cells / points, 0.02))
        handicaps_K += np.float32(step * (1 - turn / EVENING)) * np.clip(crowd_K, -2, 2).astype(np.float32)
        if turn < 0.7 * EVENING:
            sums_KA = np.stack([np.bincount(label_N, x_N, cells) for x_N in points_NA.T], axis=1)
            filled_K = counts_K > 0
            means_KA[filled_K] = sums_KA[filled_K] / counts_K[filled_K, None]
    return handicaps_K


def _nearest(points_NA: Float32, means_KA: Float32, handicaps_K: Float32) -> np.ndarray:
    away_NK = np.square(means_KA).sum(1) + handicaps_K - 2 * points_NA @ means_KA.T
    return np.asarray(away_NK.argmin(1))


def _spread(points_NA: Float32, means_KA: Float32, handicaps_K: Float32) -> float:
    """Sum of the squared distances."""
    away_NA = points_NA - means_KA[_nearest(points_NA, means_KA, handicaps_K)]
    return float(np.square(away_NA.astype(np.float64)).sum())


def stored_means(stored: dict[str, Any], names: Sequence[str], cells: int) -> Float32 | None:
    """Means of an earlier clustering on today's axes, float32 [K, A]; None if it had another number of cells.

    Axes are matched by name. On one that is new a cell lies where it does on the others of its kind: the need of a new
    slice is the mean of the others', anything else 0.
    """
    means_KA = np.asarray(stored["means"], dtype=np.float64)
    if len(means_KA) != cells:
        return None
    old = {name: number for number, name in enumerate(stored["axes"])}
    needs = [number for name, number in old.items() if name.startswith(NEEDS)]
    out_KA = np.zeros((cells, len(names)), np.float32)
    for axis, name in enumerate(names):
        if name in old:
            out_KA[:, axis] = means_KA[:, old[name]]
        elif name.startswith(NEEDS):
            out_KA[:, axis] = means_KA[:, needs].mean(1)
    return out_KA


def match_numbers(means_KA: Float32 | Float64, old_KA: Float32 | Float64) -> np.ndarray:
    """The old number for every new cell, so that the centres' squared distances sum to the least (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    cost_KK = np.square(means_KA[:, None].astype(np.float64) - old_KA[None]).sum(2)
    new, numbers = linear_sum_assignment(cost_KK)
    out = np.empty(len(means_KA), np.int64)
    out[new] = numbers
    return out
