"""The recorder's kernels for CUDA, measured on an H100: docs/decisions/020.

Each gives the bits of its twin for the CPU or of plain Torch: levels are integer arithmetic, float sums keep the
CPU's order, and nothing is contracted to fused multiply-adds. None waits for the device: what was not finite is left
in an int32 slot, which the recorder reads once a sample.

- `add_levels`: a band of a gradient was formed by a product; it is read once, its sums are read and written. 4 bytes a
  weight with bfloat16, 6 with float32.
- `add_product_levels`: product and levels in one: tiles of the gradient stay in registers and only the sums, 2 bytes a
  weight, cross the memory. The product is a plain tiled one, so it loses to a library's where there are many tokens.
- `column_bins`: mean squares of inputs in chunks of tokens, then their bins.
- `add_row_levels`, `add_rows`: an embedding's gradient, row by row, tokens in their order.
- `add_dense_levels`: `act` and `freq` of a tied tensor.

What differs from tensor to tensor or from sample to sample is not specialised on, so that each kernel is compiled once
or twice. Arguments are annotated as tl.tensor: the compiler, unlike the interpreter, refuses what is not Triton's.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from tinyonn.record.activations import BINS, COLUMN_LOW, QUARTERS, TOKEN_CHUNK

BLOCK = 4096
ROW_BLOCK = 256  # columns of a program that sums rows
COLUMN_BLOCK = 128  # columns of a program that squares inputs


@triton.jit
def _level(half_octaves: tl.tensor, base: tl.tensor) -> tl.tensor:
    return tl.minimum(tl.maximum(half_octaves - base, 0), 15)


@triton.jit(do_not_specialize=["top_ptr", "base"])
def _add_levels(
    bits_ptr: tl.tensor, sums_ptr: tl.tensor, top_ptr: tl.tensor, size: tl.tensor, base: tl.tensor,
    MAGNITUDE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    mask = lanes < size - start
    half_octaves = (tl.load(bits_ptr + start + lanes, mask=mask, other=0).to(tl.int32) & MAGNITUDE) >> SHIFT
    sums = tl.load(sums_ptr + start + lanes, mask=mask, other=0)
    tl.store(sums_ptr + start + lanes, sums + _level(half_octaves, base).to(tl.uint8), mask=mask)
    tl.atomic_max(top_ptr, tl.max(half_octaves, axis=0))


@triton.jit(do_not_specialize=["top_ptr", "base", "T"])
def _add_product_levels(
    A_ptr: tl.tensor, B_ptr: tl.tensor, sums_ptr: tl.tensor, top_ptr: tl.tensor, T: tl.tensor, R: tl.tensor,
    C: tl.tensor, stride_a: tl.tensor, stride_b: tl.tensor, base: tl.tensor, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, ACROSS: tl.constexpr, EXACT: tl.constexpr,
) -> None:  # fmt: skip
    # Programs that run together share rows and columns: ACROSS blocks of rows to each block of columns.
    blocks_r, blocks_c = tl.cdiv(R, BLOCK_R), tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    first = program // (ACROSS * blocks_c) * ACROSS
    height = min(blocks_r - first, ACROSS)
    inside = program % (ACROSS * blocks_c)
    rows = (first + inside % height) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (inside // height) * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens = tl.arange(0, BLOCK_T)
    a_ptr = A_ptr + tokens[:, None] * stride_a + (rows % R)[None, :]
    b_ptr = B_ptr + tokens[:, None] * stride_b + (columns % C)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, T, BLOCK_T):
        here = (tokens < T - start)[:, None]
        a = tl.load(a_ptr, mask=here, other=0.0)
        b = tl.load(b_ptr, mask=here, other=0.0)
        if EXACT:  # the interpreter's product of bfloat16 is wrong
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
        a_ptr += BLOCK_T * stride_a
        b_ptr += BLOCK_T * stride_b
    bits = total.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Rounded to bfloat16 as a product that is written would be; the sum would carry a NaN over into the sign.
    rounded = tl.where(size > 0x7F800000, size, size + 0x7FFF + ((bits >> 16) & 1))
    inside_C = (rows < R)[:, None] & (columns < C)[None, :]
    half_octaves = tl.where(inside_C, rounded >> 22, 0)
    place = sums_ptr + rows[:, None].to(tl.int64) * C + columns[None, :]
    level = _level(half_octaves, base).to(tl.uint8)
    tl.store(place, tl.load(place, mask=inside_C, other=0) + level, mask=inside_C)
    tl.atomic_max(top_ptr, tl.max(tl.max(half_octaves, axis=1), axis=0))


@triton.jit(do_not_specialize=["T"])
def _square_sums(
    X_ptr: tl.tensor, partial_ptr: tl.tensor, T: tl.tensor, inputs: tl.tensor, stride: tl.tensor,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < inputs
    first = tl.program_id(1) * CHUNK
    total = tl.zeros((BLOCK,), tl.float32)
    for offset in tl.static_range(CHUNK):
        here = mask & (first + offset < T)
        x = tl.load(X_ptr + (first + offset).to(tl.int64) * stride + columns, mask=here, other=0.0).to(
            tl.float32
        )
        total += x * x
    tl.store(partial_ptr + tl.program_id(1) * inputs + columns, total, mask=mask)


@triton.jit(do_not_specialize=["top_ptr", "chunks"])
def _bins(
    partial_ptr: tl.tensor, quarters_ptr: tl.tensor, bins_ptr: tl.tensor, top_ptr: tl.tensor,
    chunks: tl.tensor, tokens: tl.tensor, inputs: tl.tensor, LOW: tl.constexpr, HIGHEST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < inputs
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(chunks):
        total += tl.load(partial_ptr + chunk * inputs + columns, mask=mask, other=0.0)
    mean = tl.div_rn(total, tl.zeros((BLOCK,), tl.float32) + tokens)
    bits = mean.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN may have a sign
    quarter = tl.load(quarters_ptr + ((bits >> 16) & 127))
    index = 1 + 4 * ((bits >> 23) - 127 - 2 * LOW) + quarter
    tl.store(bins_ptr + columns, tl.minimum(tl.maximum(index, 0), HIGHEST).to(tl.uint8), mask=mask)
    tl.atomic_max(top_ptr, tl.max(tl.where(mask, bits, 0) >> 22, axis=0))


@triton.jit
def _sum_of_row(
    order_ptr: tl.tensor, G_ptr: tl.tensor, first: tl.tensor, last: tl.tensor, columns: tl.tensor,
    mask: tl.tensor, stride: tl.tensor, scale: tl.tensor, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(first, last):
        token = tl.load(order_ptr + place)
        total += tl.load(G_ptr + token * stride + columns, mask=mask, other=0.0).to(tl.float32)
    return total * scale


@triton.jit(do_not_specialize=["top_ptr", "base"])
def _add_row_levels(
    ids_ptr: tl.tensor, order_ptr: tl.tensor, ends_ptr: tl.tensor, G_ptr: tl.tensor, sums_ptr: tl.tensor,
    top_ptr: tl.tensor, H: tl.tensor, stride: tl.tensor, scale: tl.tensor, base: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    place = tl.program_id(0)
    row, end = tl.load(ids_ptr + place), tl.load(ends_ptr + place)
    before = tl.load(ids_ptr + place - 1, mask=place > 0, other=-1)
    if row != before:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = columns < H
        total = _sum_of_row(order_ptr, G_ptr, place, end, columns, mask, stride, scale, BLOCK)
        half_octaves = (total.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 22
        here = sums_ptr + row * H + columns
        level = _level(half_octaves, base).to(tl.uint8)
        tl.store(here, tl.load(here, mask=mask, other=0) + level, mask=mask)
        tl.atomic_max(top_ptr, tl.max(half_octaves, axis=0))


@triton.jit(do_not_specialize=["first_row", "last_row"])
def _add_rows(
    ids_ptr: tl.tensor, order_ptr: tl.tensor, ends_ptr: tl.tensor, G_ptr: tl.tensor, band_ptr: tl.tensor,
    first_row: tl.tensor, last_row: tl.tensor, H: tl.tensor, stride: tl.tensor, scale: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    place = tl.program_id(0)
    row, end = tl.load(ids_ptr + place), tl.load(ends_ptr + place)
    before = tl.load(ids_ptr + place - 1, mask=place > 0, other=-1)
    if (row != before) & (row >= first_row) & (row < last_row):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = columns < H
        total = _sum_of_row(order_ptr, G_ptr, place, end, columns, mask, stride, scale, BLOCK)
        here = band_ptr + (row - first_row) * H + columns
        tl.store(here, tl.load(here, mask=mask, other=0.0) + total, mask=mask)


@triton.jit(do_not_specialize=["base"])
def _add_dense_levels(
    W_ptr: tl.tensor, row_ptr: tl.tensor, column_ptr: tl.tensor, act_ptr: tl.tensor, freq_ptr: tl.tensor,
    columns: tl.tensor, size: tl.tensor, base: tl.tensor, threshold: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    weight = tl.abs(tl.load(W_ptr + offsets, mask=mask, other=0.0).to(tl.float32))
    square = tl.load(row_ptr + offsets // columns, mask=mask, other=0.0)
    square += tl.load(column_ptr + offsets % columns, mask=mask, other=0.0)
    value = weight * tl.sqrt_rn(square)
    level = _level((value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 22, base).to(tl.uint8)
    act = tl.load(act_ptr + offsets, mask=mask, other=0)
    freq = tl.load(freq_ptr + offsets, mask=mask, other=0)
    tl.store(act_ptr + offsets, act + level, mask=mask)
    tl.store(freq_ptr + offsets, freq + (value > threshold).to(tl.uint8), mask=mask)


def add_levels(values: torch.Tensor, base: int, sums: torch.Tensor, top: torch.Tensor) -> None:
    """Add the levels of a band to its sums.

    Parameters
    ----------
    values : float32 or bfloat16 [n], contiguous
    base : int
    sums : uint8 [n], contiguous, changed in place
        Has room for one more sample.
    top : int32 [1]
        Raised to the largest half octave seen; 510 or more means a value was not finite.
    """
    half = values.dtype == torch.bfloat16
    bits = values.view(torch.int16 if half else torch.int32)
    known = (0x7FFF, 6) if half else (0x7FFFFFFF, 22)
    _add_levels[(triton.cdiv(values.numel(), BLOCK),)](bits, sums, top, values.numel(), base, *known, BLOCK)


def add_product_levels(
    A_TR: torch.Tensor, B_TC: torch.Tensor, base: int, sums: torch.Tensor, top: torch.Tensor
) -> None:
    """Add the levels of ``A.T @ B``, rounded to bfloat16, without writing the product.

    Parameters
    ----------
    A_TR, B_TC : bfloat16 [T, R], [T, C]
        Their last axis contiguous.
    base : int
    sums : uint8 [R, C], contiguous, changed in place
    top : int32 [1]
        As of `add_levels`.
    """
    (T, R), C = A_TR.shape, B_TC.shape[1]
    capability = torch.cuda.get_device_capability(A_TR.device)[0] if A_TR.is_cuda else None
    tile, options = tile_of(capability)
    grid = (triton.cdiv(R, tile["BLOCK_R"]) * triton.cdiv(C, tile["BLOCK_C"]),)
    known = A_TR, B_TC, sums, top, T, R, C, A_TR.stride(0), B_TC.stride(0), base
    _add_product_levels[grid](*known, EXACT=capability is None, **tile, **options)


def tile_of(capability: int | None) -> tuple[dict[str, int], dict[str, int]]:
    """Tiles of the product and options of its compilation, by major compute capability; None is the interpreter."""
    if capability is None:
        return {"BLOCK_R": 32, "BLOCK_C": 64, "BLOCK_T": 32, "ACROSS": 2}, {}
    if capability >= 9:  # 144 KiB of shared memory, 128 registers of sums
        return {"BLOCK_R": 128, "BLOCK_C": 256, "BLOCK_T": 64, "ACROSS": 8}, {"num_warps": 8, "num_stages": 3}
    # A block of a consumer card may have 99 KiB
    return {"BLOCK_R": 128, "BLOCK_C": 128, "BLOCK_T": 32, "ACROSS": 8}, {"num_warps": 8, "num_stages": 4}


def column_bins(X_TI: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Bins of one sample's inputs; see `tinyonn.record.activations.input_bins`.

    Parameters
    ----------
    X_TI : float32 or bfloat16 [T, I], its last axis contiguous
    top : int32 [1]
        Raised to the largest half octave of a mean square.

    Returns
    -------
    uint8 [I]
    """
    T, inputs = X_TI.shape
    chunks = triton.cdiv(T, TOKEN_CHUNK)
    partial = torch.empty(chunks, inputs, device=X_TI.device)
    blocks = triton.cdiv(inputs, COLUMN_BLOCK)
    exact = {"enable_fp_fusion": False}
    _square_sums[(blocks, chunks)](
        X_TI, partial, T, inputs, X_TI.stride(0), TOKEN_CHUNK, COLUMN_BLOCK, num_warps=2, **exact
    )
    return _binned(partial, T, top)


