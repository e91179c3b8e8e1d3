"""What a slice needs: the smallest budget under which it would keep a weight.

In each tensor a slice keeps the weights of the highest |W| g^0.7, g being the geometric mean of |dL/dW| over its
samples, as many as the allocation gives the tensor under a budget. Its *need* of a weight is the budget, as a share of
all linear weights, under which the weight is the last that it keeps. |W| g^0.7 comes in integer *bins*, 32 to the
octave; what a bin stands for follows from how many of the tensor's weights lie above it (`need_table`).

Shape suffixes: ``S`` slices, ``T`` tensors, ``L`` budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numba import njit

from tinyonn.score.source import Source
from tinyonn.store.arrays import codebooks_of, read_rows
from tinyonn.store.reader import Reader
from tinyonn.store.records import SHIFTS, STATISTICS, Float64, UInt16, shares

POWER = 0.7  # of the gradient; 1 would be the Taylor estimate of the loss, which trusts few samples too much
DEPTH = 3.5  # needs below e**-3.5 of the budget count as equal: such a weight is kept at all costs
HEIGHT = 1.0  # and above e times the budget: such a weight is kept for other slices
STEPS = 32  # bins of an octave
LOWEST = -44  # octave of the first bin
BINS = 2048
MANTISSAS = 1024
LEAST_SHARE = 1e-9

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Counts = np.ndarray[Any, np.dtype[np.int64]]

# Log2 of 1 to 2 in steps of 2**-20: the same on every machine.
LOG2 = np.round(np.log2(1 + (np.arange(MANTISSAS) + 0.5) / MANTISSAS) * 2**20) / 2**20


@dataclass(frozen=True)
class NeedData:
    """What bins are made of; sent to the workers.

    Attributes
    ----------
    reader : Reader
        Of the run's snapshot.
    source : Source
        Of weights and merged records.
    slices : tuple of str
        Those that have samples.
    """

    reader: Reader
    source: Source
    slices: tuple[str, ...]

    def tensor(self, name: str) -> NeedTensor:
        """A tensor's records of every slice, opened once."""
        return NeedTensor(self, name)


class NeedTensor:
    """How much each slice needs the weights of a tensor, band by band."""

    def __init__(self, data: NeedData, name: str) -> None:
        self._slices: list[list[tuple[zarr.Array[Any], str, Float32]]] = []
        for slice in data.slices:
            segments = [one for one in data.reader.segments if one.samples and one.slice == slice]
            parts = []
            for segment, share in zip(segments, shares(segments), strict=True):
                array = data.reader.array(segment, name)
                what = data.reader.what(segment, name)
                table = (codebooks_of(array, what)[STATISTICS.index("grad")] * share).astype(np.float32)
                parts.append((array, what, table))
            self._slices.append(parts)

    def bins(self, first: int, last: int, weights: Float32) -> UInt16:
        """Of |W| g^0.7, uint16 [S, rows, columns].

        Parameters
        ----------
        first, last : int
            Rows.
        weights : float32 [rows, columns]
        """
        out = np.empty((len(self._slices), *weights.shape), np.uint16)
        levels = np.empty(weights.size, np.float32)
        for number, parts in enumerate(self._slices):
            levels[:] = 0
            for array, what, table in parts:
                records = np.ascontiguousarray(read_rows(array, first, last, what))
                _add_levels(records.reshape(-1), SHIFTS["grad"], table, levels)
            # A level is half an octave of gradient.
            _bins(weights.reshape(-1), levels, POWER / 2, LOG2, out[number].reshape(-1))
        return out


@dataclass(frozen=True, eq=False)
class Curves:
    """What every tensor keeps under growing budgets.

    Attributes
    ----------
    budgets_L : float [L]
        Ascending, shares of all weights.
    shares_LT : float [L, T]
        Of the tensors' own weights.
    budget : float
        The one that is asked for; needs are told as its multiples.
    """

    budgets_L: Float64
    shares_LT: Float64
    budget: float


def need_table(counts_SB: Counts, curves: Curves, tensor: int) -> Float32:
    """Log of the need over the budget, by slice and bin: float32 [S, bins].

    Parameters
    ----------
    counts_SB : int64 [S, bins]
        Weights of the tensor that were counted in each bin.
    curves : Curves
    tensor : int
        Its place in them.
    """
    above_SB = counts_SB.sum(1, keepdims=True) - counts_SB.cumsum(1)
    ranks_SB = (above_SB + 0.5 * np.maximum(counts_SB, 1)) / counts_SB.sum(1, keepdims=True)
    needs_SB = needed_budgets(ranks_SB, curves.budgets_L, curves.shares_LT[:, tensor])
    logs_SB = np.clip(np.log(needs_SB / curves.budget), -DEPTH, HEIGHT)
    return np.asarray(logs_SB, dtype=np.float32)


def needed_budgets(ranks: Any, budgets_L: Any, shares_L: Any) -> Any:
    """The budget under which a tensor keeps the weights of a rank.

    Parameters
    ----------
    ranks : float [...]
        Share of the tensor's weights that stand higher, above 0.
    budgets_L : float [L]
        Ascending, shares of all weights.
    shares_L : float [L]
        That the tensor keeps of itself under each.

    Returns
    -------
    float [...]
        Between the given budgets and up to 1 by powers, below the smallest in proportion.
    """
    shares = np.maximum.accumulate(np.append(np.maximum(shares_L, LEAST_SHARE), 1.0))
    shares = shares * (1 + LEAST_SHARE * np.arange(shares.size))  # rising, where an allocation stands still
    logs, budgets = np.log(shares), np.log(np.append(budgets_L, 1.0))
    found = np.interp(np.log(ranks), logs, budgets)
    return np.exp(np.where(np.log(ranks) < logs[0], np.log(ranks) - logs[0] + budgets[0], found))


@njit(nogil=True, cache=True)
def _add_levels(records_N: Any, shift: Any, table: Any, levels_N: Any) -> None:
    for i in range(records_N.size):
        levels_N[i] += table[(records_N[i] >> shift) & 15]


@njit(nogil=True, cache=True)
def _bins(weights_N: Any, levels_N: Any, slope: Any, logs: Any, out_N: Any) -> None:
    bits_N = weights_N.view(np.uint32)
    for i in range(weights_N.size):
        bits = bits_N[i]
        octave = np.int64((bits >> np.uint32(23)) & np.uint32(255)) - 127
        size = octave + logs[(bits >> np.uint32(13)) & np.uint32(1023)] + slope * levels_N[i]
        step = np.int64(np.floor((size - LOWEST) * STEPS))
        out_N[i] = min(max(step, 0), BINS - 1)
