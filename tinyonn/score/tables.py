"""From a look at some of a tensor's weights to tables that merge and compare all of them with one gather per segment.

What the records say of a weight is, with mean levels ``m`` of act and grad (two to the octave) and the share of
samples f, averaged over segments by samples,

    R = a m_act / 2 + b m_grad / 2 + c f

which is S = a log2 rms + b log2 g + c f + d log2 |W| but for (d - a) log2 |W| and a constant of the tensor. The
*affinity* of a weight compares the slices, to which |W| is the same: ``R_p`` is the same sum on the means of slice p
alone, standardised within that slice; the dominant slice has the highest ``R_p``, and the selectivity is the distance
from there to the mean of the others, in steps of a quarter of a standard deviation, up to 15:

    affinity = dominant slice << 4 | selectivity

Everything that a segment adds is packed in one 64-bit entry per 12-bit code: three 16-bit shares of the merged
means and a 16-bit share of its slice's ``R_p``. Integer sums make the result independent of order and machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from tinyonn.store.records import (
    CODES,
    MEAN_BINS,
    STATISTICS,
    Float64,
    UInt8,
    UInt16,
    count_means,
    final_codebooks,
    weighted_values,
)

TRIPLES = 4096  # codes of (act, grad, freq)
UNITS = 1 << 16  # of a packed share
SUM_SHIFT = 4  # sums of shares are cut to 12 bits before their code is looked up
SUMS = UNITS >> SUM_SHIFT
BLOCK = 2048  # weights at a time, which stay in the first cache
SLICE_SPAN = 64.0  # width of the range that R_p is packed in, in standard deviations; clipped beyond
SELECTIVITY_STEPS = 4.0  # per standard deviation

UInt64 = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Part:
    """One live segment, as seen from one tensor.

    Attributes
    ----------
    slice : int
        Number of the slice.
    samples : int
    codebooks : float64 [3, 16]
    """

    slice: int
    samples: int
    codebooks: Float64


@dataclass(frozen=True)
class ScoreTables:
    """All that is needed to merge a tensor's records and to compare its slices.

    Attributes
    ----------
    codebooks : float64 [3, 16]
        Of the merged record, of equal mass.
    shares : uint64 [parts, 4096]
        What a part's 12-bit code adds: act, grad, freq and R_p, from the lowest 16 bits up.
    slices : int64 [parts]
        Number of each part's slice; parts of a slice lie together.
    codes : uint16 [3, 4096]
        The upper 12 bits of a sum of shares to its code, shifted to its place in the record.
    score : uint16 [4096]
        A merged 12-bit code to the code of equal mass of R.
    bias : int64 [slices]
        Sum of shares that stands for ``R_p = 0``; -1 for a slice without parts.
    """

    codebooks: Float64
    shares: UInt64
    slices: np.ndarray
    codes: UInt16
    score: UInt16
    bias: np.ndarray


def fit_tables(
    parts: Sequence[Part], looked_at: Sequence[UInt16], exponents: Sequence[float], slices: int
) -> ScoreTables:
    """Fit a tensor's tables.

    Parameters
    ----------
    parts : sequence of Part
        At least one; those of a slice together.
    looked_at : sequence of uint16 [n]
        Records of the same weights, one array per part.
    exponents : sequence of 4 floats
        a, b, c and d of S.
    slices : int
        How many slices there are.
    """
    worth = worth_of_statistics(exponents)
    shares = np.array([part.samples for part in parts], dtype=np.float64)
    values = weighted_values([part.codebooks for part in parts], shares / shares.sum())
    packed = np.zeros((len(parts), TRIPLES), np.uint64)
    scale = _pack_means(values, packed)
    counts = np.zeros((len(STATISTICS), MEAN_BINS), np.int64)
    flat = np.stack([np.asarray(part).reshape(-1) for part in looked_at])
    count_means(flat, values, counts)
    codebooks = final_codebooks(counts, values)
    codes = _code_tables(codebooks, values[:, :, 0].sum(0), scale)
    triples = np.zeros(TRIPLES, np.int64)
    _count_triples(flat, packed, codes, triples)
    R = worth @ decoded(codebooks)
    bias = np.full(slices, -1, np.int64)
    for number in sorted({part.slice for part in parts}):
        members = [index for index, part in enumerate(parts) if part.slice == number]
        bias[number] = _pack_slice([parts[i] for i in members], flat[members], worth, packed, members)
    places = np.array([part.slice for part in parts], np.int64)
    return ScoreTables(codebooks, packed, places, codes, _equal_mass(R, triples), bias)


def _pack_means(values: Float64, packed: UInt64) -> Float64:
    """Put the parts' shares of the merged means into the lowest 48 bits; units per mean, float64 [3]."""
    index = np.arange(TRIPLES)
    scale = np.zeros(len(STATISTICS))
    for s in range(len(STATISTICS)):
        above = values[:, s] - values[:, s, :1]
        scale[s] = (UNITS - 1) / above[:, -1].sum()
        units = np.floor(above * scale[s]).astype(np.uint64)
        packed |= units[:, index >> (8 - 4 * s) & 15] << np.uint64(16 * s)
    return scale


