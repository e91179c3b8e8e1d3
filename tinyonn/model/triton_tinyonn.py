"""The sparse experts' kernels for CUDA, measured on an H100: docs/decisions/020.

Two compressed forms of a weight, entries sorted by row and column:

- *rows*: a word an entry, its column below its value, and int32 starts of the rows: 4 bytes an entry with bfloat16. One
  load brings both; a warp takes a row and gathers its inputs from the first cache.
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

SPAN = 256  # columns that are compressed together
WORD = 32  # columns of a word of masks
TILE = 1024  # items of a program that moves weights
DECODE_ENTRIES = 512  # at most, of a step of the warp that decodes a row: 16 a lane are on their way together
QUARTETS = 128  # of columns, side by side in a program that decodes masks


@triton.jit
def _ones(bits: tl.tensor, NATIVE: tl.constexpr) -> tl.tensor:
    """Bits that are on, of int32 whose sign bit is off."""
    if NATIVE:
        return libdevice.popc(bits)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = bits + (bits >> 8)
    return (bits + (bits >> 16)) & 63


@triton.jit
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


@triton.jit
def _load_spans(
    W_ptr: tl.tensor, spans: tl.tensor, out: tl.tensor, inputs: tl.tensor, per_row: tl.tensor, SPAN: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Neighbouring columns of a row, [spans, SPAN]; 0 beyond the weight."""
    rows = spans // per_row
    columns = (spans - rows * per_row)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    mask = (rows < out)[:, None] & (columns < inputs)
    return tl.load(W_ptr + rows[:, None].to(tl.int64) * inputs + columns, mask=mask, other=0.0)


@triton.jit
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


@triton.jit
def _word(values: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """A value above its column: int32 of bfloat16, int64 of float32."""
    if values.dtype == tl.float32:
        return (values.to(tl.int32, bitcast=True).to(tl.int64) << 32) | columns.to(tl.int64)
    return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16) | columns


