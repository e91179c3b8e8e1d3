"""NF4 to values on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tinyonn.dense.nf4 import BLOCK, CODES

VALUES = 2048  # of a program

_TABLES: dict[torch.device, torch.Tensor] = {}


@triton.jit
def _dequantize(
    packed_ptr: tl.tensor, absmax_ptr: tl.tensor, codes_ptr: tl.tensor, out_ptr: tl.tensor, size: tl.tensor,
    ROUNDED: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    places = tl.program_id(0) * VALUES + tl.arange(0, VALUES)  # a layer has fewer than 2^31 weights
    mask = places < size
    byte = tl.load(packed_ptr + places // 2, mask=mask, other=0).to(tl.int32)
    number = tl.where(places % 2 == 0, byte >> 4, byte & 15)
    value = tl.load(codes_ptr + number) * tl.load(absmax_ptr + places // BLOCK, mask=mask, other=0.0)
    if ROUNDED:  # to nearest, ties to even, by hand: the interpreter cuts off
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(out_ptr + places, rounded.to(tl.int16), mask=mask)
    else:
        tl.store(out_ptr + places, value, mask=mask)


def dequantize(packed: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `tinyonn.dense.nf4.dequantize`; finite scales."""
    device, size = packed.device, 2 * packed.numel()
    if device not in _TABLES:
        _TABLES[device] = torch.tensor(CODES, device=device)
    out = torch.empty(size, dtype=dtype, device=device)
    half = dtype == torch.bfloat16
    grid = (triton.cdiv(size, VALUES),)
    target = out.view(torch.int16) if half else out
    _dequantize[grid](packed, absmax, _TABLES[device], target, size, half, VALUES, BLOCK)
    return out
