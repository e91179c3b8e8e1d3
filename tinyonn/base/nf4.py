"""NF4 there and back in one pass: what `bitsandbytes` makes of a tensor, without keeping the 4-bit codes.

Every 64 values share a scale ``absmax``, their largest absolute value; a value becomes the nearest of sixteen codes
(Dettmers et al. 2023, QLoRA, appendix E) times that scale. Bit for bit the same as
``dequantize_4bit(quantize_4bit(...))``, which a test compares, and some twenty times faster on a CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

BLOCK = 64


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A tensor after quantization to NF4 and back.

    Parameters
    ----------
    weight : bfloat16 or float32 tensor
        Blocks of 64 follow its order in memory.

    Returns
    -------
    tensor of the same dtype and shape
    """
    from bitsandbytes.functional import get_4bit_type

    codes = get_4bit_type("nf4", device="cpu").float().numpy()
    bounds = ((codes[1:] + codes[:-1]) / 2).astype(np.float32)
    flat = weight.detach().contiguous().reshape(-1)
    if weight.dtype == torch.bfloat16:
        bits = flat.view(torch.uint16).numpy()
        rounded = np.empty_like(bits)
        _round_bfloat16(bits, bounds, codes, rounded)
        return torch.from_numpy(rounded).view(torch.bfloat16).reshape(weight.shape)
    values = flat.float().numpy()
    out = np.empty_like(values)
    _round_float32(values, bounds, codes, out)
    return torch.from_numpy(out).to(weight.dtype).reshape(weight.shape)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _round_block(values: Any, largest: Any, bounds: Any, codes: Any, out: Any) -> None:
    """Round 64 values, which are scaled in place; loops have a fixed length, so that they are vectorised."""
    scale = np.float32(1) / max(largest, np.float32(1e-38))
    for i in range(BLOCK):
        values[i] = values[i] * scale
        out[i] = codes[0]
    for code in range(15):
        bound, above = bounds[code], codes[code + 1]
        for i in range(BLOCK):
            out[i] = above if values[i] > bound else out[i]
    for i in range(BLOCK):
        out[i] = out[i] * largest


@njit(inline="always")  # type: ignore[untyped-decorator]
def _round_rest(values: Any, count: Any, bounds: Any, codes: Any, out: Any) -> None:
    """Round the last, shorter block, which bitsandbytes divides instead of multiplying."""
    largest = np.float32(0)
    for i in range(count):
        largest = max(largest, abs(values[i]))
    largest = max(largest, np.float32(1e-38))
    for i in range(count):
        place = 0
        for bound in bounds:
            place += values[i] / largest > bound
        out[i] = codes[place] * largest


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _round_bfloat16(bits: Any, bounds: Any, codes: Any, rounded: Any) -> None:
    given, found = np.zeros(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    values, out = given.view(np.float32), found.view(np.float32)
    top = np.empty(1, np.uint32)
    largest = top.view(np.float32)
    half, one, shift = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    for begin in range(0, bits.size, BLOCK):
        count = min(BLOCK, bits.size - begin)
        if count == BLOCK:
            most = np.uint32(0)
            for i in range(BLOCK):
                given[i] = np.uint32(bits[begin + i]) << shift
                most = max(most, given[i] & np.uint32(0x7FFFFFFF))  # positive floats order like their bits
            top[0] = most
            _round_block(values, largest[0], bounds, codes, out)
        else:
            for i in range(count):
                given[i] = np.uint32(bits[begin + i]) << shift
            _round_rest(values, count, bounds, codes, out)
        for i in range(count):  # to the nearest, ties to even
            rounded[begin + i] = np.uint16((found[i] + half + ((found[i] >> shift) & one)) >> shift)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _round_float32(given: Any, bounds: Any, codes: Any, rounded: Any) -> None:
    values, out = np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for begin in range(0, given.size, BLOCK):
        count = min(BLOCK, given.size - begin)
        largest = np.float32(0)
        for i in range(count):
            values[i] = given[begin + i]
            largest = max(largest, abs(values[i]))
        if count == BLOCK:
            _round_block(values, largest, bounds, codes, out)
        else:
            _round_rest(values, count, bounds, codes, out)
        for i in range(count):
            rounded[begin + i] = out[i]
