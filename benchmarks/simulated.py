"""Simulated levels of one tensor: what a recorder would sum up, without a model.

``act`` follows the weight's size and its column's input, ``grad`` its row, its column and chance, both with a
spread over samples; ``freq`` is the share of samples with ``act`` above the tensor's median.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tinyonn.store.records import UInt16, codebook_of, positions, round_positions

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Float64 = np.ndarray[Any, np.dtype[np.float64]]


def sample_values(rows: int, columns: int, samples: int, seed: int) -> Iterator[Float32]:
    """Log2 values in half octaves, one sample at a time, float32 [2, rows, columns]: act, grad."""
    rng = np.random.default_rng(seed)
    size = 2 * np.log2(np.abs(rng.standard_normal((rows, columns))) + 1e-6)
    column, row = rng.normal(0, 2.0, columns), rng.normal(0, 2.0, rows)
    for _ in range(samples):
        act = size + column + rng.normal(0, 1.5, columns)
        grad = 0.7 * column + row[:, None] + rng.normal(0, 1.0, columns) + rng.normal(0, 3.0, (rows, columns))
        yield np.stack([act, grad]).astype(np.float32)


def segment_means(
    rows: int, columns: int, segments: int, samples: int, seed: int = 0
) -> tuple[Float64, Float64]:
    """Mean levels and freq of each segment, and the means over all samples before levels are clipped.

    Returns
    -------
    means : float64 [segments, 3, rows, columns]
    exact : float64 [3, rows, columns]
    """
    means = np.zeros((segments, 3, rows, columns))
    exact = np.zeros((3, rows, columns))
    base: Any = None
    for index, value in enumerate(sample_values(rows, columns, segments * samples, seed)):
        if base is None:
            base = np.median(value, axis=(1, 2), keepdims=True)
        level = np.clip(np.floor(value - base + 7.5), 0, 15)
        above = value[0] > base[0]
        means[index // samples] += np.stack([level[0], level[1], above]) / samples
        exact += np.stack([value[0], value[1], above]) / (segments * samples)
    return means, exact


def codebooks_of(means: Float64) -> Float64:
    """Codebooks of one segment's means: float64 [3, 16]."""
    books = []
    for s in range(3):
        values, counts = np.unique(means[s], return_counts=True)
        books.append(codebook_of(values, counts.astype(float), share=s == 2))
    return np.stack(books)


def encode(means: Float64, codebooks: Float64, seed: int) -> UInt16:
    """Dithered records of one segment's means: uint16 [rows * columns]."""
    act, grad, freq = (positions(means[s].ravel(), codebooks[s]) for s in range(3))
    out = np.empty(act.size, np.uint16)
    round_positions(act, grad, freq, np.uint64(seed), np.uint64(0), out)
    return out
