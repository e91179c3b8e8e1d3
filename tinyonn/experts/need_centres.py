"""Centres of experts by need: k-means whose clusters are evened out.

Shape suffixes: ``N`` weights of the sample, ``S`` slices, ``K`` experts.
"""

from __future__ import annotations

import numpy as np

from tinyonn.errors import InputError
from tinyonn.experts.need_passes import Float32

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
