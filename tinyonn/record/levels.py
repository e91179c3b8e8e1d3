"""Levels: one sample's value of a statistic as an integer 0..15.

``level(v) = clip((bits(float32 |v|) >> 22) - base, 0, 15)``

The shifted bits are the exponent and the first bit of the mantissa, so there are two levels an octave (steps at
``2^n`` and ``1.5 * 2^n``) and eight octaves in all. It is integer arithmetic on the float's own bits: NumPy,
Numba, Torch and Triton agree on every bit. ``base`` is calibrated per tensor and statistic so that the median
lands on level 7; zero is level 0 and infinity would be level 15 (non-finite samples are set aside before).

A bfloat16 is the upper half of a float32, so its level is ``bits >> 6``.

What was not finite in a sample is asked once at its end: on a GPU every question before would wait for the device.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from tinyonn.store.records import UInt8

LEVELS = 16
MEDIAN_LEVEL = 7
SUM_SAMPLES = 17  # 17 samples of level 15 fill a uint8
FLOAT32_SHIFT = 22
HALF_OCTAVES = 512  # distinct values of bits >> 22 for a non-negative float32
FINITE_HALF_OCTAVES = 510  # shifted bits from here on are infinity or NaN
BLOCK = 1024  # slots of `Checks`
NOT_FINITE = 511  # half octave of a NaN


def levels(values: np.ndarray, base: int) -> UInt8:
    """Level of each value: the reference that the kernels are checked against.

    Parameters
    ----------
    values : float array, any shape; rounded to float32
    base : int

    Returns
    -------
    uint8, same shape, 0..15
    """
    bits = np.abs(np.asarray(values, dtype=np.float32)).view(np.int32) >> FLOAT32_SHIFT
    return np.asarray(np.clip(bits - base, 0, LEVELS - 1), dtype=np.uint8)


def levels_torch(values: torch.Tensor, base: int) -> torch.Tensor:
    """`levels` in Torch operations, on any device; uint8, same shape."""
    bits = values.to(torch.float32).abs().view(torch.int32) >> FLOAT32_SHIFT
    return (bits - base).clamp_(0, LEVELS - 1).to(torch.uint8)


def base_from_counts(counts: np.ndarray) -> int:
    """Base that puts the median at level 7.

    Parameters
    ----------
    counts : int64 [512]
        How often each value of ``bits >> 22`` occurred; bin 0 (zero and the smallest denormals) is left out
        of the median unless nothing else occurred.
    """
    counts = counts.astype(np.int64).copy()
    if counts[1:].sum() > 0:
        counts[0] = 0
    total = int(counts.sum())
    if total == 0:
        return 0
    median = int(np.searchsorted(np.cumsum(counts), (total + 1) // 2))
    return max(median - MEDIAN_LEVEL, 0)  # a negative base would lift zeros off level 0


@njit(nogil=True, cache=True, boundscheck=False)
def add_levels_float32(bits: np.ndarray, base: int, sums: UInt8) -> int:
    """Add the level of every value to uint8 sums.

    Parameters
    ----------
    bits : int32 [n]
        Float32 values viewed as int32.
    base : int
    sums : uint8 [n]
        Must have room: at most 17 samples since the last spill.

    Returns
    -------
    int
        Largest ``bits >> 22`` seen; 510 or more means a value was not finite.
    """
    low = np.int32(base)
    top = np.int32(0)
    for i in range(bits.size):
        half_octave = (bits[i] & np.int32(0x7FFFFFFF)) >> np.int32(22)
        top = max(top, half_octave)
        sums[i] += np.uint8(min(max(half_octave - low, np.int32(0)), np.int32(15)))
    return int(top)


@njit(nogil=True, cache=True, boundscheck=False)
def add_levels_bfloat16(bits: np.ndarray, base: int, sums: UInt8) -> int:
    """`add_levels_float32` for bfloat16 values viewed as int16 [n]."""
    low = np.int16(base)
    top = np.int16(0)
    for i in range(bits.size):
        half_octave = np.int16((bits[i] & np.int16(0x7FFF)) >> np.int16(6))
        top = max(top, half_octave)
        sums[i] += np.uint8(min(max(np.int16(half_octave - low), np.int16(0)), np.int16(15)))
    return int(top)


class Checks:
    """An int32 slot for each thing that may be not finite, for the largest half octave (``bits >> 22``) seen of it.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[torch.Tensor] = []
        self._names: list[str] = []

    def slot(self, name: str) -> torch.Tensor:
        """A new slot, int32 [1], holding 0; kernels and `raise_top` raise it."""
        block, place = divmod(len(self._names), BLOCK)
        if block == len(self._blocks):
            self._blocks.append(torch.zeros(BLOCK, dtype=torch.int32, device=self._device))
        self._names.append(name)
        return self._blocks[block][place : place + 1]

    def add(self, name: str, finite: bool | torch.Tensor) -> None:
        """Note whether something was finite; a tensor stays where it is."""
        if isinstance(finite, torch.Tensor):
            raise_top(self.slot(name), (~finite).int() * NOT_FINITE)
        else:
            raise_top(self.slot(name), NOT_FINITE * (not finite))

    def first(self) -> str | None:
        """Name of the first slot that holds a value that is not finite. Waits for the device."""
        used = (len(self._names) + BLOCK - 1) // BLOCK
        tops = torch.cat(self._blocks[:used]).cpu()[: len(self._names)] if used else torch.zeros(0)
        wrong = (tops >= FINITE_HALF_OCTAVES).nonzero()
        return self._names[int(wrong[0])] if len(wrong) else None

    def clear(self) -> None:
        """Begin a new sample."""
        for block in self._blocks:
            block.zero_()
        self._names.clear()


def raise_top(top: torch.Tensor, seen: int | torch.Tensor) -> None:
    """Raise a slot, int32 [1], to a half octave."""
    if isinstance(seen, torch.Tensor):
        torch.maximum(top, seen.reshape(1).to(torch.int32), out=top)
    elif seen:
        top.clamp_(min=seen)
