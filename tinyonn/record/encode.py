"""From a segment's sums to its 16-bit records, band by band."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from tinyonn.record.activations import _EIGHTHS, WEIGHT_LOW, _bin, position_tables
from tinyonn.record.levels import LEVELS
from tinyonn.store.records import TensorCalibration, UInt16, dither_bits, positions

ReadWeights = Callable[[int, int], np.ndarray]


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


def encode(
    sums: TensorSums, weights: ReadWeights, calibration: TensorCalibration, seed: int, band_rows: int
) -> Iterator[tuple[int, UInt16]]:
    """Records of one tensor.

    Parameters
    ----------
    sums : TensorSums
    weights : callable
        ``weights(first, last)`` gives float32 rows [first, last) of the (dequantized) tensor.
    calibration : TensorCalibration
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
    rows, columns = sums.grad.shape
    books = calibration.codebooks()
    grad_positions = positions(np.arange((LEVELS - 1) * sums.samples + 1) / sums.samples, books[1])
    histograms = sums.histograms
    shared = None if histograms is None or sums.by_row else position_tables(histograms, calibration)
    for first in range(0, rows, band_rows):
        last = min(first + band_rows, rows)
        out = np.empty((last - first, columns), np.uint16)
        offset = np.uint64(first * columns)
        if histograms is not None:
            bits = np.ascontiguousarray(weights(first, last), np.float32).view(np.int32)
            tables = position_tables(histograms[first:last], calibration) if shared is None else shared
            grad = sums.grad[first:last]
            _encode(
                bits,
                tables,
                sums.by_row,
                grad,
                grad_positions,
                np.uint64(seed),
                offset,
                WEIGHT_LOW,
                _EIGHTHS,
                out,
            )
        else:
            assert sums.act is not None and sums.freq is not None
            act_positions = positions(np.arange((LEVELS - 1) * sums.samples + 1) / sums.samples, books[0])
            freq_positions = positions(np.arange(sums.samples + 1) / sums.samples, books[2])
            _encode_dense(
                *(part[first:last].reshape(-1) for part in (sums.act, sums.grad, sums.freq)),
                *(act_positions, grad_positions, freq_positions, np.uint64(seed), offset, out.reshape(-1)),
            )
        yield first, out


@njit(inline="always")  # type: ignore[untyped-decorator]
def _record(act: Any, grad: Any, freq: Any, bits: Any) -> Any:
    a = (np.uint64(act) + (bits & np.uint64(255))) >> np.uint64(8)
    g = (np.uint64(grad) + ((bits >> np.uint64(8)) & np.uint64(255))) >> np.uint64(8)
    f = (np.uint64(freq) + ((bits >> np.uint64(16)) & np.uint64(255))) >> np.uint64(8)
    return np.uint16((a << np.uint64(12)) | (g << np.uint64(8)) | (f << np.uint64(4)))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _encode(
    weight_bits: Any, tables: Any, by_row: bool, grad: Any, grad_positions: Any, seed: Any, offset: Any,
    low: int, sub: Any, out: UInt16,
) -> None:  # fmt: skip
    rows, columns = out.shape
    for i in range(rows):
        for j in range(columns):
            k = _bin(weight_bits[i, j] & 0x7FFFFFFF, 8, low, sub)
            column = i if by_row else j
            bits = dither_bits(seed, offset + np.uint64(i * columns + j))
            out[i, j] = _record(tables[column, k, 0], grad_positions[grad[i, j]], tables[column, k, 1], bits)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _encode_dense(
    act: Any, grad: Any, freq: Any, act_positions: Any, grad_positions: Any, freq_positions: Any, seed: Any,
    offset: Any, out: UInt16,
) -> None:  # fmt: skip
    for i in range(out.size):
        bits = dither_bits(seed, offset + np.uint64(i))
        out[i] = _record(act_positions[act[i]], grad_positions[grad[i]], freq_positions[freq[i]], bits)
