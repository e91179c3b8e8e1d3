"""The activation side without state per weight: histograms per input column, expanded at a segment's end.

``act_ij = |W_ij| * rms_t(X_tj)`` depends on the sample only through column ``j``. Both factors are binned at 1/8
octave:

- column bin ``b``: ``1 + floor(8 (log2 rms + 18))``, rms from 2^-18 to 2^13.75, bin 0 for zero;
- weight bin ``k``: ``1 + floor(8 (log2 |w| + 23))``, |w| from 2^-23 to 2^8.75, bin 0 for zero.

With the column's histogram ``h_j`` over the samples, a weight's mean level is ``sum_b h_j[b] g(k + b) / n`` and its
freq is ``sum_b h_j[b] s(k + b) / n``. ``g`` and ``s`` are the level and the step at the calibrated median, averaged
over the triangular density of the sum of two binned logarithms.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit

from tinyonn.record.device import gpu_kernels, on_host
from tinyonn.record.levels import FLOAT32_SHIFT, LEVELS, raise_top
from tinyonn.store.records import Float64, UInt8, UInt16

BINS = 256
STEPS = 8  # bins an octave
COLUMN_LOW = -18  # log2 of the smallest rms that has a bin of its own
WEIGHT_LOW = -23  # log2 of the smallest |w| that has a bin of its own
MANTISSA_CELLS = 128  # the top seven bits of the mantissa, all that a bfloat16 has
TOKEN_CHUNK = (
    32  # squares are summed in chunks of tokens, then chunk after chunk: the same bits on every device
)

_MANTISSA = np.log2(1.0 + (np.arange(MANTISSA_CELLS) + 0.5) / MANTISSA_CELLS)
_EIGHTHS = np.floor(_MANTISSA * STEPS).astype(np.int32)
QUARTERS = np.floor(_MANTISSA * STEPS / 2).astype(np.int32)


@njit(inline="always")
def _bin(bits: Any, steps: Any, low: Any, sub: Any) -> Any:
    exponent = (bits >> 23) - 127
    cell = sub[(bits >> 16) & 127]
    index = 1 + steps * (exponent - low) + cell
    return 0 if index < 1 else (255 if index > 255 else index)


@njit(inline="always")
def weight_bin(bits: Any) -> Any:
    """Bin of |w|, from the bits of a float32 weight."""
    return _bin(bits & 0x7FFFFFFF, STEPS, WEIGHT_LOW, _EIGHTHS)


@njit(nogil=True, cache=True)
def _weight_bins(bits: Any, out: UInt8) -> None:
    for i in range(bits.size):
        out[i] = weight_bin(bits[i])


def weight_bins(weights: np.ndarray) -> UInt8:
    """Bin of |w| for float32 weights of any shape; uint8, same shape."""
    flat = np.ascontiguousarray(weights, dtype=np.float32)
    out = np.empty(flat.shape, np.uint8)
    _weight_bins(flat.view(np.int32).reshape(-1), out.reshape(-1))
    return out


@njit(nogil=True, cache=True)
def _mean_square_bins(bits: Any, low: int, sub: Any, out: UInt8) -> int:
    top = 0
    for j in range(bits.size):
        size = bits[j] & 0x7FFFFFFF  # a NaN may have a sign
        top = max(top, size)
        out[j] = _bin(size, 4, 2 * low, sub)
    return top >> 22


def column_bins(mean_square_I: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Column bins of one sample.

    Parameters
    ----------
    mean_square_I : float32 [I]
        Mean over the tokens of the squared inputs, >= 0.
    top : int32 [1], on the same device
        Raised to the largest half octave (``bits >> 22``) seen: from 510 on an input was not finite.

    Returns
    -------
    uint8 [I], on the same device
    """
    if on_host(mean_square_I):
        out = np.empty(mean_square_I.numel(), np.uint8)
        found = _mean_square_bins(mean_square_I.view(torch.int32).numpy(), COLUMN_LOW, QUARTERS, out)
        raise_top(top, int(found))
        return torch.from_numpy(out)
    if (gpu := gpu_kernels(mean_square_I)) is not None:
        bins: torch.Tensor = gpu.mean_square_bins(mean_square_I, top)
        return bins
    bits = mean_square_I.view(torch.int32) & 0x7FFFFFFF
    sub = torch.as_tensor(QUARTERS, device=bits.device)[(bits >> 16) & 127]
    index = 1 + 4 * ((bits >> 23) - 127 - 2 * COLUMN_LOW) + sub
    raise_top(top, bits.max() >> FLOAT32_SHIFT)
    return index.clamp_(0, BINS - 1).to(torch.uint8)


