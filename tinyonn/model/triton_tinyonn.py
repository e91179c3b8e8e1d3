"""The sparse experts' kernels for CUDA. Compiled and tested in Triton's interpreter only; not yet measured on a GPU.

Two compressed forms of a weight, entries sorted by row and column:

- *rows*: a value beside the low byte of its column, and int32 starts of every 256 columns of a row: 3 bytes an entry
  and 1/64 a weight with bfloat16. A warp takes a row; lanes are entries and gather their inputs, which for one block of
  columns lie in four cache lines.
- *masks*: packed values, a bit for each column in int32 words, uint16 counts of the entries before each word of a row:
  2 bytes an entry and 3/16 a weight. A lane takes four columns: it reads its word and count once, counts bits once, and
  a warp's values lie side by side. Inputs are read once for all rows of a program.

Sums are float32 in a fixed order, rounded once. Nothing here waits for the device except `compress_rows` and
`compress_masks`, for the number of entries.

This file is saved beside exported models. Importing it without Triton raises ImportError, which its siblings expect.
"""

# Two things that the interpreter does not show. Arguments are annotated as tl.tensor, not Any, since the compiler looks
# annotations up and refuses what is not Triton's. And gathers are said to be contiguous along lanes, which they are not
# quite: Triton 3.6 would lay a gather's lanes along its first axis and move the tiles it meets through shared memory.
# It is said only of places that come from memory: nothing is known of their alignment, so no access is ever widened.

from __future__ import annotations

import contextlib
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError as error:
    raise ImportError("the GPU kernels need triton; pip install triton") from error

SPAN = 256  # columns of a block of rows: what a byte tells apart
WORD = 32  # columns of a word of masks
TILE = 1024  # items of a program that moves weights
ROWS = 4  # of a program that decodes rows: one a warp
DECODE_SLOTS = 16  # entries a lane has in flight
QUARTETS = 128  # of columns, side by side in a program that decodes masks: one a thread
MASK_ROWS = 8  # of such a program at one token
LANES_LAST = tuple(map(int, triton.__version__.split(".")[:2])) >= (
    3,
    7,
)  # where an access does not say which axis


@triton.jit  # type: ignore[untyped-decorator]
def _ones(bits: tl.tensor, NATIVE: tl.constexpr) -> tl.tensor:
    """Bits that are on, of int32 whose sign bit is off."""
    if NATIVE:
        return libdevice.popc(bits)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = bits + (bits >> 8)
    return (bits + (bits >> 16)) & 63