def _code_tables(codebooks: Float64, lowest: Float64, scale: Float64) -> UInt16:
    """The nearest code of every sum of shares, in its place of the record: uint16 [3, 4096]."""
    tables = np.zeros((len(STATISTICS), SUMS), np.uint16)
    for s in range(len(STATISTICS)):
        means = lowest[s] + (np.arange(SUMS) + 0.5) * (1 << SUM_SHIFT) / scale[s]
        between = (codebooks[s, 1:] + codebooks[s, :-1]) / 2
        tables[s] = np.searchsorted(between, means).astype(np.uint16) << np.uint16(12 - 4 * s)
    return tables


def worth_of_statistics(exponents: Sequence[float]) -> Float64:
    """What a unit of the mean act level, grad level and share is worth to S, in octaves: float64 [3]."""
    return np.array([exponents[0] / 2, exponents[1] / 2, exponents[2]], np.float64)


def decoded(codebooks: Float64) -> Float64:
    """What every 12-bit code stands for: float64 [3, 4096]."""
    index = np.arange(TRIPLES)
    return np.stack([codebooks[s][index >> (8 - 4 * s) & 15] for s in range(len(STATISTICS))])


def _equal_mass(R: Float64, counts: np.ndarray) -> UInt16:
    """Sixteen codes of equal mass over the values of R: uint16, one per entry; equal values get the same code."""
    values, place = np.unique(R, return_inverse=True)
    mass = np.bincount(place, counts, values.size)
    middle = np.cumsum(mass) - mass / 2
    codes = np.floor(middle * (CODES / mass.sum()))
    return np.asarray(np.clip(codes, 0, CODES - 1).astype(np.uint16)[place])


def _pack_slice(
    parts: Sequence[Part], looked_at: UInt16, worth: Float64, packed: UInt64, members: list[int]
) -> int:
    """Put one slice's shares of ``R_p`` into the highest 16 bits; the sum of shares where ``R_p = 0``."""
    samples = np.array([part.samples for part in parts], dtype=np.float64)
    shares = samples / samples.sum()
    values = weighted_values([part.codebooks for part in parts], shares)
    tables = np.stack(
        [worth @ decoded(value) for value in values]
    )  # what a part's code adds to R: [parts, 4096]
    mean, deviation = _moments(looked_at, tables)
    unit = UNITS / SLICE_SPAN
    bias = 0
    for member, table, share in zip(members, tables, shares, strict=True):
        room = share * UNITS / 2
        units = np.clip(np.round((table - share * mean) / deviation * unit), -room, room - 1) + round(room)
        bias += round(room)
        packed[member] |= np.clip(units, 0, UNITS - 1).astype(np.uint64) << np.uint64(48)
    return bias


def _moments(looked_at: UInt16, tables: Float64) -> tuple[float, float]:
    """Mean and standard deviation of R over weights."""
    sums = np.zeros(2)
    _add_moments(looked_at, tables, sums)
    mean = float(sums[0] / looked_at.shape[1])
    deviation = float(np.sqrt(max(sums[1] / looked_at.shape[1] - mean**2, 0)))
    return mean, deviation if deviation > 1e-9 else 1.0


@njit(nogil=True, cache=True)
def _add_moments(parts: UInt16, tables: Float64, sums: Float64) -> None:
    for i in range(parts.shape[1]):
        total = 0.0
        for p in range(parts.shape[0]):
            total += tables[p, parts[p, i] >> 4]
        sums[0] += total
        sums[1] += total * total


