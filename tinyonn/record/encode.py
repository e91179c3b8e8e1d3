"""From a segment's sums to its codebooks and its 16-bit records, band by band."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from tinyonn.record.activations import column_tables, frequency_curve, level_curve, weight_bin
from tinyonn.record.levels import LEVELS
from tinyonn.store.records import Float64, TensorCalibration, UInt16, codebook_of, dither_bits, positions

ReadWeights = Callable[[int, int], np.ndarray]

FITTED_WEIGHTS = 2**20  # of a tensor, whose means its codebooks are fitted to
FITTED_INPUTS = 8192  # at least, where inputs belong to rows
ROWS_TOGETHER = 16
MEAN_STEPS = 1024  # resolution of means of `act` (in levels) and `freq` while a codebook is fitted


@dataclass(frozen=True)
class TensorSums:
    """What one segment recorded of one tensor, of shape [rows, columns] (a vector counts as one row).

    Attributes
    ----------
    samples : int
        Good samples in the sums.
    grad : uint8 or uint16 [rows, columns]
        Summed levels.
    histograms : uint16 [inputs, 256] or None
        Column bins over the samples; None for tied tensors and vectors.
    by_row : bool
        The input belongs to the row (embedding, Conv1D) instead of the column.
    act, freq : uint8 or uint16 [rows, columns] or None
        Summed levels and counts of tied tensors and vectors.
    """

    samples: int
    grad: np.ndarray
    histograms: UInt16 | None = None
    by_row: bool = False
    act: np.ndarray | None = None
    freq: np.ndarray | None = None


class Encoder:
    """Turns one tensor's sums into records.

    Parameters
    ----------
    sums : TensorSums
    weights : callable
        ``weights(first, last)`` gives float32 rows [first, last) of the (dequantized) tensor.
    calibration : TensorCalibration

    Attributes
    ----------
    codebooks : float64 [3, 16]
        Fitted to the segment's own means: all of them, or those of about a million weights in evenly spread rows.
    """

    def __init__(self, sums: TensorSums, weights: ReadWeights, calibration: TensorCalibration) -> None:
        self._sums, self._weights = sums, weights
        self._level = level_curve(calibration.act_base)
        self._share = frequency_curve(calibration.freq_threshold)
        self._tables = None if sums.histograms is None or sums.by_row else self._means(sums.histograms)
        self.codebooks = self._fit()

    def bands(self, seed: int, band_rows: int) -> Iterator[tuple[int, UInt16]]:
        """Records, band by band.

        Parameters
        ----------
        seed : int
            From `dither_seed`.
        band_rows : int
            Rows per band, so that a band is a whole chunk of the store.

        Yields
        ------
        first : int
            Row of the band.
        records : uint16 [rows, columns], score nibble 0
        """
        sums, books = self._sums, self.codebooks
        rows, columns = sums.grad.shape
        levels = np.arange((LEVELS - 1) * sums.samples + 1) / sums.samples
        grad_positions = positions(levels, books[1])
        shared = None if self._tables is None else self._positions(self._tables)
        for first in range(0, rows, band_rows):
            last = min(first + band_rows, rows)
            out = np.empty((last - first, columns), np.uint16)
            offset = np.uint64(first * columns)
            if sums.histograms is not None:
                bits = np.ascontiguousarray(self._weights(first, last), np.float32).view(np.int32)
                tables = (
                    self._positions(self._means(sums.histograms[first:last])) if shared is None else shared
                )
                grad = sums.grad[first:last]
                _encode(bits, tables, sums.by_row, grad, grad_positions, np.uint64(seed), offset, out)
            else:
                assert sums.act is not None and sums.freq is not None
                parts = tuple(part[first:last].reshape(-1) for part in (sums.act, sums.grad, sums.freq))
                shares = np.arange(sums.samples + 1) / sums.samples
                position_of = positions(levels, books[0]), grad_positions, positions(shares, books[2])
                _encode_dense(parts, position_of, np.uint64(seed), offset, out.reshape(-1))
            yield first, out

    def _means(self, histograms: UInt16) -> tuple[Float64, Float64]:
        return column_tables(histograms, self._level), column_tables(histograms, self._share)

    def _positions(self, tables: tuple[Float64, Float64]) -> UInt16:
        """Positions of `act` and `freq` in their codebooks for every input and weight bin; uint16 [I, 256, 2]."""
        act, freq = tables
        return np.stack([positions(act, self.codebooks[0]), positions(freq, self.codebooks[2])], axis=-1)

    def _fit(self) -> Float64:
        sums = self._sums
        grad = np.zeros((LEVELS - 1) * sums.samples + 1, np.int64)
        dense = sums.histograms is None
        act = np.zeros_like(grad) if dense else np.zeros((LEVELS - 1) * MEAN_STEPS + 1, np.int64)
        freq = np.zeros(sums.samples + 1 if dense else MEAN_STEPS + 1, np.int64)
        for first, last in spread_rows(sums.grad.shape[0], sums.grad.shape[1], sums.by_row):
            count(sums.grad[first:last].reshape(-1), grad)
            if sums.histograms is None:
                assert sums.act is not None and sums.freq is not None
                count(sums.act[first:last].reshape(-1), act)
                count(sums.freq[first:last].reshape(-1), freq)
            else:
                bits = np.ascontiguousarray(self._weights(first, last), np.float32).view(np.int32)
                tables = self._tables or self._means(sums.histograms[first:last])
                _count_means(bits, *tables, sums.by_row, act, freq)
        steps = (sums.samples, sums.samples) if dense else (MEAN_STEPS, MEAN_STEPS)
        books = (
            _codebook(act, steps[0]),
            _codebook(grad, sums.samples),
            _codebook(freq, steps[1], share=True),
        )
        return np.stack(books)


def spread_rows(rows: int, columns: int, by_row: bool) -> list[tuple[int, int]]:
    """Evenly spread groups of rows with about a million weights, or all rows of a smaller tensor.

    Where inputs belong to rows, as in an embedding, most rows may not have been touched at all, so more are taken.
    """
    wanted = max(FITTED_WEIGHTS // columns, FITTED_INPUTS if by_row else 1)
    groups = rows // ROWS_TOGETHER
    if wanted >= rows or groups < 2:
        return [(0, rows)]
    taken = max(1, wanted // ROWS_TOGETHER)
    starts = np.unique(np.arange(taken) * groups // taken) * ROWS_TOGETHER
    return [(int(start), int(start) + ROWS_TOGETHER) for start in starts]


def _codebook(counts: np.ndarray, steps: int, share: bool = False) -> Float64:
    values = np.flatnonzero(counts)
    return codebook_of(values / steps, counts[values].astype(np.float64), share=share)


@njit(nogil=True, cache=True)
def count(values: Any, counts: Any) -> None:
    """Add a histogram of non-negative integers, any length, to int64 `counts`."""
    for i in range(values.size):
        counts[values[i]] += 1


@njit(nogil=True, cache=True)
def _count_means(weight_bits: Any, level: Any, share: Any, by_row: bool, act: Any, freq: Any) -> None:
    for i in range(weight_bits.shape[0]):
        for j in range(weight_bits.shape[1]):
            k = weight_bin(weight_bits[i, j])
            column = i if by_row else j
            act[int(level[column, k] * MEAN_STEPS + 0.5)] += 1
            freq[int(share[column, k] * MEAN_STEPS + 0.5)] += 1


@njit(inline="always")
def _record(act: Any, grad: Any, freq: Any, bits: Any) -> Any:
    a = (np.uint64(act) + (bits & np.uint64(255))) >> np.uint64(8)
    g = (np.uint64(grad) + ((bits >> np.uint64(8)) & np.uint64(255))) >> np.uint64(8)
    f = (np.uint64(freq) + ((bits >> np.uint64(16)) & np.uint64(255))) >> np.uint64(8)
    return np.uint16((a << np.uint64(12)) | (g << np.uint64(8)) | (f << np.uint64(4)))


@njit(nogil=True, cache=True)
def _encode(
    weight_bits: Any, tables: Any, by_row: bool, grad: Any, grad_positions: Any, seed: Any, offset: Any,
    out: UInt16,
) -> None:  # fmt: skip
    rows, columns = out.shape
    for i in range(rows):
        for j in range(columns):
            k = weight_bin(weight_bits[i, j])
            column = i if by_row else j
            bits = dither_bits(seed, offset + np.uint64(i * columns + j))
            out[i, j] = _record(tables[column, k, 0], grad_positions[grad[i, j]], tables[column, k, 1], bits)


@njit(nogil=True, cache=True)
def _encode_dense(sums: Any, position_of: Any, seed: Any, offset: Any, out: UInt16) -> None:
    """Both by statistic: the sums of act, grad and freq, and the position of each possible one."""
    # Plain tuples: on disk a kernel's cache names the classes of arguments, and raises when one is there no longer.
    act, grad, freq = sums
    act_positions, grad_positions, freq_positions = position_of
    for i in range(out.size):
        bits = dither_bits(seed, offset + np.uint64(i))
        out[i] = _record(act_positions[act[i]], grad_positions[grad[i]], freq_positions[freq[i]], bits)