@triton.jit  # type: ignore[untyped-decorator]
def _scatter(
    values_ptr: tl.tensor, columns_ptr: tl.tensor, pointer_ptr: tl.tensor, gates_ptr: tl.tensor, W_ptr: tl.tensor,
    out: tl.tensor, inputs: tl.tensor, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    group = tl.program_id(0)  # the fastest: groups that write to the same rows run together
    gate = tl.load(gates_ptr + group).to(tl.float32)
    if gate != 0.0:
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        here = rows < out
        places = group.to(tl.int64) * out + rows
        first = tl.load(pointer_ptr + places, mask=here, other=0)
        last = tl.load(pointer_ptr + places + 1, mask=here, other=0)
        for start in range(0, tl.max(last - first, axis=0), ENTRIES):
            entries = first[:, None] + start + tl.arange(0, ENTRIES)[None, :]
            mask = entries < last[:, None]
            columns = tl.load(columns_ptr + entries, mask=mask, other=0).to(tl.int64)
            values = tl.load(values_ptr + entries, mask=mask, other=0.0)
            gated = (values.to(tl.float32) * gate).to(values.dtype)
            place_ptr = W_ptr + rows[:, None].to(tl.int64) * inputs + columns
            tl.store(tl.max_contiguous(place_ptr, [1, ENTRIES]), gated, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _load_spans(
    W_ptr: tl.tensor, spans: tl.tensor, out: tl.tensor, inputs: tl.tensor, per_row: tl.tensor, SPAN: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Neighbouring columns of a row, [spans, SPAN]; 0 beyond the weight."""
    rows = spans // per_row
    columns = (spans - rows * per_row)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    mask = (rows < out)[:, None] & (columns < inputs)
    return tl.load(W_ptr + rows[:, None].to(tl.int64) * inputs + columns, mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _count(
    W_ptr: tl.tensor, counts_ptr: tl.tensor, masks_ptr: tl.tensor, out: tl.tensor, inputs: tl.tensor,
    per_row: tl.tensor, SPANS: tl.constexpr, SPAN: tl.constexpr, MASKS: tl.constexpr,
) -> None:  # fmt: skip
    spans = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    on = (_load_spans(W_ptr, spans, out, inputs, per_row, SPAN).to(tl.float32) != 0.0).to(tl.int32)
    here = spans < out * per_row
    tl.store(counts_ptr + spans, tl.sum(on, axis=1), mask=here)
    if MASKS:  # a sum of powers is their union; the highest is the sign
        tl.store(masks_ptr + spans, tl.sum(on << tl.arange(0, SPAN)[None, :], axis=1), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _pack(
    W_ptr: tl.tensor, starts_ptr: tl.tensor, values_ptr: tl.tensor, columns_ptr: tl.tensor, out: tl.tensor,
    inputs: tl.tensor, per_row: tl.tensor, SPANS: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    spans = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    weights = _load_spans(W_ptr, spans, out, inputs, per_row, SPAN)
    kept = weights.to(tl.float32) != 0.0
    on = kept.to(tl.int32)
    starts = tl.load(starts_ptr + spans, mask=spans < out * per_row, other=0)
    places = tl.max_contiguous(starts[:, None] + tl.cumsum(on, axis=1) - on, [1, SPAN])
    tl.store(values_ptr + places, weights, mask=kept)
    if COLUMNS:
        columns = tl.arange(0, SPAN)[None, :] + tl.zeros([SPANS, SPAN], tl.int32)
        tl.store(columns_ptr + places, columns.to(tl.uint8), mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def _expand_rows(
    values_ptr: tl.tensor, columns_ptr: tl.tensor, starts_ptr: tl.tensor, W_ptr: tl.tensor, out: tl.tensor,
    inputs: tl.tensor, blocks: tl.tensor, SPANS: tl.constexpr, ENTRIES: tl.constexpr, SPAN: tl.constexpr,
) -> None:  # fmt: skip
    spans = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    here = spans < out * blocks
    rows = spans // blocks
    place_ptr = W_ptr + rows.to(tl.int64) * inputs + (spans - rows * blocks) * SPAN
    first = tl.load(starts_ptr + spans, mask=here, other=0)
    last = tl.load(starts_ptr + spans + 1, mask=here, other=0)
    for start in range(0, tl.max(last - first, axis=0), ENTRIES):
        entries = first[:, None] + start + tl.arange(0, ENTRIES)[None, :]
        mask = entries < last[:, None]
        columns = tl.load(columns_ptr + entries, mask=mask, other=0).to(tl.int32)
        values = tl.load(values_ptr + entries, mask=mask, other=0.0)
        tl.store(tl.max_contiguous(place_ptr[:, None] + columns, [1, ENTRIES]), values, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _expand_masks(
    values_ptr: tl.tensor, masks_ptr: tl.tensor, skips_ptr: tl.tensor, starts_ptr: tl.tensor, W_ptr: tl.tensor,
    out: tl.tensor, inputs: tl.tensor, words: tl.tensor, SPANS: tl.constexpr, NATIVE: tl.constexpr,
) -> None:  # fmt: skip
    spans = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    here = spans < out * words
    rows = spans // words
    bits = tl.arange(0, 32)[None, :]
    word = tl.load(masks_ptr + spans, mask=here, other=0)[:, None]
    first = tl.load(starts_ptr + rows, mask=here, other=0)
    first += tl.load(skips_ptr + spans, mask=here, other=0).to(tl.int32)
    entries = tl.max_contiguous(first[:, None] + _ones(word & ~(-1 << bits), NATIVE), [1, 32])
    values = tl.load(values_ptr + entries, mask=((word >> bits) & 1) != 0, other=0.0)
    columns = (spans - rows * words)[:, None] * 32 + bits
    tl.store(
        W_ptr + rows[:, None].to(tl.int64) * inputs + columns, values, mask=here[:, None] & (columns < inputs)
    )


@triton.jit  # type: ignore[untyped-decorator]
def _store(
    total: tl.tensor, bias_ptr: tl.tensor, Y_ptr: tl.tensor, rows: tl.tensor, token: tl.tensor, out: tl.tensor,
    tokens: tl.tensor, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """Sums [TOKENS, ROWS] with the bias, rounded once."""
    if BIAS:
        total += tl.load(bias_ptr + rows, mask=rows < out, other=0.0).to(tl.float32)[None, :]
    mask = (token < tokens)[:, None] & (rows < out)[None, :]
    tl.store(Y_ptr + token[:, None] * out + rows[None, :], total.to(Y_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _decode_rows(
    X_ptr: tl.tensor, values_ptr: tl.tensor, columns_ptr: tl.tensor, starts_ptr: tl.tensor, bias_ptr: tl.tensor,
    Y_ptr: tl.tensor, tokens: tl.tensor, out: tl.tensor, inputs: tl.tensor, blocks: tl.tensor, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, SPAN: tl.constexpr,
) -> None:  # fmt: skip
    # Tiles are [TOKENS, STEPS, BLOCKS, ROWS, 32]: lanes are entries and warps are rows, so only lanes are left to sum
    # over. Steps are an axis, not a loop, so that every column and value of a tile is asked for before one is awaited.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    known = (token < tokens)[:, None, None, None, None]
    lanes = tl.arange(0, 32)[None, None, None, None, :] + 32 * tl.arange(0, STEPS)[None, :, None, None, None]
    total = tl.zeros([TOKENS, STEPS, BLOCKS, ROWS, 32], tl.float32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        here = (block < blocks)[:, None] & (rows < out)[None, :]
        first = tl.load(starts_ptr + rows[None, :] * blocks + block[:, None], mask=here, other=0)
        last = tl.load(starts_ptr + rows[None, :] * blocks + block[:, None] + 1, mask=here, other=0)
        entries = first[None, None, :, :, None] + lanes
        left = (last - first)[None, None, :, :, None] - lanes
        x_ptr = X_ptr + ((token * inputs)[:, None] + (block * SPAN)[None, :])[:, None, :, None, None]
        for begun in range(0, tl.max(tl.max(last - first, axis=1), axis=0), 32 * STEPS):
            mask = left > begun
            columns = tl.load(columns_ptr + (entries + begun), mask=mask, other=0)
            values = tl.load(values_ptr + (entries + begun), mask=mask, other=0.0).to(tl.float32)
            place_ptr = tl.max_contiguous(x_ptr + columns.to(tl.int32), [1, 1, 1, 1, 32])
            x = tl.load(place_ptr, mask=mask & known, other=0.0).to(tl.float32)
            total += values * x
    total = tl.sum(tl.sum(total, axis=1), axis=1)
    _store(tl.sum(total, axis=2), bias_ptr, Y_ptr, rows, token, out, tokens, BIAS)


@triton.jit  # type: ignore[untyped-decorator]
def _decode_masks(
    X_ptr: tl.tensor, values_ptr: tl.tensor, masks_ptr: tl.tensor, skips_ptr: tl.tensor, starts_ptr: tl.tensor,
    bias_ptr: tl.tensor, Y_ptr: tl.tensor, tokens: tl.tensor, out: tl.tensor, inputs: tl.tensor, words: tl.tensor,
    BIAS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, QUARTETS: tl.constexpr, NATIVE: tl.constexpr,
) -> None:  # fmt: skip
    # Tiles are [TOKENS, ROWS, QUARTETS]: a lane owns four columns, eight lanes a word.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows[None, :, None]
    quartet = tl.arange(0, QUARTETS)[None, None, :]
    shift = quartet % 8 * 4
    below = ~(-1 << shift)
    token = tl.arange(0, TOKENS)
    x_ptr = X_ptr + (token * inputs)[:, None, None]
    known = (token < tokens)[:, None, None]
    lane_values_ptr = values_ptr + tl.load(starts_ptr + row, mask=row < out, other=0)
    total = tl.zeros([TOKENS, ROWS, QUARTETS], tl.float32)
    at = quartet // 8
    here = (row < out) & (at < words)
    place = row * words + at
    word = tl.load(masks_ptr + place, mask=here, other=0)
    skip = tl.load(skips_ptr + place, mask=here, other=0).to(tl.int32)
    for start in range(0, words, QUARTETS // 8):
        bits = word >> shift  # arithmetic: copies of the sign come in above the quartet
        before = skip + _ones(word & below, NATIVE)
        # The next words are on their way before this step's values are awaited.
        at = start + QUARTETS // 8 + quartet // 8
        here = (row < out) & (at < words)
        place = row * words + at
        word = tl.load(masks_ptr + place, mask=here, other=0)
        skip = tl.load(skips_ptr + place, mask=here, other=0).to(tl.int32)
        for bit in tl.static_range(4):
            on = (bits >> bit) & 1
            place_ptr = tl.max_contiguous(lane_values_ptr + before, [1, 1, QUARTETS])
            values = tl.load(place_ptr, mask=on != 0, other=0.0).to(tl.float32)
            column = start * 32 + quartet * 4 + bit
            x = tl.load(x_ptr + column, mask=known & (column < inputs), other=0.0).to(tl.float32)
            total += values * x
            before += on
    _store(tl.sum(total, axis=2), bias_ptr, Y_ptr, rows, token, out, tokens, BIAS)


NATIVE = isinstance(_ones, triton.JITFunction)  # compiled, not interpreted


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
    groups = gates_G.numel()
    entries = _fitting(values.numel() / max(1, groups * out), 4, 64)
    rows = TILE // entries
    # Programs of groups that are off end at once: cheaper than to wait for their number
    grid = (groups, triton.cdiv(out, rows))
    _launch(
        _scatter, grid, values, columns, row_pointer, gates_G.contiguous(), W_OI, out, inputs, rows, entries
    )
    return W_OI


def compress_rows(W_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries that are not 0, with columns; at most 1/32 byte a weight beside the result.

    Parameters
    ----------
    W_OI : bfloat16, float16 or float32 [out, inputs], contiguous

    Returns
    -------
    values : [entries], dtype of `W_OI`
    columns : uint8 [entries]
        Within blocks of 256 columns.
    starts : int32 [out * blocks + 1]
        Of the blocks of every row.
    """
    starts, _ = _starts(W_OI, SPAN, masks=False)
    values = W_OI.new_empty(int(starts[-1]))
    columns = torch.empty(values.shape, dtype=torch.uint8, device=W_OI.device)
    _packed(W_OI, starts, values, columns, SPAN)
    return values, columns, starts


def compress_masks(W_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries that are not 0, with a bit a column; at most 3/8 byte a weight beside the result.

    Parameters
    ----------
    W_OI : bfloat16, float16 or float32 [out, inputs], contiguous
        At most 65,536 inputs.

    Returns
    -------
    values : [entries], dtype of `W_OI`
    masks : int32 [out, words]
        Bit b of word w is column 32 w + b.
    starts : int32 [out + 1]
        Of the rows.
    skips : uint16 [out, words]
        Entries of the row before the word.
    """
    out = len(W_OI)
    starts, masks = _starts(W_OI, WORD, masks=True)
    values = W_OI.new_empty(int(starts[-1]))
    _packed(W_OI, starts, values, masks, WORD)
    words = masks.shape[1]
    starts_O = starts[::words].contiguous()
    # int16 of the same bits: Torch computes little with uint16
    skips = (starts[:-1].view(out, words) - starts_O[:-1, None]).to(torch.int16).view(torch.uint16)
    return values, masks, starts_O, skips


def expand_rows(
    values: torch.Tensor, columns: torch.Tensor, starts: torch.Tensor, inputs: int
) -> torch.Tensor:
    """The dense weight of `compress_rows`, or some rows of it.

    Parameters
    ----------
    values, columns : tensor
        As `compress_rows` gives them.
    starts : int32 [rows * blocks + 1]
        Of these rows.
    inputs : int

    Returns
    -------
    tensor [rows, inputs], dtype of the values
    """
    blocks = triton.cdiv(inputs, SPAN)
    out = (starts.numel() - 1) // blocks
    W_OI = values.new_zeros(out, inputs)
    entries = _fitting(values.numel() / max(1, out * blocks), 8, 128)
    grid = (triton.cdiv(out * blocks, TILE // entries),)
    sizes = TILE // entries, entries, SPAN
    _launch(_expand_rows, grid, values, columns, starts, W_OI, out, inputs, blocks, *sizes)
    return W_OI


def expand_masks(
    values: torch.Tensor, masks: torch.Tensor, starts: torch.Tensor, skips: torch.Tensor, inputs: int
) -> torch.Tensor:
    """The dense weight of `compress_masks`, or some rows of it.

    Parameters
    ----------
    values : tensor [entries]
    masks, starts, skips : tensor
        As `compress_masks` gives them, of these rows.
    inputs : int

    Returns
    -------
    tensor [rows, inputs], dtype of the values
    """
    out, words = masks.shape
    W_OI = values.new_empty(out, inputs)
    grid = (triton.cdiv(out * words, TILE // WORD),)
    sizes = TILE // WORD, NATIVE
    _launch(_expand_masks, grid, values, masks, skips, starts, W_OI, out, inputs, words, *sizes)
    return W_OI


def decode_rows(
    X_TI: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    starts: torch.Tensor,
    out: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer on few tokens from `compress_rows`; the weight is read once for all of them.

    Parameters
    ----------
    X_TI : float [tokens, inputs]
        From 1 to 8 tokens.
    values, columns, starts : tensor
        As `compress_rows` gives them.
    out : int
    bias : float [out], optional

    Returns
    -------
    tensor [tokens, out], dtype of `X_TI`
    """
    tokens, inputs = X_TI.shape
    padded = triton.next_power_of_2(tokens)
    blocks = triton.cdiv(inputs, SPAN)
    # Room for nearly every block: entries that are spread evenly seldom lie two deviations above their mean
    mean = values.numel() / max(1, out * blocks)
    steps = _fitting(mean + 2 * mean**0.5, 32, 128) // 32
    slots = max(1, min(DECODE_SLOTS, 2 * DECODE_SLOTS // padded) // steps)
    across = min(slots, triton.next_power_of_2(blocks))
    Y_TO = X_TI.new_empty(tokens, out)
    weight = values, columns, starts, values if bias is None else bias
    sizes = bias is not None, padded, across, ROWS, steps, SPAN
    grid = (triton.cdiv(out, ROWS),)
    _launch(_decode_rows, grid, X_TI.contiguous(), *weight, Y_TO, tokens, out, inputs, blocks, *sizes)
    return Y_TO


def decode_masks(
    X_TI: torch.Tensor,
    values: torch.Tensor,
    masks: torch.Tensor,
    starts: torch.Tensor,
    skips: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer on few tokens from `compress_masks`; the weight is read once for all of them.

    Parameters
    ----------
    X_TI : float [tokens, inputs]
        From 1 to 8 tokens.
    values, masks, starts, skips : tensor
        As `compress_masks` gives them.
    bias : float [out], optional

    Returns
    -------
    tensor [tokens, out], dtype of `X_TI`
    """
    tokens, inputs = X_TI.shape
    padded = triton.next_power_of_2(tokens)
    out, words = masks.shape
    quartets = QUARTETS
    rows = max(1, MASK_ROWS // padded)
    if not LANES_LAST:  # one long row: no other axis that lanes could take
        rows, quartets = 1, max(QUARTETS, QUARTETS * 4 // padded)
    Y_TO = X_TI.new_empty(tokens, out)
    weight = values, masks, skips, starts, values if bias is None else bias
    sizes = bias is not None, padded, rows, quartets, NATIVE
    grid = (triton.cdiv(out, rows),)
    _launch(_decode_masks, grid, X_TI.contiguous(), *weight, Y_TO, tokens, out, inputs, words, *sizes)
    return Y_TO


def _launch(kernel: Any, grid: tuple[int, ...], first: torch.Tensor, *others: Any) -> None:
    """On the device of the tensors: Triton takes the current one."""
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](first, *others)


def _fitting(number: float, least: int, most: int) -> int:
    """The power of two above a number, within limits that are such powers."""
    return max(least, min(most, int(triton.next_power_of_2(int(number) + 1))))


def _starts(W_OI: torch.Tensor, span: int, masks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the entries of each span of columns begin, int32 [out * spans + 1]; masks if asked for."""
    out, inputs = W_OI.shape
    per_row = triton.cdiv(inputs, span)
    counts = torch.empty(out, per_row, dtype=torch.int32, device=W_OI.device)
    words = torch.empty_like(counts) if masks else counts
    grid = (triton.cdiv(counts.numel(), TILE // span),)
    _launch(_count, grid, W_OI, counts, words, out, inputs, per_row, TILE // span, span, masks)
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=W_OI.device)
    torch.cumsum(counts.view(-1), 0, dtype=torch.int32, out=starts[1:])
    return starts, words


def _packed(
    W_OI: torch.Tensor, starts: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, span: int
) -> None:
    out, inputs = W_OI.shape
    per_row = triton.cdiv(inputs, span)
    grid = (triton.cdiv(out * per_row, TILE // span),)
    sizes = TILE // span, span, columns.dtype == torch.uint8
    _launch(_pack, grid, W_OI, starts, values, columns, out, inputs, per_row, *sizes)
