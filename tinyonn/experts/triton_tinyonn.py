"""The sparse experts' kernels for CUDA. Tested in Triton's interpreter only; not yet measured on a GPU.

This file is saved beside exported models. Importing it without Triton raises ImportError, which its siblings expect.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the GPU kernels need triton; pip install triton") from error

ROWS = 16  # of a program that moves entries
ENTRIES = 32  # of a row at a time


@triton.jit  # type: ignore[untyped-decorator]
def _scatter(
    values_ptr: Any, columns_ptr: Any, pointer_ptr: Any, groups_ptr: Any, gates_ptr: Any, W_ptr: Any, out: Any,
    inputs: Any, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    group = tl.load(groups_ptr + tl.program_id(1)).to(tl.int64)
    gate = tl.load(gates_ptr + group).to(tl.float32)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = rows < out
    first = tl.load(pointer_ptr + group * out + rows, mask=here, other=0)
    last = tl.load(pointer_ptr + group * out + rows + 1, mask=here, other=0)
    for start in range(0, tl.max(last - first, axis=0), ENTRIES):
        entries = first[:, None] + start + tl.arange(0, ENTRIES)[None, :]
        mask = entries < last[:, None]
        columns = tl.load(columns_ptr + entries, mask=mask, other=0).to(tl.int64)
        values = tl.load(values_ptr + entries, mask=mask, other=0.0)
        gated = (values.to(tl.float32) * gate).to(values.dtype)
        tl.store(W_ptr + rows[:, None].to(tl.int64) * inputs + columns, gated, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(
    X_ptr: Any, values_ptr: Any, columns_ptr: Any, starts_ptr: Any, Y_ptr: Any, out: Any, inputs: Any,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row, token = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        mask = entries < last
        columns = tl.load(columns_ptr + entries, mask=mask, other=0).to(tl.int64)
        values = tl.load(values_ptr + entries, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X_ptr + token * inputs + columns, mask=mask, other=0.0).to(tl.float32)
        total += values * x
    tl.store(Y_ptr + token * out + row, tl.sum(total, axis=0))


def scatter(
    values: torch.Tensor,
    columns: torch.Tensor,
    row_pointer: torch.Tensor,
    gates_G: torch.Tensor,
    out: int,
    inputs: int,
) -> torch.Tensor:
    """The dense weight from the groups whose gate is not 0.

    Parameters
    ----------
    values, columns, row_pointer, out, inputs
        As in `ExpertMatrix`; contiguous.
    gates_G : float [groups]

    Returns
    -------
    tensor [out, inputs], dtype of the values
    """
    W_OI = values.new_zeros(out, inputs)
    groups = gates_G.nonzero()[:, 0]
    if groups.numel():
        grid = (triton.cdiv(out, ROWS), groups.numel())
        _scatter[grid](values, columns, row_pointer, groups, gates_G, W_OI, out, inputs, ROWS, ENTRIES)
    return W_OI


def decode(
    X_TI: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """The layer on few tokens from merged rows.

    Parameters
    ----------
    X_TI : float [tokens, inputs]
    values : float [entries]
    columns : uint16 [entries]
    starts : int32 [out + 1]

    Returns
    -------
    float32 [tokens, out]
    """
    tokens, inputs = X_TI.shape
    out = starts.numel() - 1
    Y_TO = torch.empty(tokens, out, dtype=torch.float32, device=X_TI.device)
    block = min(512, triton.next_power_of_2(max(32, values.numel() // out)))
    _decode[out, tokens](X_TI.contiguous(), values, columns, starts, Y_TO, out, inputs, block)
    return Y_TO
