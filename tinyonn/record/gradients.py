"""Weight gradients formed band by band and turned into level sums at once.

``grad_ij = |sum_t G_ti X_tj|``: a band of rows of the product stays in the cache, its levels are added to uint8 sums
and the band is overwritten by the next, so that no whole weight gradient ever exists. Up to 17 samples fit in a
uint8; then the sums are spilled into uint16, which saturates and never wraps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from numba import njit

from tinyonn.record.device import gpu_kernels, on_host
from tinyonn.record.levels import (
    FLOAT32_SHIFT,
    HALF_OCTAVES,
    add_levels_bfloat16,
    add_levels_float32,
    levels_torch,
    raise_top,
)
from tinyonn.store.records import UInt8, UInt16

BAND_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # about an L2 cache; a GPU wants few launches
PARALLEL_ELEMENTS = 1 << 17


def band_height(columns: int, itemsize: int, device: str = "cpu") -> int:
    """Rows of a band, a multiple of 64: the same on every machine, because it decides how products are rounded."""
    return max(64, BAND_BYTES[device] // (columns * itemsize) // 64 * 64)


def product_bands(A_TR: torch.Tensor, B_TC: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Bands of ``A.T @ B``.

    Parameters
    ----------
    A_TR, B_TC : [T, R], [T, C], same dtype and device

    Yields
    ------
    first : int
        Row of the band.
    band : [rows, C]
        Overwritten by the next one.
    """
    rows, columns = A_TR.shape[1], B_TC.shape[1]
    height = min(rows, band_height(columns, B_TC.element_size(), B_TC.device.type))
    buffer = _buffer(height * columns, B_TC.dtype, B_TC.device)
    for first in range(0, rows, height):
        last = min(first + height, rows)
        band = buffer[: (last - first) * columns].view(last - first, columns)
        torch.mm(A_TR[:, first:last].T, B_TC, out=band)
        yield first, band


_BUFFERS: dict[tuple[torch.dtype, torch.device, int], torch.Tensor] = {}


def _buffer(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Room for a band, kept from layer to layer: fresh pages cost more than the levels. One per thread."""
    key = (dtype, device, threading.get_ident())
    if key not in _BUFFERS or _BUFFERS[key].numel() < size:
        _BUFFERS[key] = torch.empty(size, dtype=dtype, device=device)
    return _BUFFERS[key]


class LevelSink:
    """Adds the levels of gradients to uint8 sums that lie on the gradients' device.

    Parameters
    ----------
    sums : uint8 [rows, columns]
    base : int
    pool : Executor, optional
        Takes half of every large band on a second CPU thread.
    """

    def __init__(self, sums: torch.Tensor, base: int, pool: Executor | None = None) -> None:
        self.sums, self.base, self.pool = sums, base, pool
        self._host = sums.numpy().reshape(-1) if on_host(sums) else None

    def add(self, band: torch.Tensor, first: int, top: torch.Tensor) -> None:
        """Add whole rows [first, ...), [rows, columns]; raises `top`, int32 [1], to the largest half octave seen."""
        if self._host is None:
            part = self.sums[first : first + band.shape[0]]
            _add_on_device(band.reshape(-1), self.base, part.view(-1), top)
            return
        bits, kernel = _bits(band)
        start = first * band.shape[1]
        host = self._host[start : start + bits.size]
        if self.pool is None or bits.size < PARALLEL_ELEMENTS:
            raise_top(top, int(kernel(bits, self.base, host)))
        else:
            raise_top(
                top, _in_halves(lambda a, b: kernel(bits[a:b], self.base, host[a:b]), bits.size, self.pool)
            )

    def add_rows(self, rows: torch.Tensor, values: torch.Tensor, top: torch.Tensor) -> None:
        """Add distinct rows, float32 [len(rows), columns]."""
        self.sums[rows] += levels_torch(values, self.base)
        _raise(top, values)


class CountSink:
    """Counts half octaves (``bits >> 22``) into int64 [512]: the calibration's first pass.

    Attributes
    ----------
    counts : int64 [512]
        Of the batches that were kept.
    batch : int64 [512]
        Of the batch under way.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(HALF_OCTAVES, np.int64)
        self.batch = np.zeros(HALF_OCTAVES, np.int64)

    def keep(self) -> None:
        """The batch under way was good."""
        self.counts += self.batch
        self.forget()

    def forget(self) -> None:
        """The batch under way is begun again."""
        self.batch[:] = 0

    def add(self, band: torch.Tensor, first: int, top: torch.Tensor) -> None:
        """Count a band; see `LevelSink.add`."""
        half_octaves = _half_octaves(band).reshape(-1)
        counts = torch.bincount(half_octaves, minlength=HALF_OCTAVES)
        self.batch += counts.cpu().numpy()
        raise_top(top, half_octaves.max())

    def add_rows(self, rows: torch.Tensor, values: torch.Tensor, top: torch.Tensor) -> None:
        """Count distinct rows."""
        self.add(values, 0, top)


def _half_octaves(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float32).abs().view(torch.int32) >> FLOAT32_SHIFT


def _raise(top: torch.Tensor, values: torch.Tensor) -> None:
    if values.numel():
        raise_top(top, _half_octaves(values).max())


def _bits(band: torch.Tensor) -> tuple[Any, Any]:
    if band.dtype == torch.bfloat16:
        return band.view(torch.int16).numpy().reshape(-1), add_levels_bfloat16
    return band.view(torch.int32).numpy().reshape(-1), add_levels_float32


def _in_halves(kernel: Callable[[int, int], int], size: int, pool: Executor) -> int:
    other = pool.submit(kernel, size // 2, size)
    return max(kernel(0, size // 2), other.result())


def _add_on_device(values: torch.Tensor, base: int, sums: torch.Tensor, top: torch.Tensor) -> None:
    if (gpu := gpu_kernels(values)) is not None:
        gpu.add_levels(values, base, sums, top)
    else:
        sums += levels_torch(values, base)
        _raise(top, values)


@njit(nogil=True, cache=True)
def spill(sums: UInt8, total: UInt16) -> None:
    """Move flat uint8 sums into uint16 sums, saturating, and clear them."""
    for i in range(sums.size):
        total[i] = np.uint16(min(np.uint32(total[i]) + np.uint32(sums[i]), np.uint32(65535)))
        sums[i] = 0