def input_bins(X_TI: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """`column_bins` of one sample's inputs [T, I], of any float type."""
    if on_host(X_TI):
        square = np.zeros(X_TI.shape[1], np.float32)
        if X_TI.dtype == torch.bfloat16:
            _add_squares_bfloat16(X_TI.view(torch.int16).numpy(), square)
        else:
            _add_squares(X_TI.float().numpy(), square)
        return column_bins(torch.from_numpy(square / np.float32(X_TI.shape[0])), top)
    gpu = gpu_kernels(X_TI)
    if gpu is not None and X_TI.stride(-1) == 1 and X_TI.dtype in (torch.float32, torch.bfloat16):
        bins: torch.Tensor = gpu.column_bins(X_TI, top)
        return bins
    return column_bins(X_TI.float().square().mean(0), top)


@njit(nogil=True, cache=True)
def _add_squares(X: Any, out: Any) -> None:
    part = np.empty(X.shape[1], np.float32)
    for first in range(0, X.shape[0], TOKEN_CHUNK):
        part[:] = 0
        for t in range(first, min(first + TOKEN_CHUNK, X.shape[0])):
            for j in range(X.shape[1]):
                part[j] += X[t, j] * X[t, j]
        for j in range(X.shape[1]):
            out[j] += part[j]


@njit(nogil=True, cache=True)
def _add_squares_bfloat16(bits: Any, out: Any) -> None:
    row, part = np.empty(bits.shape[1], np.float32), np.empty(bits.shape[1], np.float32)
    row_bits = row.view(np.int32)
    for first in range(0, bits.shape[0], TOKEN_CHUNK):
        part[:] = 0
        for t in range(first, min(first + TOKEN_CHUNK, bits.shape[0])):
            for j in range(bits.shape[1]):
                row_bits[j] = np.int32(bits[t, j]) << np.int32(
                    16
                )  # a bfloat16 is the upper half of a float32
            for j in range(bits.shape[1]):
                part[j] += row[j] * row[j]
        for j in range(bits.shape[1]):
            out[j] += part[j]


@njit(nogil=True, cache=True)
def add_to_histograms(bins: UInt8, histograms: UInt16) -> None:
    """Count column bins: bins uint8 [samples, I], histograms uint16 [I, 256], changed in place."""
    for s in range(bins.shape[0]):
        for j in range(bins.shape[1]):
            histograms[j, bins[s, j]] += 1


@lru_cache(maxsize=1024)
def level_curve(base: int) -> Float64:
    """Expected level of a product whose factors fell into bins with sum ``k + b``; float64 [511]."""
    return _smoothed(lambda log2: np.clip(_half_octaves(log2) - base, 0, LEVELS - 1).astype(np.float64))


@lru_cache(maxsize=1024)
def frequency_curve(threshold: int) -> Float64:
    """Probability that such a product lies above ``2 ** (threshold / 8)``; float64 [511]."""
    return _smoothed(lambda log2: (log2 > threshold / STEPS).astype(np.float64))


def _half_octaves(log2: Float64) -> np.ndarray:
    return np.exp2(log2).astype(np.float32).view(np.int32) >> FLOAT32_SHIFT


def _smoothed(function: Any, points: int = 16) -> Float64:
    offsets = (np.arange(points) + 0.5) / points
    inner = (offsets[:, None] + offsets[None, :]).ravel()  # both factors uniform within their bins
    sums = np.arange(2 * BINS - 1)[:, None] - 2 + inner[None, :]
    values: Float64 = np.asarray(function(sums / STEPS + COLUMN_LOW + WEIGHT_LOW), dtype=np.float64)
    return np.asarray(values.mean(axis=1))


def column_tables(histograms: UInt16, curve: Float64) -> Float64:
    """Mean of a curve over the samples, for every column and weight bin.

    Parameters
    ----------
    histograms : uint16 [I, 256]
        Counts over samples of each column's bin.
    curve : float64 [511]
        From `level_curve` or `frequency_curve`.

    Returns
    -------
    float64 [I, 256]
        Entry (j, k) belongs to a weight of bin k in column j. A zero factor gives 0.
    """
    out = np.zeros((histograms.shape[0], BINS))
    _column_tables(histograms, curve, out)
    return out


@njit(nogil=True, cache=True)
def _column_tables(histograms: Any, curve: Any, out: Any) -> None:
    for j in range(histograms.shape[0]):
        samples = 0
        for b in range(BINS):  # a column visits few bins: skip the others
            samples += histograms[j, b]
            if b == 0 or histograms[j, b] == 0:
                continue
            count = float(histograms[j, b])
            for k in range(1, BINS):
                out[j, k] += count * curve[b + k]
        for k in range(BINS):
            out[j, k] /= max(samples, 1)


@njit(nogil=True, cache=True)
def add_dense_levels(
    weights: Any, row_square: Any, column_square: Any, base: int, threshold: float, act: UInt8, freq: UInt8
) -> None:
    """Add one sample to dense uint8 sums, where ``act_ij = |W_ij| sqrt(row_i + column_j)``.

    A tied embedding and head meet two inputs at once, so that no histogram per column can tell their levels; vectors
    (norms, biases; row 0) are so small that they need none.

    Parameters
    ----------
    weights : float32 [rows, columns]
    row_square, column_square : float32 [rows], [columns]
        Summed mean squares of the inputs that belong to the rows and to the columns.
    base, threshold
        Of the level and of `freq`.
    act, freq : uint8 [rows, columns], changed in place
    """
    buffer = np.empty(weights.shape[1], np.float32)
    bits = buffer.view(np.int32)
    for i in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            buffer[j] = abs(weights[i, j]) * np.sqrt(row_square[i] + column_square[j])
        for j in range(weights.shape[1]):
            act[i, j] += np.uint8(min(max((bits[j] >> 22) - base, 0), 15))
            freq[i, j] += np.uint8(buffer[j] > threshold)
