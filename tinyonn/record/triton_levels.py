"""The level kernel for CUDA: read a band of the gradient once, update the uint8 sums in place, keep the maximum."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _add_levels(
    bits_ptr: Any, sums_ptr: Any, top_ptr: Any, size: Any, base: Any,
    MAGNITUDE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    bits = tl.load(bits_ptr + offsets, mask=mask, other=0).to(tl.int32)
    half_octaves = (bits & MAGNITUDE) >> SHIFT
    level = tl.minimum(tl.maximum(half_octaves - base, 0), 15)
    sums = tl.load(sums_ptr + offsets, mask=mask, other=0).to(tl.int32)
    tl.store(sums_ptr + offsets, (sums + level).to(tl.uint8), mask=mask)
    tl.atomic_max(top_ptr, tl.max(half_octaves, axis=0))


def add_levels_triton(values: torch.Tensor, base: int, sums: torch.Tensor) -> torch.Tensor:
    """Add the levels of a band to its sums.

    Parameters
    ----------
    values : float32 or bfloat16 [n], contiguous
    base : int
    sums : uint8 [n], contiguous, changed in place; room for one more sample

    Returns
    -------
    int32 tensor []
        Largest half octave seen; it stays on the device, so that the caller waits once a sample.
    """
    half = values.dtype == torch.bfloat16
    bits = values.view(torch.int16 if half else torch.int32)
    top = torch.zeros((), dtype=torch.int32, device=values.device)
    _add_levels[(triton.cdiv(values.numel(), BLOCK),)](
        bits, sums, top, values.numel(), base, 0x7FFF if half else 0x7FFFFFFF, 6 if half else 22, BLOCK
    )
    return top
