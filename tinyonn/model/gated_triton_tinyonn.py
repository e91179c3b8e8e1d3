"""Kernels for training on CUDA: every sample's own weight, made tile by tile from one dense array of all groups.

    W_b = gate_b[groups_OI] * V_OI,   Y_BTO = X_BTI W_b^T,   dX_BTI = G_BTO W_b,
    dV_OI = sum over b of gate_b[groups_OI] * (G_b^T X_b)

V holds the entries' values and groups_OI the number of the group that a weight belongs to (255: none), so a product
reads 3 bytes a weight of bfloat16 values, or 5 of float32 ones, and writes none. gate * value is a float32 rounded
once, to the dtype of the product, as on the CPU; a gate of 0 leaves a value out whatever it is. Sums are float32, in an
order that shape and kind of card decide: the same input gives the same bits.

Measured on an H100: docs/decisions/020.

Shape suffixes: ``B`` samples, ``T`` tokens, ``I`` inputs, ``O`` outputs, ``G`` groups, ``P`` samples of a chunk. This
file is saved beside exported models. Importing it without Triton raises ImportError, which its siblings expect.
"""

# Arguments of kernels are annotated as tl.tensor, not Any: the compiler, unlike the interpreter, looks annotations up
# and refuses what is not Triton's.

from __future__ import annotations

import contextlib
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from .matrix_tinyonn import ExpertMatrix

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the GPU kernels need triton; pip install triton") from error

__all__ = [
    "MAX_GROUPS", "Spread", "dense_weight", "dense_weights", "gate_sums", "gated_gradient", "gated_product",
    "gather", "spread",
]  # fmt: skip

MAX_GROUPS = 254
TABLE = 256  # gates of a sample, padded with zeros: 255 is no group's
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROWS, ENTRIES = 8, 64  # of a program that moves entries; of each row at a time
SUM_ROWS = 64  # of a program that adds up a group's entries
WEIGHTS = 2048  # of a program that makes whole weights
LARGE_SHARED = 200 << 10  # bytes of shared memory a block: of a data centre's cards; others have some 100 KiB


class Spread(NamedTuple):
    """A compressed matrix as dense arrays.

    Attributes
    ----------
    values_OI : bfloat16 or float32 [out, inputs]
        Anything where there is no entry.
    groups_OI : uint8 [out, inputs]
        255 where there is no entry.
    """

    values_OI: torch.Tensor
    groups_OI: torch.Tensor


