"""The 16-bit record of one weight, and the codebooks that make its INT4 codes readable.

A record is ``act << 12 | grad << 8 | freq << 4 | score``. A code ``k`` of a statistic stands for the mean
``codebook[k]``: a mean level in [0, 15] for ``act`` and ``grad``, a share of samples in [0, 1] for ``freq``. Every
array has codebooks of its own: a segment's are fitted to its means, a merged segment's are the weighted mean of its
parts' (entry by entry: an average of quantiles).

A mean ``v`` between two entries ``c_k <= v <= c_{k+1}`` has the *position* ``256 k + 256 (v - c_k) / (c_{k+1} - c_k)``,
an 8.8 fixed-point number. Dithering adds a uniform 8-bit number and keeps the integer part, so that the
expected code is the position: averaging many segments averages the rounding away. The dither of a weight
is a hash of (seed, segment, tensor, index), so that a segment always rounds the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from tinyonn.store.manifest import Segment

STATISTICS = ("act", "grad", "freq")
SHIFTS = {"act": 12, "grad": 8, "freq": 4, "score": 0}
CODES = 16
POSITION_STEPS = 256
SMALLEST_STEP = 1 / 4096  # between two entries of a codebook
END_ENTRIES = 5  # of a codebook, at most, for a value that holds much of the mass
CELLS = 64  # of equal mass, from which a codebook's density is taken
VALUE_STEPS = 32768  # far finer than the narrowest gap between two entries

UInt8 = np.ndarray[Any, np.dtype[np.uint8]]
UInt16 = np.ndarray[Any, np.dtype[np.uint16]]
Float64 = np.ndarray[Any, np.dtype[np.float64]]
MEAN_BINS = 4096


def unpack(records: UInt16) -> tuple[UInt8, UInt8, UInt8, UInt8]:
    """Split records into their four INT4 codes.

    Parameters
    ----------
    records : uint16 array, any shape

    Returns
    -------
    act, grad, freq, score : uint8 arrays of the same shape, values 0..15
    """
    values = np.asarray(records, dtype=np.uint16)
    fields = (((values >> SHIFTS[name]) & 15).astype(np.uint8) for name in ("act", "grad", "freq", "score"))
    act, grad, freq, score = fields
    return act, grad, freq, score


def pack(act: UInt8, grad: UInt8, freq: UInt8, score: UInt8 | int = 0) -> UInt16:
    """Put four INT4 codes (uint8, 0..15, same shape) into uint16 records."""
    fields = (np.asarray(field, dtype=np.uint16) for field in (act, grad, freq, score))
    a, g, f, s = fields
    return (a << 12 | g << 8 | f << 4 | s).astype(np.uint16)


@dataclass(frozen=True)
class TensorCalibration:
    """What one tensor's levels mean; frozen for the whole run.

    Attributes
    ----------
    act_base, grad_base : int
        Subtracted from ``float32 bits >> 22`` to give the level; level 7 is the calibration's median.
    freq_threshold : int
        ``freq`` counts the samples with ``act`` above ``2 ** (freq_threshold / 8)``, the calibrated median.
    """

    act_base: int
    grad_base: int
    freq_threshold: int


def codebook_of(
    values: Float64,
    counts: Float64,
    floor_step: float = SMALLEST_STEP,
    share: bool = False,
    final: bool = False,
) -> Float64:
    """Choose 16 entries for means.

    The density of entries follows the root of the density of means: what is averaged again wants small errors
    everywhere, and entries of equal mass would be too far apart at the ends. A value that holds several entries'
    mass alone (weights that no sample touched, with a mean of exactly 0; shares of exactly 1) will spread once
    segments are averaged, so its entries halve the way to it: 0, s/8, s/4, s/2 below the smallest other mean s.
    A result that is not averaged again wants entries of equal mass, which keep the order of the weights best.

    Parameters
    ----------
    values : float64 [n], increasing
        Distinct means.
    counts : float64 [n]
        How many weights have each.
    floor_step : float
        Smallest distance between entries that are added to make up 16.
    share : bool
        Whether the values are shares, so that 1 is an end as 0 is.
    final : bool
        Whether the codes are not averaged again.

    Returns
    -------
    float64 [16], strictly increasing
    """
    total = float(counts.sum())
    if total <= 0 or values.size == 0:
        raise ValueError("a codebook needs at least one value")
    low = _towards(0.0, values, counts, total)
    high = (
        [1.0 - entry for entry in _towards(0.0, 1.0 - values[::-1], counts[::-1], total)][::-1]
        if share
        else []
    )
    inner = slice(1 if low else 0, values.size - 1 if high else values.size)
    middle = _companded(values[inner], counts[inner], CODES - len(low) - len(high), final)
    entries = sorted({*low, *middle, *high})
    while len(entries) < CODES:
        gaps = np.diff(entries)
        widest = int(np.argmax(gaps)) if len(gaps) and float(gaps.max()) > 2 * floor_step else -1
        if widest < 0:
            entries.append(entries[-1] + floor_step)
        else:
            entries.insert(widest + 1, (entries[widest] + entries[widest + 1]) / 2)
    return np.array(entries, dtype=np.float64)


def _towards(end: float, values: Float64, counts: Float64, total: float) -> list[float]:
    """Entries from an end that holds several entries' mass to just short of the next value."""
    number = min(int(counts[0] / total * CODES), END_ENTRIES)
    if values[0] != end or number < 2 or values.size < 2:
        return []
    step = float(values[1])
    return [end, *(end + step * 0.5**k for k in range(number - 1, 0, -1))]


