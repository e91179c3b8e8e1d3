"""NF4 there and back in one pass: what `bitsandbytes` makes of a tensor, without keeping the 4-bit codes.

Every 64 values share a scale ``absmax``, their largest absolute value; a value becomes the nearest of sixteen codes
(Dettmers et al. 2023, QLoRA, appendix E) times that scale. Bit for bit the same as
``dequantize_4bit(quantize_4bit(...))``, which a test compares, and several times faster on a CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

BLOCK = 64
STEPS = 1024  # far finer than the codes lie: a step has at most one bound between two of them


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A tensor after quantization to NF4 and back.

    Parameters
    ----------
    weight : bfloat16 or float32 tensor
        Contiguous; blocks of 64 follow its order in memory.

    Returns
    -------
    tensor of the same dtype and shape
    """
    from bitsandbytes.functional import get_4bit_type

    codes = get_4bit_type("nf4", device="cpu").float().numpy()
    bounds = np.append((codes[1:] + codes[:-1]) / 2, np.inf).astype(np.float32)
    places = _places(bounds)
    flat = weight.detach().contiguous().reshape(-1)
    if weight.dtype == torch.bfloat16:
        bits = flat.view(torch.uint16).numpy()
        rounded = np.empty_like(bits)
        _round_bfloat16(bits, bounds, codes, places, rounded)
        return torch.from_numpy(rounded).view(torch.bfloat16).reshape(weight.shape)
    values = flat.float().numpy()
    out = np.empty_like(values)
    _round_float32(values, bounds, codes, places, out)
    return torch.from_numpy(out).to(weight.dtype).reshape(weight.shape)


def _places(bounds: np.ndarray) -> np.ndarray:
    """For each of 1,024 steps from -1 to 1 the lowest code in or just before it: uint8 [1025]."""
    lowest = np.arange(STEPS + 1) * (2 / STEPS) - 1 - 1e-3
    return np.searchsorted(bounds, lowest).astype(np.uint8)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _round_block(values: Any, bounds: Any, codes: Any, places: Any) -> None:
    """Round a block of float32 in place; bounds end with infinity."""
    largest = np.float32(0)
    for i in range(values.size):
        largest = max(largest, abs(values[i]))
    floor = max(largest, np.float32(1e-38))
    scale = np.float32(1) / floor
    if values.size == BLOCK:  # as bitsandbytes does, to the last bit
        for i in range(BLOCK):
            values[i] = values[i] * scale
    else:
        for i in range(values.size):
            values[i] = values[i] / floor
    middle = np.float32(STEPS // 2)
    for i in range(values.size):
        value = min(max(values[i], np.float32(-1)), np.float32(1))
        place = places[np.int32(value * middle + middle)]
        values[i] = codes[place + (value > bounds[place])] * largest


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _round_bfloat16(bits: Any, bounds: Any, codes: Any, places: Any, rounded: Any) -> None:
    wide = np.empty(BLOCK, np.uint32)
    values = wide.view(np.float32)
    half, one = np.uint32(0x7FFF), np.uint32(1)
    for begin in range(0, bits.size, BLOCK):
        n = min(BLOCK, bits.size - begin)
        for i in range(n):
            wide[i] = np.uint32(bits[begin + i]) << np.uint32(16)
        _round_block(values[:n], bounds, codes, places)
        for i in range(n):  # to the nearest, ties to even
            rounded[begin + i] = (wide[i] + half + ((wide[i] >> np.uint32(16)) & one)) >> np.uint32(16)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _round_float32(given: Any, bounds: Any, codes: Any, places: Any, out: Any) -> None:
    for begin in range(0, given.size, BLOCK):
        end = min(begin + BLOCK, given.size)
        out[begin:end] = given[begin:end]
        _round_block(out[begin:end], bounds, codes, places)
