"""From a look at some of a tensor's weights to tables that score all of them with one gather per segment.

For a weight with mean levels ``m`` (averaged over segments by samples), and ``z`` standardised over the tensor,

    S = w_act z(m_act) - w_grad z(m_grad) + w_freq z(m_freq)

on the decoded INT4 codes of the merged record, so that S is a function of 12 bits. ``score`` is S's code of equal mass
in the tensor. The *affinity* of a weight compares the slices: ``S_p`` is the same sum on the means of slice p alone,
standardised within that slice; the dominant slice has the highest ``S_p``, and the selectivity is the distance from
there to the mean of the others, in steps of a quarter of S's unit, up to 15:

    affinity = dominant slice << 4 | selectivity

Everything that a segment adds is packed in one 64-bit entry per 12-bit code: three 16-bit shares of the merged
means and a 16-bit share of its slice's ``S_p``. Integer sums make the result independent of order and machine.
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
SLICE_SPAN = 64.0  # width of the range that S_p is packed in, in units of S; clipped beyond
SELECTIVITY_STEPS = 4.0  # per unit of S

UInt64 = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class ScoreWeights:
    """Weights of the three terms of S; `grad` counts against a weight."""

    act: float
    grad: float
    freq: float

    @property
    def signed(self) -> Float64:
        """As they enter the sum, scaled to absolute values that sum to 1: float64 [3]."""
        weights = np.array([self.act, -self.grad, self.freq], dtype=np.float64)
        return np.asarray(weights / np.abs(weights).sum())


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
    """All that is needed to score a tensor.

    Attributes
    ----------
    codebooks : float64 [3, 16]
        Of the merged record, of equal mass.
    mean, deviation : float64 [3]
        That standardise the decoded codes.
    shares : uint64 [parts, 4096]
        What a part's 12-bit code adds: act, grad, freq and S_p, from the lowest 16 bits up.
    slices : int64 [parts]
        Number of each part's slice; parts of a slice lie together.
    codes : uint16 [3, 4096]
        The upper 12 bits of a sum of shares to its code, shifted to its place in the record.
    score : uint16 [4096]
        A merged 12-bit code to its score.
    bias : int64 [slices]
        Sum of shares that stands for ``S_p = 0``; -1 for a slice without parts.
    """

    codebooks: Float64
    mean: Float64
    deviation: Float64
    shares: UInt64
    slices: np.ndarray
    codes: UInt16
    score: UInt16
    bias: np.ndarray


def fit_tables(
    parts: Sequence[Part], looked_at: Sequence[UInt16], weights: ScoreWeights, slices: int
) -> ScoreTables:
    """Fit a tensor's tables.

    Parameters
    ----------
    parts : sequence of Part
        At least one; those of a slice together.
    looked_at : sequence of uint16 [n]
        Records of the same weights, one array per part.
    weights : ScoreWeights
    slices : int
        How many slices there are.
    """
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
    S, mean, deviation = _scores(codebooks, triples, weights)
    bias = np.full(slices, -1, np.int64)
    for number in sorted({part.slice for part in parts}):
        members = [index for index, part in enumerate(parts) if part.slice == number]
        bias[number] = _pack_slice([parts[i] for i in members], flat[members], weights, packed, members)
    places = np.array([part.slice for part in parts], np.int64)
    return ScoreTables(codebooks, mean, deviation, packed, places, codes, _equal_mass(S, triples), bias)


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


def _scores(
    codebooks: Float64, triples: np.ndarray, weights: ScoreWeights
) -> tuple[Float64, Float64, Float64]:
    """S of every 12-bit code, float64 [4096], and the mean and deviation of each decoded statistic, float64 [3]."""
    index = np.arange(TRIPLES)
    decoded = np.stack([codebooks[s][index >> (8 - 4 * s) & 15] for s in range(len(STATISTICS))])
    total = triples.sum()
    mean = decoded @ triples / total
    deviation = np.sqrt(np.maximum((decoded - mean[:, None]) ** 2 @ triples / total, 0))
    deviation = np.where(deviation > 0, deviation, 1.0)
    S = weights.signed @ ((decoded - mean[:, None]) / deviation[:, None])
    return S, mean, deviation


def _equal_mass(S: Float64, counts: np.ndarray) -> UInt16:
    """Sixteen codes of equal mass over the values of S: uint16, one per entry; equal values get the same code."""
    values, place = np.unique(S, return_inverse=True)
    mass = np.bincount(place, counts, values.size)
    middle = np.cumsum(mass) - mass / 2
    codes = np.floor(middle * (CODES / mass.sum()))
    return np.asarray(np.clip(codes, 0, CODES - 1).astype(np.uint16)[place])


def _pack_slice(
    parts: Sequence[Part], looked_at: UInt16, weights: ScoreWeights, packed: UInt64, members: list[int]
) -> int:
    """Put one slice's shares of ``S_p`` into the highest 16 bits; the sum of shares where ``S_p = 0``."""
    samples = np.array([part.samples for part in parts], dtype=np.float64)
    values = weighted_values([part.codebooks for part in parts], samples / samples.sum())
    mean, deviation = _moments(looked_at, values)
    index = np.arange(TRIPLES)
    unit = UNITS / SLICE_SPAN
    bias = 0
    for member, value, share in zip(members, values, samples / samples.sum(), strict=True):
        S = np.zeros(TRIPLES)
        for s in range(len(STATISTICS)):
            term = (value[s] - share * mean[s]) / deviation[s]
            S += weights.signed[s] * term[index >> (8 - 4 * s) & 15]
        room = share * UNITS / 2
        units = np.clip(np.round(S * unit), -room, room - 1) + round(room)
        bias += round(room)
        packed[member] |= np.clip(units, 0, UNITS - 1).astype(np.uint64) << np.uint64(48)
    return bias


def _moments(looked_at: UInt16, values: Float64) -> tuple[Float64, Float64]:
    """Mean and standard deviation over weights of each statistic's mean: float64 [3] each."""
    sums = np.zeros((2, len(STATISTICS)))
    _add_moments(looked_at, values, sums)
    n = looked_at.shape[1]
    mean = sums[0] / n
    deviation = np.sqrt(np.maximum(sums[1] / n - mean**2, 0))
    return mean, np.where(deviation > 1e-9, deviation, 1.0)


@njit(nogil=True, cache=True)
def _add_moments(parts: UInt16, values: Float64, sums: Float64) -> None:
    for i in range(parts.shape[1]):
        for s in range(3):
            mean = 0.0
            for p in range(parts.shape[0]):
                mean += values[p, s, (np.uint64(parts[p, i]) >> np.uint64(12 - 4 * s)) & np.uint64(15)]
            sums[0, s] += mean
            sums[1, s] += mean * mean


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
    """Score flat records.

    Parameters
    ----------
    parts : uint16 [parts, n]
        Records of the same weights, a row per part.
    shares, slices, codes, score, bias
        From `ScoreTables`.
    rows : uint16 [n], written
        Merged records with their score.
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