def _companded(values: Float64, counts: Float64, entries: int, final: bool) -> list[float]:
    """Quantiles under the density or its root, from cells of equal mass."""
    if values.size <= entries:
        return [float(value) for value in values]
    below = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    ends = np.concatenate([values[:1], values])
    if final:
        return [float(entry) for entry in np.interp((np.arange(entries) + 0.5) / entries, below, ends)]
    cells = np.interp(np.linspace(0, 1, CELLS + 1), below, ends)
    widths = np.diff(cells)
    widths = np.maximum(widths, widths[widths > 0].min())
    cumulated = np.concatenate([[0.0], np.cumsum(np.sqrt(widths))])
    chosen = np.interp(np.linspace(0, cumulated[-1], entries), cumulated, cells)
    return [float(entry) for entry in chosen]


def averaged_codebooks(codebooks: Sequence[Float64], weights: Float64) -> Float64:
    """Codebooks of an average: the weighted mean of its parts', float64 [3, 16]; `weights` sum to 1."""
    return np.asarray(np.tensordot(weights, np.stack(codebooks), 1))


def positions(values: Float64, codebook: Float64) -> UInt16:
    """8.8 fixed-point position of each mean between the codebook's entries, clipped to its ends.

    Parameters
    ----------
    values : float64, any shape
    codebook : float64 [16], strictly increasing

    Returns
    -------
    uint16, same shape, 0..3840
    """
    steps = np.arange(CODES, dtype=np.float64) * POSITION_STEPS
    return np.round(np.interp(values, codebook, steps)).astype(np.uint16)


def dither_seed(seed: int, segment: str, tensor: str) -> int:
    """64-bit seed of the dithering of one tensor of one segment (BLAKE2b of the three)."""
    text = f"{seed}\0{segment}\0{tensor}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@njit(inline="always")
def dither_bits(seed: np.uint64, index: np.uint64) -> np.uint64:
    """64 uniform bits for one weight: the SplitMix64 finaliser (Steele, Lea & Flood, OOPSLA 2014)."""
    z = seed + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(nogil=True, cache=True)
def round_positions(
    act: UInt16, grad: UInt16, freq: UInt16, seed: np.uint64, offset: np.uint64, out: UInt16
) -> None:
    """Dither three flat arrays of positions into records; ``offset`` is the flat index of the first weight."""
    for i in range(out.size):
        bits = dither_bits(seed, offset + np.uint64(i))
        a = (np.uint64(act[i]) + (bits & np.uint64(255))) >> np.uint64(8)
        g = (np.uint64(grad[i]) + ((bits >> np.uint64(8)) & np.uint64(255))) >> np.uint64(8)
        f = (np.uint64(freq[i]) + ((bits >> np.uint64(16)) & np.uint64(255))) >> np.uint64(8)
        out[i] = np.uint16((a << np.uint64(12)) | (g << np.uint64(8)) | (f << np.uint64(4)))


def value_tables(codebooks: Float64) -> tuple[UInt16, Float64, Float64]:
    """Tables that turn an averaged mean into its position without a search.

    Parameters
    ----------
    codebooks : float64 [3, 16]

    Returns
    -------
    tables : uint16 [3, 32768]
        Position of ``first + (i + 0.5) / scale``.
    first, scale : float64 [3]
        Index of a mean ``v`` is ``(v - first) * scale``.
    """
    first = codebooks[:, 0].copy()
    scale = VALUE_STEPS / (codebooks[:, -1] - first)
    centres = (np.arange(VALUE_STEPS) + 0.5)[None, :] / scale[:, None] + first[:, None]
    tables = np.stack([positions(centres[s], codebooks[s]) for s in range(3)])
    return tables, first, scale


@njit(nogil=True, cache=True)
def average_records(
    parts: tuple[UInt16, ...],
    values: Float64,
    tables: tuple[UInt16, Float64, Float64],
    seed: np.uint64,
    offset: np.uint64,
    nearest: bool,
    out: UInt16,
) -> None:
    """Average flat records of several segments into one, weight by weight.

    Parameters
    ----------
    parts : tuple of uint16 [n], C-contiguous
        Records of the same weights, one array per segment, in a fixed order.
    values : float64 [len(parts), 3, 16]
        Each part's codebooks times its share of the samples; the shares sum to 1.
    tables : tuple
        From `value_tables` of the result's codebooks.
    seed, offset : uint64
        Dither seed of the result, flat index of the first weight.
    nearest : bool
        Round to the nearest code instead of dithering: for a result that is not averaged again.
    out : uint16 [n]
    """
    positions_of, first, scale = tables
    for i in range(out.size):
        bits = dither_bits(seed, offset + np.uint64(i))
        record = np.uint64(0)
        for s in range(3):
            shift = np.uint64(12 - 4 * s)
            mean = 0.0
            for p in range(len(parts)):
                mean += values[p, s, (np.uint64(parts[p][i]) >> shift) & np.uint64(15)]
            index = min(max(int((mean - first[s]) * scale[s]), 0), VALUE_STEPS - 1)
            noise = np.uint64(128) if nearest else (bits >> np.uint64(8 * s)) & np.uint64(255)
            code = (np.uint64(positions_of[s, index]) + noise) >> np.uint64(8)
            record |= code << shift
        out[i] = np.uint16(record)


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