def mean_square_bins(mean_square_I: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Bins of mean squares, float32 [I], that are known already; else as `column_bins`."""
    return _binned(mean_square_I[None], 1, top)


def _binned(partial: torch.Tensor, tokens: int, top: torch.Tensor) -> torch.Tensor:
    chunks, inputs = partial.shape
    bins = torch.empty(inputs, dtype=torch.uint8, device=partial.device)
    _bins[(triton.cdiv(inputs, COLUMN_BLOCK),)](
        partial, _quarters(partial.device), bins, top, chunks, float(tokens), inputs, COLUMN_LOW, BINS - 1,
        COLUMN_BLOCK, num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip
    return bins


_TABLES: dict[torch.device, torch.Tensor] = {}


def _quarters(device: torch.device) -> torch.Tensor:
    if device not in _TABLES:
        _TABLES[device] = torch.from_numpy(QUARTERS).to(device)
    return _TABLES[device]


def add_row_levels(
    ids_T: torch.Tensor, G_TH: torch.Tensor, scale: float, base: int, sums: torch.Tensor, top: torch.Tensor
) -> None:
    """Add the levels of an embedding's gradient.

    Parameters
    ----------
    ids_T : int64 [T]
    G_TH : float [T, H], its last axis contiguous
    scale : float
        Of the embedding's output.
    base : int
    sums : uint8 [vocabulary, H], contiguous, changed in place
    top : int32 [1]
    """
    grid, known = _rows(ids_T, G_TH)
    H = G_TH.shape[1]
    _add_row_levels[grid](
        *known, G_TH, sums, top, H, G_TH.stride(0), scale, base, ROW_BLOCK, enable_fp_fusion=False
    )


def add_rows(ids_T: torch.Tensor, G_TH: torch.Tensor, scale: float, band: torch.Tensor, first: int) -> None:
    """Add an embedding's gradient to rows first.. of another one.

    Parameters
    ----------
    ids_T, G_TH, scale
        As of `add_row_levels`.
    band : float32 [rows, H], contiguous, changed in place
    first : int
        Its first row.
    """
    grid, known = _rows(ids_T, G_TH)
    _add_rows[grid](
        *known, G_TH, band, first, first + len(band), G_TH.shape[1], G_TH.stride(0), scale, ROW_BLOCK,
        enable_fp_fusion=False,
    )  # fmt: skip


def _rows(ids_T: torch.Tensor, G_TH: torch.Tensor) -> tuple[tuple[int, int], tuple[torch.Tensor, ...]]:
    """Tokens by row: a program for each token, of which the first of a row sums that row's tokens in their order."""
    ids, order = torch.sort(ids_T, stable=True)
    ends = torch.searchsorted(ids, ids, right=True)
    return (len(ids_T), triton.cdiv(G_TH.shape[1], ROW_BLOCK)), (ids, order, ends)


def add_dense_levels(
    weights: torch.Tensor,
    row_square: torch.Tensor,
    column_square: torch.Tensor,
    base: int,
    threshold: float,
    act: torch.Tensor,
    freq: torch.Tensor,
) -> None:
    """`tinyonn.record.activations.add_dense_levels` for float32 or bfloat16 weights, contiguous."""
    below = np.float32(threshold)  # not above it: else a float32 in between would compare otherwise
    below = np.nextafter(below, np.float32(0)) if below > threshold else below
    _add_dense_levels[(triton.cdiv(weights.numel(), BLOCK),)](
        weights, row_square, column_square, act, freq, weights.shape[1], weights.numel(), base, float(below), BLOCK,
        enable_fp_fusion=False,
    )  # fmt: skip
