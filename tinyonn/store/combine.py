"""All live segments into one record per weight: averaged over the slices, with codebooks of equal mass.

Two steps over the same parts: `count_means` fills a histogram of each statistic's means, from which `final_codebooks`
takes the codebooks; `tinyonn.store.records.average_records` then rounds every mean to the nearest code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from tinyonn.store.manifest import Segment
from tinyonn.store.records import Float64, UInt16, codebook_of

MEAN_BINS = 4096


def shares(segments: Sequence[Segment]) -> Float64:
    """Each segment's share of the samples, float64 [segments]."""
    counts = np.array([segment.samples for segment in segments], dtype=np.float64)
    return np.asarray(counts / counts.sum())


def weighted_values(codebooks: Sequence[Float64], weights: Float64) -> Float64:
    """What each code of each part adds to a mean: float64 [parts, 3, 16]."""
    return np.asarray(np.stack(codebooks) * weights[:, None, None])


@njit(nogil=True, cache=True)
def count_means(parts: UInt16, values: Float64, counts: Any) -> None:
    """Add the histogram of the means of flat records.

    Parameters
    ----------
    parts : uint16 [parts, n]
        Records of the same weights, a row per segment.
    values : float64 [parts, 3, 16]
        From `weighted_values`.
    counts : int64 [3, 4096], changed in place
        Bins of equal width from the smallest to the largest possible mean.
    """
    first = np.zeros(3)
    scale = np.zeros(3)
    for s in range(3):
        span = 0.0
        for p in range(parts.shape[0]):
            first[s] += values[p, s, 0]
            span += values[p, s, 15] - values[p, s, 0]
        scale[s] = (MEAN_BINS - 1) / span
    for i in range(parts.shape[1]):
        for s in range(3):
            mean = 0.0
            for p in range(parts.shape[0]):
                mean += values[p, s, (np.uint64(parts[p, i]) >> np.uint64(12 - 4 * s)) & np.uint64(15)]
            counts[s, min(max(int((mean - first[s]) * scale[s] + 0.5), 0), MEAN_BINS - 1)] += 1


def final_codebooks(counts: np.ndarray, values: Float64) -> Float64:
    """Codebooks of equal mass for counted means: float64 [3, 16].

    Parameters
    ----------
    counts : int64 [3, 4096]
        From `count_means` with the same `values`.
    values : float64 [parts, 3, 16]
    """
    lowest, highest = values[:, :, 0].sum(0), values[:, :, -1].sum(0)
    books = []
    for s in range(3):
        bins = np.flatnonzero(counts[s])
        means = lowest[s] + bins * ((highest[s] - lowest[s]) / (MEAN_BINS - 1))
        books.append(codebook_of(means, counts[s][bins].astype(np.float64), share=s == 2, final=True))
    return np.stack(books)
