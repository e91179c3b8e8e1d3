"""A linear layer whose weight is a sum of sparse experts: for training, and merged once per prompt for inference.

    Y_TO = X_TI W_OI^T + b,   W = sum over groups g of gate_g * W_g,   the W_g disjoint

Decoding is bound by memory, so a merged weight takes the form of fewest bytes: values beside uint16 columns (4 bytes an
entry), packed values with a bit for every column (2 bytes an entry and 1/8 a weight), or dense (2 a weight). Masks with
packed values: SpInfer (Fan et al., EuroSys 2025), here expanded by one AVX-512 instruction. A GPU keeps a value and its
column in one word, and counts beside the masks; see `triton_tinyonn`.

This file is saved beside exported models: it needs Torch and NumPy. Without Numba, or Triton on a GPU, every weight is
made dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch.nn import functional

from .batched_tinyonn import batched_linear, gated_linear
from .matrix_tinyonn import (
    TRITON,
    ExpertMatrix,
    check_gates,
    check_input,
    dense,
    dense_of,
    entries_of,
    folded,
    items,
    on_gpu,
)

try:
    from .cpu_tinyonn import (
        BLOCK_BYTES,
        PADDING,
        UNROLLED,
        WORD,
        expands,
        gathers,
        in_bands,
        join,
        launch,
        pack,
    )

    COMPILED = True
except ImportError:  # no Numba: everything is made dense, by Torch
    COMPILED = False

try:
    from .triton_tinyonn import (
        compress_masks,
        compress_rows,
        decode_masks,
        decode_rows,
        expand_masks,
        expand_rows,
    )
except ImportError:
    pass

__all__ = [
    "ExpertMatrix", "Merged", "batched_linear", "choose_path", "costs", "dense_of", "gated_linear", "gpu_costs",
    "merge", "sparse_linear",
]  # fmt: skip

Form = Literal["dense", "rows", "masks"]
Path = Literal["dense", "decode", "prefill"]
DECODE_TOKENS = 8  # of a call of the decode kernels
TOKEN_BATCH = 64  # of a call of the kernel with tokens side by side
BAND_BYTES = 1 << 21  # of a dense band: it stays in the second-level cache

# The cost model's constants, in bytes that memory delivers meanwhile; where they come from: docs/decisions/013
CALL = 1 << 17  # of a kernel
ROW = 90  # a row's start and sum
GATHER = 3.0  # an entry's column and its gathered input
GATHER_MORE = 1.9  # an entry times a further token
TOKEN_VECTORS = 5.5  # an entry times a vector of 16 tokens
EXPAND = 0.6  # a weight's place in the masks
EXPAND_MORE = 0.3  # a weight's place times a further token
BAND = 0.9  # a weight of a dense band, written
MULTIPLY = 0.022  # a weight times a token in a dense product

# The same for a GPU, measured on an H100: docs/decisions/020. There a place in the masks costs more instructions than
# its dense weight costs bytes; a consumer card issues some four times as many in the time of a byte.
GPU_EXPAND = 2.6  # a weight's place in the masks


@dataclass(frozen=True)
class Merged:
    """The active groups of a matrix as one, gates folded in: made once per prompt, read at every token.

    Attributes
    ----------
    form : str
        "rows": values beside their columns; "masks": packed values and a bit for each column, in words of 32; "dense".
    out, inputs : int
    entries : int
        Weights that are active.
    values : tensor [entries + padding], or the dense [out, inputs]
        No padding on a GPU; none at all beside a GPU's rows.
    places : uint16 [entries + padding] columns or int32 [out, words] masks; empty if dense
        On a GPU words of values and their columns.
    starts : int32 [out + 1]
        Of rows in `values`; empty if dense.
    skips : uint16 [out, words]
        Entries of a row before each word of its masks, for a GPU; else empty.
    """

    form: Form
    out: int
    inputs: int
    entries: int
    values: torch.Tensor
    places: torch.Tensor
    starts: torch.Tensor
    skips: torch.Tensor

    @cached_property
    def bytes(self) -> int:
        """Read at every token, and held in memory."""
        return self.values.nbytes + self.places.nbytes + self.starts.nbytes + self.skips.nbytes

    def dense(
        self, first: int = 0, last: int | None = None, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows first:last of the weight, [last - first, inputs], dtype of the values.

        `memory` of that dtype, large enough, is used by a CPU if given: new pages cost more than what is written to
        them.
        """
        last = self.out if last is None else last
        if self.form == "dense":
            return self.values[first:last]
        if on_gpu(self.values):
            return self._expanded(first, last)
        masks = self.form == "masks"
        if memory is None:
            memory = self.values.new_empty((last - first) * self.width)
        W_OI = memory[: (last - first) * self.width].view(-1, self.width)
        kind = "expand" if masks else f"spread{8 * W_OI.itemsize}"
        self.launch(kind, 0, last - first, first, *([] if masks else [self.width]), W_OI.data_ptr())
        return W_OI[:, : self.inputs]

    def _expanded(self, first: int, last: int) -> torch.Tensor:
        if self.form == "masks":
            places, skips = self.places[first:last], self.skips[first:last]
            W_OI = expand_masks(self.values, places, self.starts[first : last + 1], skips, self.inputs)
        else:
            W_OI = expand_rows(self.places, self.starts[first : last + 1], self.inputs)
        return W_OI

    @property
    def width(self) -> int:
        """Columns that a dense row is written with."""
        return self.places.shape[1] * WORD if self.form == "masks" else self.inputs

    def launch(self, kind: str, tokens: int, rows: int, *arguments: int) -> None:
        """Run a CPU kernel over so many rows; see `cpu_tinyonn.kernel`."""
        launch(kind, tokens, (0, rows, *self._known, *arguments))

    @cached_property
    def _known(self) -> tuple[int, ...]:
        """A kernel's arguments about the weight: rows of a block, words of a row of masks, addresses."""
        block = max(1, self.out * BLOCK_BYTES // self.bytes)
        words = [self.places.shape[1]] if self.form == "masks" else []
        return block, *words, self.places.data_ptr(), self.values.data_ptr(), self.starts.data_ptr()


def merge(matrix: ExpertMatrix, gates_G: torch.Tensor, form: Form | None = None) -> Merged:
    """Gather the groups whose gate is not 0.

    Parameters
    ----------
    matrix : ExpertMatrix
    gates_G : float [groups]
    form : str, optional
        Of the result; by default the one that the cost model prefers.

    Returns
    -------
    Merged
        It shares no memory with the matrix.

    Raises
    ------
    ValueError
        Gates of another number, negative or not finite; a form that this machine has no kernel for.
    """
    check_gates(matrix, gates_G)
    gates_G = gates_G.detach()
    entries = int(matrix.group_sizes()[gates_G != 0].sum())
    gpu = on_gpu(matrix.values)
    known_costs = (gpu_costs if gpu else partial(costs, tokens=1))(
        matrix.out, matrix.inputs, entries, itemsize=matrix.values.itemsize
    )
    available = sorted(_forms(matrix), key=lambda one: known_costs[one])
    if form is not None and form not in available:
        raise ValueError(
            f"form {form!r} has no kernel for this matrix on this machine; use one of {available}"
        )
    form = form or available[0]
    empty = matrix.columns.new_empty(0), matrix.row_pointer.new_empty(0), matrix.columns.new_empty(0)
    if form == "dense":
        parts = dense(matrix, gates_G), *empty
    elif gpu:
        parts = _compressed_on_gpu(matrix, gates_G, form)
        entries = parts[form == "rows"].numel()  # what is 0 is left out
    else:
        parts = *_compressed(matrix, gates_G, form, entries), empty[0]
    return Merged(form, matrix.out, matrix.inputs, entries, *parts)


_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _compressed_on_gpu(
    matrix: ExpertMatrix, gates_G: torch.Tensor, form: Form
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """By way of the dense weight: groups are put where they belong, not sorted."""
    W_OI = dense(matrix, gates_G)
    if form == "masks":
        values, places, starts, skips = compress_masks(W_OI)
    else:
        places, starts = compress_rows(W_OI)
        values = W_OI.new_empty(0)
        skips = matrix.columns.new_empty(0)
    return values, places, starts, skips


def _starts(matrix: ExpertMatrix, groups: torch.Tensor) -> torch.Tensor:
    counts = matrix.row_pointer.diff().view(-1, matrix.out)[groups].sum(0)
    return functional.pad(counts.cumsum(0), (1, 0)).int()


def _compressed(matrix: ExpertMatrix, gates_G: torch.Tensor, form: Form, entries: int) -> _Parts:
    groups = gates_G.nonzero()[:, 0]
    starts = _starts(matrix, groups)
    source = entries_of(matrix, items(folded(matrix, gates_G))), groups.numpy(), items(starts)
    values = matrix.values.new_zeros(entries + PADDING)
    if form == "masks":
        words = -(-matrix.inputs // (WORD * UNROLLED)) * UNROLLED
        places = torch.empty(matrix.out, words, dtype=torch.int32)
        in_bands(pack, matrix.out, *source, items(places), items(values))
    else:
        places = torch.zeros(entries + PADDING, dtype=torch.uint16)
        in_bands(join, matrix.out, *source, items(places), items(values))
    return values, places, starts


def _forms(matrix: ExpertMatrix) -> list[Form]:
    """Forms that this machine has kernels for."""
    narrow = matrix.columns.dtype == torch.uint16
    gpu = on_gpu(matrix.values)
    if not (TRITON if gpu else COMPILED) or matrix.values.dtype not in (torch.bfloat16, torch.float32):
        return ["dense"]
    forms: list[Form] = ["dense"]
    if gpu:
        if matrix.values.dtype == torch.float32:
            forms.append("rows")
        elif narrow:
            forms += ["rows", "masks"]
        return forms
    if narrow and gathers():
        forms.append("rows")
    if matrix.values.dtype == torch.bfloat16 and expands():
        forms.append("masks")
    return forms


def sparse_linear(X: torch.Tensor, merged: Merged, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The layer with its active groups merged, for inference: no gradients.

    Sums are float32 and rounded once.

    Parameters
    ----------
    X : float [..., inputs]
    merged : Merged
    bias : float [out], optional

    Returns
    -------
    tensor [..., out], dtype of `X`

    Raises
    ------
    ValueError
        An input that does not fit the layer.
    """
    check_input(X, merged.inputs)
    if not X.numel():
        return X.new_zeros(*X.shape[:-1], merged.out)
    with torch.no_grad():
        if merged.form == "dense":
            return functional.linear(X, merged.values.to(X.dtype), None if bias is None else bias.to(X.dtype))
        X_TI = X.reshape(-1, merged.inputs)
        if on_gpu(merged.values):
            return _on_gpu(X_TI, merged, bias).reshape(*X.shape[:-1], merged.out)
        way: str = merged.form
        if len(X_TI) > 1:
            known = costs(merged.out, merged.inputs, merged.entries, len(X_TI), merged.values.itemsize)
            way = min(_WAYS[way], key=lambda one: known[one])
        if way == "bands":
            Y_TO = _in_bands(X_TI, merged)
        else:
            Y_TO = (_token_major if way == "tokens" else _decode)(X_TI, merged)
        if bias is not None:
            Y_TO = Y_TO + bias
        return Y_TO.to(X.dtype).reshape(*X.shape[:-1], merged.out)


def _on_gpu(X_TI: torch.Tensor, merged: Merged, bias: torch.Tensor | None) -> torch.Tensor:
    """Few tokens by one kernel, bias and rounding included: a second would take as long as reading the weight."""
    if len(X_TI) > DECODE_TOKENS:
        return functional.linear(
            X_TI, merged.dense().to(X_TI.dtype), None if bias is None else bias.to(X_TI.dtype)
        )
    Y_TO: torch.Tensor
    if merged.form == "masks":
        Y_TO = decode_masks(X_TI, merged.values, merged.places, merged.starts, merged.skips, bias)
    else:
        Y_TO = decode_rows(X_TI, merged.places, merged.starts, bias)
    return Y_TO


def _decode(X_TI: torch.Tensor, merged: Merged) -> torch.Tensor:
    """Few tokens: the weight is read once for eight of them; float32 [tokens, out]."""
    X_TI = X_TI.float()
    kind = f"rows{8 * merged.values.itemsize}"
    if merged.form == "masks":
        kind, width = "masks", merged.places.shape[1] * WORD
        if width != merged.inputs:
            X_TI = functional.pad(X_TI, (0, width - merged.inputs))
        X_TI = X_TI.view(len(X_TI), -1, WORD // 2, 2).transpose(2, 3).reshape(len(X_TI), width)
    X_TI = X_TI.contiguous()
    tokens, width = X_TI.shape
    Y_TO = torch.empty(tokens, merged.out)
    x, y = X_TI.data_ptr(), Y_TO.data_ptr()
    for first in range(0, tokens, DECODE_TOKENS):
        at = x + 4 * width * first, width, y + 4 * merged.out * first
        merged.launch(kind, min(DECODE_TOKENS, tokens - first), merged.out, *at)
    return Y_TO


def _token_major(X_TI: torch.Tensor, merged: Merged) -> torch.Tensor:
    """More tokens: each value meets vectors of 16 tokens, up to 64 in a call; float32 [tokens, out]."""
    kind = f"tokens{8 * merged.values.itemsize}"
    batches = []
    for x_TI in X_TI.float().split(TOKEN_BATCH):
        vectors = {1: 1, 2: 2}.get(-(-len(x_TI) // 16), 4)
        x_IT = functional.pad(x_TI, (0, 0, 0, 16 * vectors - len(x_TI))).T.contiguous()
        y_OT = torch.empty(merged.out, 16 * vectors)
        merged.launch(kind, vectors, merged.out, x_IT.data_ptr(), y_OT.data_ptr())
        batches.append(y_OT[:, : len(x_TI)].T)
    return torch.cat(batches)


def _in_bands(X_TI: torch.Tensor, merged: Merged) -> torch.Tensor:
    """Many tokens: rows are made dense band by band, small enough for the cache, and multiplied; dtype of `X_TI`."""
    rows = max(1, BAND_BYTES // (merged.inputs * merged.values.itemsize))
    memory = merged.values.new_empty(rows * merged.width)
    bands = [
        functional.linear(X_TI, merged.dense(first, min(first + rows, merged.out), memory).to(X_TI.dtype))
        for first in range(0, merged.out, rows)
    ]
    return torch.cat(bands, dim=-1)


def costs(out: int, inputs: int, entries: int, tokens: int, itemsize: int = 2) -> dict[str, float]:
    """What each way through a layer costs, in bytes that memory delivers meanwhile; two threads or one.

    Parameters
    ----------
    out, inputs, entries : int
        Of the layer; entries are the active ones.
    tokens : int
    itemsize : int
        Bytes of a value.

    Returns
    -------
    dict
        "dense": Torch's product with a dense weight; "rows", "masks": the decode kernels of these forms; "tokens": rows
        with the tokens side by side; "bands": either form made dense for the call.
    """
    weights = out * inputs
    product = MULTIPLY * weights * tokens
    gathered = CALL + ROW * out + (GATHER + itemsize) * entries
    vectors = -(-tokens // 16)
    masks = max(weights / 8 + itemsize * entries, EXPAND * weights)
    return {
        "dense": itemsize * weights + product,
        "rows": gathered + GATHER_MORE * entries * (tokens - 1),
        "masks": CALL + masks + EXPAND_MORE * weights * (tokens - 1),
        "tokens": CALL * -(-vectors // 4) + ROW * out + TOKEN_VECTORS * entries * (1 + max(2, vectors)),
        "bands": CALL + (itemsize + BAND) * weights + product,
    }


def gpu_costs(out: int, inputs: int, entries: int, itemsize: int = 2) -> dict[str, float]:
    """What "dense", "rows" and "masks" cost a GPU at one token; else as `costs`."""
    weights = out * inputs
    return {
        "dense": itemsize * weights,
        "rows": 2 * itemsize * entries,
        "masks": max(itemsize * entries + 3 / 16 * weights, GPU_EXPAND * weights),
    }


_WAYS = {"rows": ("rows", "tokens", "bands"), "masks": ("masks", "bands")}


def choose_path(
    out: int, inputs: int, active_entries: int, tokens: int, training: bool, gpu: bool = False
) -> Path:
    """The cost model in a word, for a machine that has every kernel.

    Parameters
    ----------
    out, inputs, active_entries : int
    tokens : int
    training : bool
    gpu : bool
        Whether a GPU computes it.

    Returns
    -------
    "dense", "decode" or "prefill"
        "dense": a whole weight by Torch's product (`gated_linear` in training; else `merge` keeps it dense); "decode"
        and "prefill": `sparse_linear` on a compressed weight by the kernels for few and for more tokens.
    """
    known = gpu_costs(out, inputs, active_entries) if gpu else costs(out, inputs, active_entries, 1)
    form = min(("dense", "rows", "masks"), key=lambda one: known[one])
    if training or form == "dense":
        return "dense"
    if gpu:
        return "decode" if tokens <= DECODE_TOKENS else "prefill"
    known = costs(out, inputs, active_entries, tokens)
    return "decode" if min(_WAYS[form], key=lambda one: known[one]) == form else "prefill"