@njit(nogil=True, cache=True)
def _count_triples(parts: UInt16, shares: UInt64, codes: UInt16, counts: Any) -> None:
    low = np.uint64(SUMS - 1)
    for i in range(parts.shape[1]):
        total = np.uint64(0)
        for p in range(parts.shape[0]):
            total += shares[p, parts[p, i] >> 4]
        total >>= np.uint64(SUM_SHIFT)
        record = (
            codes[0, total & low]
            | codes[1, (total >> np.uint64(16)) & low]
            | codes[2, (total >> np.uint64(32)) & low]
        )
        counts[record >> 4] += 1


@njit(inline="always")
def _look_up(records: Any, table: Any, entries: Any) -> None:
    for i in range(entries.size):
        entries[i] = table[records[i] >> 4]


@njit(inline="always")
def _add_up(entries: Any, means: Any, own: Any) -> None:
    for i in range(entries.size):
        means[i] += entries[i] & np.uint64(0xFFFFFFFFFFFF)
        own[i] += np.int32(entries[i] >> np.uint64(48))


@njit(inline="always")
def _compare(own: Any, bias: Any, number: Any, best: Any, dominant: Any, everything: Any) -> None:
    for i in range(own.size):
        S = own[i] - bias
        everything[i] += S
        better = best[i] < S
        best[i] = S if better else best[i]
        dominant[i] = number if better else dominant[i]
        own[i] = 0


@njit(inline="always")
def _merged(means: Any, codes: Any, score: Any, rows: Any) -> None:
    act, grad, freq = codes[0], codes[1], codes[2]
    low = np.uint64(SUMS - 1)
    for i in range(rows.size):
        total = means[i] >> np.uint64(SUM_SHIFT)
        record = (
            act[total & low] | grad[(total >> np.uint64(16)) & low] | freq[(total >> np.uint64(32)) & low]
        )
        rows[i] = record | score[record >> np.uint16(4)]


@njit(inline="always")
def _affinities(best: Any, everything: Any, dominant: Any, others: Any, affinity: Any) -> None:
    step = np.float32(SELECTIVITY_STEPS * SLICE_SPAN / UNITS)
    for i in range(affinity.size):
        margin = np.float32(best[i]) - np.float32(everything[i] - best[i]) * others
        selectivity = min(np.int32(margin * step), np.int32(15))
        affinity[i] = dominant[i] << np.uint8(4) | np.uint8(selectivity)


@njit(nogil=True, cache=True)
def score_records(
    parts: UInt16,
    shares: UInt64,
    slices: Any,
    codes: UInt16,
    score: UInt16,
    bias: Any,
    rows: UInt16,
    affinity: UInt8,
) -> None:
    """Merge and compare flat records.

    Parameters
    ----------
    parts : uint16 [parts, n]
        Records of the same weights, a row per part.
    shares, slices, codes, score, bias
        From `ScoreTables`.
    rows : uint16 [n], written
        Merged records with their code of R.
    affinity : uint8 [n], written
    """
    entries, means = np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.uint64)
    own, best, everything = np.zeros(BLOCK, np.int32), np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    dominant = np.empty(BLOCK, np.uint8)
    last = parts.shape[0] - 1
    number = 1
    for p in range(last):
        number += slices[p + 1] != slices[p]
    others = np.float32(1.0 / max(number - 1, 1))
    for begin in range(0, rows.size, BLOCK):
        end = min(begin + BLOCK, rows.size)
        n = end - begin
        means[:] = 0
        best[:] = -(1 << 30)
        everything[:] = 0
        for p in range(last + 1):
            _look_up(parts[p, begin:end], shares[p], entries[:n])
            _add_up(entries[:n], means[:n], own[:n])
            here = slices[p]
            if p == last or slices[p + 1] != here:
                zero = np.int32(bias[here])
                _compare(own[:n], zero, np.uint8(here), best[:n], dominant[:n], everything[:n])
        _merged(means[:n], codes, score, rows[begin:end])
        if number > 1:
            _affinities(best[:n], everything[:n], dominant[:n], others, affinity[begin:end])
        else:
            affinity[begin:end] = np.uint8(slices[0]) << np.uint8(4)