class _Tile(NamedTuple):
    """Launch options of a product: of the dense result's rows and columns, or weights and tokens."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# One for each shape, never chosen by timing: results' bits hang on it
FLOAT32_TILE = _Tile(64, 64, 32, 4, 2)
TILES = {
    False: (_Tile(128, 64, 32, 8, 3), _Tile(128, 128, 32, 8, 3)),
    True: (_Tile(128, 64, 64, 8, 3), _Tile(128, 128, 64, 8, 3), _Tile(128, 256, 64, 8, 3)),
}
GRADIENT_TILES = {False: _Tile(128, 128, 32, 8, 3), True: _Tile(128, 128, 64, 8, 3)}


@triton.jit
def _spread(
    values_ptr: tl.tensor, columns_ptr: tl.tensor, pointer_ptr: tl.tensor, gates_ptr: tl.tensor,
    V_ptr: tl.tensor, groups_ptr: tl.tensor, out: tl.tensor, inputs: tl.tensor, GATED: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    group = tl.program_id(0)  # a row's groups one after another: its lines are still in the cache
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < out
    first = tl.load(pointer_ptr + group.to(tl.int64) * out + rows, mask=here, other=0)
    last = tl.load(pointer_ptr + group.to(tl.int64) * out + rows + 1, mask=here, other=0)
    for start in range(0, tl.max(last - first, axis=0), ENTRIES):
        entries = first[:, None] + start + tl.arange(0, ENTRIES)[None, :]
        mask = entries < last[:, None]
        places = rows[:, None] * inputs + tl.load(columns_ptr + entries, mask=mask, other=0).to(tl.int64)
        values = tl.load(values_ptr + entries, mask=mask, other=0.0)
        if GATED:
            gate = tl.load(gates_ptr + group)
            values = tl.where(gate == 0, 0.0, values.to(tl.float32) * gate)
        else:
            tl.store(groups_ptr + places, (tl.zeros_like(places) + group).to(tl.uint8), mask=mask)
        tl.store(V_ptr + places, values.to(V_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fill(
    V_ptr: tl.tensor, groups_ptr: tl.tensor, gates_ptr: tl.tensor, W_ptr: tl.tensor, samples: tl.tensor,
    weights: tl.tensor, TABLE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < weights
    groups = tl.load(groups_ptr + places, mask=mask, other=255).to(tl.int32)
    values = tl.load(V_ptr + places, mask=mask, other=0.0).to(tl.float32)
    for _ in range(samples):
        gates = tl.load(gates_ptr + groups)
        W = tl.where(gates == 0, 0.0, values * gates)
        tl.store(W_ptr + places, W.to(W_ptr.dtype.element_ty), mask=mask)
        gates_ptr += TABLE
        W_ptr += weights


@triton.jit
def _product(
    X_ptr: tl.tensor, V_ptr: tl.tensor, groups_ptr: tl.tensor, gates_ptr: tl.tensor, bias_ptr: tl.tensor,
    Y_ptr: tl.tensor, samples: tl.tensor, tokens: tl.tensor, out: tl.tensor, inputs: tl.tensor,
    out_stride: tl.tensor, inputs_stride: tl.tensor, TABLE: tl.constexpr, BIAS: tl.constexpr,
    WIDEN: tl.constexpr, OUT: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    # What uses the same rows of V runs at the same time
    blocks = tl.cdiv(tokens, TOKENS)
    number = tl.program_id(0)
    b = (number // blocks) % samples
    t = (number % blocks) * TOKENS + tl.arange(0, TOKENS)
    o = number // blocks // samples * OUT + tl.arange(0, OUT)
    i = tl.arange(0, DEPTH)
    X_ptrs = X_ptr + (b.to(tl.int64) * tokens + t[None, :]) * inputs + i[:, None]
    places = o[:, None].to(tl.int64) * out_stride + i[None, :] * inputs_stride
    V_ptrs, groups_ptrs = V_ptr + places, groups_ptr + places
    gates_ptr += b * TABLE
    Y = tl.zeros([OUT, TOKENS], tl.float32)
    for start in range(0, inputs, DEPTH):
        left = i < inputs - start
        inside = (o[:, None] < out) & left[None, :]
        X = tl.load(X_ptrs, mask=left[:, None] & (t[None, :] < tokens), other=0.0)
        groups = tl.load(groups_ptrs, mask=inside, other=255).to(tl.int32)
        values = tl.load(V_ptrs, mask=inside, other=0.0).to(tl.float32)
        gates = tl.load(gates_ptr + groups)
        W = tl.where(gates == 0, 0.0, values * gates).to(X_ptr.dtype.element_ty)
        if WIDEN:  # the interpreter does not multiply bfloat16
            W, X = W.to(tl.float32), X.to(tl.float32)
        Y = tl.dot(W, X, Y, input_precision="ieee")
        X_ptrs += DEPTH
        V_ptrs += DEPTH * inputs_stride
        groups_ptrs += DEPTH * inputs_stride
    if BIAS:
        Y += tl.load(bias_ptr + o, mask=o < out, other=0.0).to(tl.float32)[:, None]
    Y_ptrs = Y_ptr + (b.to(tl.int64) * tokens + t[None, :]) * out + o[:, None]
    tl.store(Y_ptrs, Y.to(Y_ptr.dtype.element_ty), mask=(o[:, None] < out) & (t[None, :] < tokens))


@triton.jit
def _gradient(
    G_ptr: tl.tensor, X_ptr: tl.tensor, groups_ptr: tl.tensor, gates_ptr: tl.tensor, D_ptr: tl.tensor,
    samples: tl.tensor, tokens: tl.tensor, out: tl.tensor, inputs: tl.tensor, groups_stride: tl.tensor,
    G_stride: tl.tensor, X_stride: tl.tensor, TABLE: tl.constexpr, WIDEN: tl.constexpr, OUT: tl.constexpr,
    INPUTS: tl.constexpr, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    i = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    t = tl.arange(0, DEPTH)
    places = o[:, None].to(tl.int64) * inputs + i[None, :]
    inside = (o[:, None] < out) & (i[None, :] < inputs)
    D = tl.zeros([OUT, INPUTS], tl.float32)
    for _ in range(samples):
        G_ptrs = G_ptr + t[:, None].to(tl.int64) * out + o[None, :]
        X_ptrs = X_ptr + t[:, None].to(tl.int64) * inputs + i[None, :]
        part = tl.zeros([OUT, INPUTS], tl.float32)
        for start in range(0, tokens, DEPTH):
            left = t[:, None] < tokens - start
            G = tl.load(G_ptrs, mask=left & (o[None, :] < out), other=0.0)
            X = tl.load(X_ptrs, mask=left & (i[None, :] < inputs), other=0.0)
            if WIDEN:
                G, X = G.to(tl.float32), X.to(tl.float32)
            part = tl.dot(tl.trans(G), X, part, input_precision="ieee")
            G_ptrs += DEPTH * out
            X_ptrs += DEPTH * inputs
        # Read again for each sample, at a stride of 0: kept meanwhile they would take the sums' registers
        groups = tl.load(groups_ptr + places, mask=inside, other=255).to(tl.int32)
        gates = tl.load(gates_ptr + groups)
        D += tl.where(gates == 0, 0.0, gates * part)
        groups_ptr += groups_stride
        gates_ptr += TABLE
        G_ptr += G_stride
        X_ptr += X_stride
    tl.store(D_ptr + places, D, mask=inside)


@triton.jit
def _gather(
    D_ptr: tl.tensor, columns_ptr: tl.tensor, pointer_ptr: tl.tensor, gates_ptr: tl.tensor,
    of_values_ptr: tl.tensor, samples: tl.tensor, groups: tl.tensor, out: tl.tensor, inputs: tl.tensor,
    weights: tl.tensor, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    group = tl.program_id(0)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < out
    first = tl.load(pointer_ptr + group.to(tl.int64) * out + rows, mask=here, other=0)
    last = tl.load(pointer_ptr + group.to(tl.int64) * out + rows + 1, mask=here, other=0)
    for start in range(0, tl.max(last - first, axis=0), ENTRIES):
        entries = first[:, None] + start + tl.arange(0, ENTRIES)[None, :]
        mask = entries < last[:, None]
        places = rows[:, None] * inputs + tl.load(columns_ptr + entries, mask=mask, other=0).to(tl.int64)
        total = tl.load(of_values_ptr + entries, mask=mask, other=0.0)
        for b in range(samples):
            gate = tl.load(gates_ptr + b * groups + group)
            D = tl.load(D_ptr + places, mask=mask, other=0.0).to(tl.float32)
            total += tl.where(gate == 0, 0.0, gate * D)
            places += weights
        tl.store(of_values_ptr + entries, total, mask=mask)


@triton.jit
def _gate_sums(
    D_ptr: tl.tensor, values_ptr: tl.tensor, columns_ptr: tl.tensor, pointer_ptr: tl.tensor,
    sums_ptr: tl.tensor, groups: tl.tensor, out: tl.tensor, inputs: tl.tensor, ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    group, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < out
    first = tl.load(pointer_ptr + group.to(tl.int64) * out + rows, mask=here, other=0)
    last = tl.load(pointer_ptr + group.to(tl.int64) * out + rows + 1, mask=here, other=0)
    total = tl.zeros([ROWS, ENTRIES], tl.float32)
    for start in range(0, tl.max(last - first, axis=0), ENTRIES):
        entries = first[:, None] + start + tl.arange(0, ENTRIES)[None, :]
        mask = entries < last[:, None]
        places = (b.to(tl.int64) * out + rows[:, None]) * inputs
        places += tl.load(columns_ptr + entries, mask=mask, other=0).to(tl.int64)
        values = tl.load(values_ptr + entries, mask=mask, other=0.0).to(tl.float32)
        total += values * tl.load(D_ptr + places, mask=mask, other=0.0).to(tl.float32)
    at = (b.to(tl.int64) * tl.num_programs(1) + block) * groups + group
    tl.store(sums_ptr + at, tl.sum(tl.sum(total, axis=1), axis=0))


def spread(matrix: ExpertMatrix) -> Spread:
    """The matrix as dense arrays, for the other calls of a pass.

    Parameters
    ----------
    matrix : ExpertMatrix
        Of at most 254 groups.

    Returns
    -------
    Spread
        3 bytes a weight of bfloat16 values, 5 of float32 ones.

    Raises
    ------
    ValueError
        More groups than a byte numbers.
    """
    if matrix.groups > MAX_GROUPS:
        raise ValueError(
            f"{matrix.groups} groups are more than the {MAX_GROUPS} that a byte numbers; use plain Torch"
        )
    values, columns, pointer = _parts(matrix)
    values_OI = values.new_empty(matrix.out, matrix.inputs)
    groups_OI = values.new_full(values_OI.shape, 255, dtype=torch.uint8)
    with _device_of(values):
        _spread[_rows(matrix, ROWS)](
            values,
            columns,
            pointer,
            values,
            values_OI,
            groups_OI,
            matrix.out,
            matrix.inputs,
            False,
            ROWS,
            ENTRIES,
        )
    return Spread(values_OI, groups_OI)


def dense_weight(matrix: ExpertMatrix, gates_G: torch.Tensor, W_OI: torch.Tensor) -> None:
    """Write the dense weight of one row of gates.

    Parameters
    ----------
    matrix : ExpertMatrix
    gates_G : float [groups]
    W_OI : bfloat16 or float32 [out, inputs]
        Written.
    """
    W_OI.zero_()
    gates_G = gates_G.float().contiguous()
    with _device_of(W_OI):
        _spread[_rows(matrix, ROWS)](
            *_parts(matrix), gates_G, W_OI, gates_G, matrix.out, matrix.inputs, True, ROWS, ENTRIES
        )


def dense_weights(dense: Spread, gates_PG: torch.Tensor, W_POI: torch.Tensor) -> None:
    """Write the dense weight [out, inputs], bfloat16 or float32, of one row of gates, float [groups]."""
    weights = dense.values_OI.numel()
    with _device_of(W_POI):
        _fill[(triton.cdiv(weights, WEIGHTS),)](
            *dense, _table(gates_PG), W_POI, len(W_POI), weights, TABLE, WEIGHTS, num_warps=8
        )


def gated_product(
    X_BTI: torch.Tensor,
    dense: Spread,
    gates_BG: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """Write the dense weights [samples, out, inputs], bfloat16 or float32, of gates, float [samples, groups]."""
    samples, tokens, depth = X_BTI.shape
    out, inputs = dense.values_OI.shape
    size, strides = (inputs, (1, inputs)) if transposed else (out, (inputs, 1))
    Y = X_BTI.new_empty(samples, tokens, size)
    tile = _product_tile(X_BTI, tokens)
    grid = (triton.cdiv(tokens, tile.columns) * samples * triton.cdiv(size, tile.rows),)
    with _device_of(Y):
        _product[grid](
            X_BTI.contiguous(), *dense, _table(gates_BG), Y if bias is None else bias.contiguous(), Y, samples,
            tokens, size, depth, *strides, TABLE, bias is not None, INTERPRETED, tile.rows, tile.columns, tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return Y


def gated_gradient(
    G_BTO: torch.Tensor, X_BTI: torch.Tensor, dense: Spread, gates_BG: torch.Tensor
) -> torch.Tensor:
    """The gradient at every weight's place: the sum over samples of gate times gradient of the sample's weight.

    Parameters
    ----------
    G_BTO : bfloat16 or float32 [samples, tokens, out]
    X_BTI : as `G_BTO` [samples, tokens, inputs]
    dense : Spread
    gates_BG : float [samples, groups]

    Returns
    -------
    float32 [out, inputs]
        0 where there is no entry.
    """
    samples, tokens, inputs = X_BTI.shape
    out = G_BTO.shape[-1]
    D_OI = torch.empty(out, inputs, dtype=torch.float32, device=X_BTI.device)
    tile = _gradient_tile(X_BTI)
    with _device_of(D_OI):
        _gradient[triton.cdiv(out, tile.rows), triton.cdiv(inputs, tile.columns)](
            G_BTO.contiguous(), X_BTI.contiguous(), dense.groups_OI, _table(gates_BG), D_OI, samples, tokens, out,
            inputs, 0, tokens * out, tokens * inputs, TABLE, INTERPRETED, tile.rows, tile.columns, tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return D_OI


def gather(
    matrix: ExpertMatrix, D_POI: torch.Tensor, gates_PG: torch.Tensor, of_values: torch.Tensor
) -> None:
    """Add to each entry, float32 [entries], the sum over samples of gate times what lies at its place in `D_POI`."""
    with _device_of(D_POI):
        _gather[_rows(matrix, ROWS)](
            D_POI, *_parts(matrix)[1:], gates_PG.float().contiguous(), of_values, len(D_POI),
            matrix.groups, matrix.out, matrix.inputs, matrix.out * matrix.inputs, ROWS, ENTRIES,
        )  # fmt: skip


def gate_sums(matrix: ExpertMatrix, D_POI: torch.Tensor) -> torch.Tensor:
    """Sums over a group's entries of value times what lies at their places.

    Parameters
    ----------
    matrix : ExpertMatrix
    D_POI : bfloat16 or float32 [samples, out, inputs]

    Returns
    -------
    float64 [samples, groups]
    """
    groups, blocks = _rows(matrix, SUM_ROWS)
    sums = torch.empty(len(D_POI), blocks, groups, dtype=torch.float32, device=D_POI.device)
    with _device_of(D_POI):
        _gate_sums[groups, blocks, len(D_POI)](
            D_POI, *_parts(matrix), sums, groups, matrix.out, matrix.inputs,
            SUM_ROWS, ENTRIES, num_warps=8,
        )  # fmt: skip
    return sums.double().sum(1)


def _parts(matrix: ExpertMatrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return matrix.values.contiguous(), matrix.columns.contiguous(), matrix.row_pointer.contiguous()


def _rows(matrix: ExpertMatrix, rows: int) -> tuple[int, int]:
    return matrix.groups, triton.cdiv(matrix.out, rows)


def _table(gates_BG: torch.Tensor) -> torch.Tensor:
    return functional.pad(gates_BG.float(), (0, TABLE - gates_BG.shape[1])).contiguous()


def _device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Sums over a group's entries of value times what lies at their places, float64 [samples, groups]."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _product_tile(X: torch.Tensor, tokens: int) -> _Tile:
    """A weight is made once for all tokens, or for as many as registers hold sums for."""
    if X.dtype == torch.float32:
        return FLOAT32_TILE
    tiles = TILES[_large(X)]
    return next((tile for tile in tiles if tile.columns >= tokens), tiles[-1])


def _gradient_tile(X: torch.Tensor) -> _Tile:
    return FLOAT32_TILE if X.dtype == torch.float32 else GRADIENT_TILES[_large(X)]


def _large(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and _shared_memory(tensor.device) >= LARGE_SHARED


@cache
def _shared_memory(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