@triton.jit
def _value(words: tl.tensor) -> tl.tensor:
    """Float32 of words; a bfloat16 is the upper half of one."""
    if words.dtype == tl.int64:
        return (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _column(words: tl.tensor) -> tl.tensor:
    if words.dtype == tl.int64:
        return (words & 0x7FFFFFFF).to(tl.int32)
    return words & 0xFFFF


@triton.jit
def _pack(
    W_ptr: tl.tensor, starts_ptr: tl.tensor, packed_ptr: tl.tensor, out: tl.tensor, inputs: tl.tensor,
     per_row: tl.tensor, SPANS: tl.constexpr, SPAN: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    spans = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    weights = _load_spans(W_ptr, spans, out, inputs, per_row, SPAN)
    kept = weights.to(tl.float32) != 0.0
    on = kept.to(tl.int32)
    starts = tl.load(starts_ptr + spans, mask=spans < out * per_row, other=0)
    places = tl.max_contiguous(starts[:, None] + tl.cumsum(on, axis=1) - on, [1, SPAN])
    if WORDS:
        columns = (spans % per_row)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
        tl.store(packed_ptr + places, _word(weights, columns), mask=kept)
    else:
        tl.store(packed_ptr + places, weights, mask=kept)


@triton.jit
def _expand_rows(
    words_ptr: tl.tensor, starts_ptr: tl.tensor, W_ptr: tl.tensor, inputs: tl.tensor, ENTRIES: tl.constexpr
) -> None:  # fmt: skip
    row = tl.program_id(0)
    last = tl.load(starts_ptr + row + 1)
    row_ptr = W_ptr + row.to(tl.int64) * inputs
    for start in range(tl.load(starts_ptr + row), last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        words = tl.load(words_ptr + entries, mask=entries < last, other=0)
        tl.store(row_ptr + _column(words), _value(words).to(W_ptr.dtype.element_ty), mask=entries < last)


@triton.jit
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


@triton.jit
def _store(
    total: tl.tensor, bias_ptr: tl.tensor, Y_ptr: tl.tensor, rows: tl.tensor, token: tl.tensor, out: tl.tensor,
    tokens: tl.tensor, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """Sums [TOKENS, ROWS] with the bias, rounded once."""
    if BIAS:
        total += tl.load(bias_ptr + rows, mask=rows < out, other=0.0).to(tl.float32)[None, :]
    mask = (token < tokens)[:, None] & (rows < out)[None, :]
    tl.store(Y_ptr + token[:, None] * out + rows[None, :], total.to(Y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decode_rows(
    X_ptr: tl.tensor, words_ptr: tl.tensor, starts_ptr: tl.tensor, bias_ptr: tl.tensor, Y_ptr: tl.tensor,
    tokens: tl.tensor, out: tl.tensor, inputs: tl.tensor, BIAS: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    # A program's one axis is the lanes of a warp. Tokens of a row run together: the first brings its words.
    token, row = tl.program_id(0) % tokens, tl.program_id(0) // tokens
    last = tl.load(starts_ptr + row + 1)
    x_ptr = X_ptr + token * inputs
    total = tl.zeros([ENTRIES], tl.float32)
    for start in range(tl.load(starts_ptr + row), last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        words = tl.load(words_ptr + entries, mask=entries < last, other=0)
        total += _value(words) * tl.load(x_ptr + _column(words), mask=entries < last, other=0.0).to(
            tl.float32
        )
    y = tl.sum(total, axis=0)
    if BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(Y_ptr + token * out + row, y.to(Y_ptr.dtype.element_ty))


@triton.jit
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
# Of a program that decodes masks: more rows would be fewer warps. The interpreter takes its time by the program.
MASK_ROWS = 1 if NATIVE else 8


def scatter(
    values: torch.Tensor,
    columns: torch.Tensor,
    row_pointer: torch.Tensor,
    gates_G: torch.Tensor,
    out: int,
    inputs: int,
) -> torch.Tensor:
    """The dense weight [out, inputs] from the groups whose gate, float [groups], is not 0: see `ExpertMatrix`."""
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


def compress_rows(W_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries that are not 0, with columns; at most 1/64 byte a weight beside the result.

    Parameters
    ----------
    W_OI : bfloat16 or float32 [out, inputs], contiguous
        With bfloat16 at most 65,536 inputs.

    Returns
    -------
    words : int32 of bfloat16, int64 of float32 [entries]
        The value's bits above its column.
    starts : int32 [out + 1]
        Of the rows.
    """
    starts, _ = _starts(W_OI, SPAN, masks=False)
    word = torch.int32 if W_OI.itemsize == 2 else torch.int64
    words = torch.empty(int(starts[-1]), dtype=word, device=W_OI.device)
    _packed(W_OI, starts, words, SPAN)
    return words, starts[:: triton.cdiv(W_OI.shape[1], SPAN)].contiguous()


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
    _packed(W_OI, starts, values, WORD)
    words = masks.shape[1]
    starts_O = starts[::words].contiguous()
    # int16 of the same bits: Torch computes little with uint16
    skips = (starts[:-1].view(out, words) - starts_O[:-1, None]).to(torch.int16).view(torch.uint16)
    return values, masks, starts_O, skips


def expand_rows(words: torch.Tensor, starts: torch.Tensor, inputs: int) -> torch.Tensor:
    """The dense weight of `compress_rows`, or some rows of it.

    Parameters
    ----------
    words : tensor
        As `compress_rows` gives them.
    starts : int32 [rows + 1]
        Of these rows.
    inputs : int

    Returns
    -------
    tensor [rows, inputs]
    """
    out = starts.numel() - 1
    dtype = torch.bfloat16 if words.dtype == torch.int32 else torch.float32
    W_OI = torch.zeros(out, inputs, dtype=dtype, device=words.device)
    entries = _fitting(words.numel() / max(1, out), 32, DECODE_ENTRIES)
    _launch(_expand_rows, (out,), words, starts, W_OI, inputs, entries, num_warps=1)
    return W_OI


def expand_masks(
    values: torch.Tensor, masks: torch.Tensor, starts: torch.Tensor, skips: torch.Tensor, inputs: int
) -> torch.Tensor:
    """The dense weight [rows, inputs] of `compress_masks`, or of some rows of its masks, starts and skips."""
    out, words = masks.shape
    W_OI = values.new_empty(out, inputs)
    grid = (triton.cdiv(out * words, TILE // WORD),)
    sizes = TILE // WORD, NATIVE
    _launch(_expand_masks, grid, values, masks, skips, starts, W_OI, out, inputs, words, *sizes)
    return W_OI


def decode_rows(
    X_TI: torch.Tensor, words: torch.Tensor, starts: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer on 1 to 8 tokens from `compress_rows`: [tokens, out], dtype of `X_TI`; bias float [out]."""
    tokens, inputs = X_TI.shape
    out = starts.numel() - 1
    Y_TO = X_TI.new_empty(tokens, out)
    # Room for nearly every row: entries that are spread evenly seldom lie two deviations above their mean
    mean = words.numel() / max(1, out)
    entries = _fitting(mean + 2 * mean**0.5, 32, DECODE_ENTRIES)
    weight = words, starts, starts if bias is None else bias
    sizes = tokens, out, inputs, bias is not None, entries
    _launch(_decode_rows, (tokens * out,), X_TI.contiguous(), *weight, Y_TO, *sizes, num_warps=1)
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
    Y_TO = X_TI.new_empty(tokens, out)
    weight = values, masks, skips, starts, values if bias is None else bias
    sizes = bias is not None, padded, MASK_ROWS, QUARTETS, NATIVE
    grid = (triton.cdiv(out, MASK_ROWS),)
    known = X_TI.contiguous(), *weight, Y_TO, tokens, out, inputs, words
    _launch(_decode_masks, grid, *known, *sizes, num_warps=1)
    return Y_TO


def _launch(kernel: Any, grid: tuple[int, ...], first: torch.Tensor, *others: Any, **options: int) -> None:
    """On the device of the tensors: Triton takes the current one."""
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](first, *others, **options)


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


def _packed(W_OI: torch.Tensor, starts: torch.Tensor, packed: torch.Tensor, span: int) -> None:
    """Write the entries as words or as values, whichever `packed` holds."""
    out, inputs = W_OI.shape
    per_row = triton.cdiv(inputs, span)
    grid = (triton.cdiv(out * per_row, TILE // span),)
    sizes = TILE // span, span, not packed.is_floating_point()
    _launch(_pack, grid, W_OI, starts, packed, out, inputs, per_row, *sizes)
