"""Sparse experts in training: a linear layer whose weight is another one for each sample, with gradients.

    Y_BTO = X_BTI W_BOI^T + b,   W_b = sum over groups g of gate_bg * W_g,   the W_g disjoint

    dL/dvalue_e = sum over b of gate_bg * dL/dW_b at e's place
    dL/dgate_bg = sum over g's entries e of value_e * dL/dW_b at e's place

The dense weights of some samples are made for a call, in the dtype of the input, and multiplied as a batch: at the
shapes of a model, products are so much quicker than sparse ones that the entries cost little beside them. A gate's
gradient is there also where the gate is 0: what switching the group on would change, to first order. On a GPU the
weights of few bfloat16 tokens are made within the product instead, and the gradients of values summed over samples
within theirs.

Shape suffixes: ``B`` samples, ``T`` tokens, ``I`` inputs, ``O`` outputs, ``G`` groups, ``P`` samples of a chunk, ``E``
entries. This file is saved beside exported models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from .matrix_tinyonn import ExpertMatrix, check_gates, check_input, entries_of, on_gpu, rows_and_groups

try:
    from .cpu_tinyonn import Gradients, block_rows, fill, gather, in_bands, of_bfloat16, same, to_bfloat16

    COMPILED = True
except ImportError:  # no Numba: by Torch
    COMPILED = False

try:
    from .gated_triton_tinyonn import (
        MAX_GROUPS,
        Spread,
        dense_weight,
        dense_weights,
        gate_sums,
        gated_gradient,
        gated_product,
        spread,
    )
    from .gated_triton_tinyonn import gather as gpu_gather

    TRITON = True
except ImportError:  # no Triton: by Torch
    TRITON = False

CHUNK_WEIGHTS = 4  # dense weights of a layer at a time, or
CHUNK_BYTES = 1 << 26  # as many as go in here
COMPILED_ENTRIES = 1 << 13  # of a matrix; fewer are not worth the seconds that Numba takes to compile
# Of a sample, on a GPU: a weight that is made within the product is made anew for each 256 tokens, while writing and
# reading it takes as long as the product with 400 tokens
TOKENS_WITHIN = 256


def gated_linear(
    X: torch.Tensor, matrix: ExpertMatrix, gates_G: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer with one weight for all of the input: `batched_linear` of one sample.

    Parameters
    ----------
    X : float [..., inputs]
    matrix : ExpertMatrix
    gates_G : float [groups]
    bias : float [out], optional

    Returns
    -------
    tensor [..., out], dtype of `X` (under autocast its dtype)

    Raises
    ------
    ValueError
        Gates or an input that do not fit the matrix.
    """
    check_gates(matrix, gates_G)
    check_input(X, matrix.inputs)
    return batched_linear(X[None], matrix, gates_G[None], bias)[0]


def batched_linear(
    X: torch.Tensor,
    matrix: ExpertMatrix,
    gates_BG: torch.Tensor,
    bias: torch.Tensor | None = None,
    value_gates_BG: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer with each sample's own weight, made dense for the call.

    Gradients reach `X`, the kept values, the gates and the bias. Forward and backward each hold the dense weights of
    four samples, or of as many as take 64 MiB, and keep none between them; on a GPU besides the matrix as dense arrays,
    5 bytes a weight of float32 values, and the values' gradient, 4. The same input on as many threads gives the same
    bits.

    Parameters
    ----------
    X : float [batch, ..., inputs]
    matrix : ExpertMatrix
        Of values in bfloat16, or in float32 to be trained: the weights are then rounded once, to the dtype of `X`.
    gates_BG : float [batch, groups]
    bias : float [out], optional
    value_gates_BG : float [batch, groups], optional
        Take the place of gates in the gradients of values alone: 0 freezes a group that runs, 1 teaches one that is
        off.

    Returns
    -------
    tensor [batch, ..., out], dtype of `X` (under autocast its dtype)

    Raises
    ------
    ValueError
        Gates or an input that do not fit the matrix or each other.
    """
    check_input(X, matrix.inputs)
    for name, gates in (("gates", gates_BG), ("value_gates", value_gates_BG)):
        if gates is not None and gates.shape != (len(X), matrix.groups):
            raise ValueError(
                f"{name} of shape {list(gates.shape)} do not fit an input of {len(X)} samples and a matrix of "
                f"{matrix.groups} groups; give one row for each sample, with the core's gate last"
            )
    if torch.is_autocast_enabled(X.device.type):
        X = X.to(torch.get_autocast_dtype(X.device.type))
    if bias is not None:
        bias = bias.to(X.dtype)
    Y: torch.Tensor = _Batched.apply(  # type: ignore[no-untyped-call]
        X,
        matrix.values,
        gates_BG,
        bias,
        value_gates_BG,
        matrix.columns,
        matrix.row_pointer,
        matrix.out,
        matrix.inputs,
    )
    return Y


class _Batched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, X: torch.Tensor, values: torch.Tensor, gates_BG: torch.Tensor, bias: torch.Tensor | None,
        value_gates_BG: torch.Tensor | None, columns: torch.Tensor, row_pointer: torch.Tensor, out: int, inputs: int,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(X, values, gates_BG, value_gates_BG, columns, row_pointer)
        ctx.shape = out, inputs
        matrix = ExpertMatrix(values.detach(), columns, row_pointer, out, inputs)
        X_BTI = _flat(X)
        if not values.numel() or not X.numel():
            Y_BTO = X.new_zeros(*X_BTI.shape[:2], out)
            return _like(Y_BTO if bias is None else Y_BTO + bias, X)
        dense = _spread(matrix, X_BTI)
        if dense is not None and _within(X_BTI):
            return _like(gated_product(X_BTI, dense, gates_BG, bias), X)
        parts = []
        for part, memory in _chunks(X_BTI, matrix):
            W_POI = _dense(matrix, gates_BG[part], memory, dense)
            if len(W_POI) == 1:
                parts.append(functional.linear(X_BTI[part], W_POI[0], bias))
            elif bias is None:
                parts.append(torch.bmm(X_BTI[part], W_POI.mT))
            else:
                parts.append(torch.baddbmm(bias, X_BTI[part], W_POI.mT))
        return _like(parts[0] if len(parts) == 1 else torch.cat(parts), X)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, G: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        X, values, gates_BG, value_gates_BG, columns, row_pointer = ctx.saved_tensors
        to_X, to_values, to_gates, to_bias = ctx.needs_input_grad[:4]
        matrix = ExpertMatrix(values.detach(), columns, row_pointer, *ctx.shape)
        X_BTI, G_BTO = _flat(X), _flat(G).contiguous()
        of_X = torch.zeros_like(X_BTI) if to_X else None
        wide = torch.promote_types(values.dtype, torch.float32)
        of_values = torch.zeros_like(values, dtype=wide) if to_values else None
        of_gates = torch.zeros_like(gates_BG, dtype=torch.float64) if to_gates else None
        value_gates_BG = gates_BG if value_gates_BG is None else value_gates_BG
        by_X, by_values, by_gates = (
            one and bool(values.numel() and X.numel()) for one in (to_X, to_values, to_gates)
        )
        dense = _spread(matrix, X_BTI) if by_X or by_values else None
        if dense is not None and by_X and _within(X_BTI):
            of_X, by_X = gated_product(G_BTO, dense, gates_BG, transposed=True), False
        if dense is not None and of_values is not None and not by_gates and X.dtype == torch.bfloat16:
            of_W_OI = gated_gradient(G_BTO, X_BTI, dense, value_gates_BG)
            gpu_gather(matrix, of_W_OI[None], torch.ones_like(gates_BG[:1]), of_values)
            by_values = False
        for part, memory in _chunks(X_BTI, matrix) if by_X or by_values or by_gates else ():
            if by_X and of_X is not None:
                torch.bmm(G_BTO[part], _dense(matrix, gates_BG[part], memory, dense), out=of_X[part])
            if by_values or by_gates:
                of_W_POI = torch.bmm(G_BTO[part].mT, X_BTI[part], out=memory)
                of_part = None if of_gates is None else of_gates[part]
                _gather(matrix, value_gates_BG[part], of_W_POI, of_values, of_part)
        return (
            None if of_X is None else _like(of_X, X),
            None if of_values is None else of_values.to(values.dtype),
            None if of_gates is None else of_gates.to(gates_BG.dtype),
            G_BTO.flatten(0, 1).sum(0) if to_bias else None,
            *[None] * 5,
        )


def _flat(X: torch.Tensor) -> torch.Tensor:
    """One axis of tokens."""
    return X.reshape(len(X), X[0].numel() // X.shape[-1] if X.numel() else 0, X.shape[-1])


def _like(Y_BTO: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    # A view of what is made within would forbid callers to add to it in place, as some adapters do.
    Y: torch.Tensor = torch.ops.aten._unsafe_view(Y_BTO, [*X.shape[:-1], Y_BTO.shape[-1]])
    return Y


def _chunks(X_BTI: torch.Tensor, matrix: ExpertMatrix) -> Iterator[tuple[slice, torch.Tensor]]:
    """Samples of a chunk, and memory for their dense weights, which the next chunk takes over."""
    weight = matrix.out * matrix.inputs * X_BTI.itemsize
    samples = len(X_BTI)
    size = min(samples, max(CHUNK_WEIGHTS, CHUNK_BYTES // max(1, weight)))
    memory = X_BTI.new_empty(size, matrix.out, matrix.inputs) if samples else X_BTI
    for first in range(0, samples, max(1, size)):
        last = min(first + size, samples)
        yield slice(first, last), memory[: last - first]


def _by_kernels(matrix: ExpertMatrix, X: torch.Tensor) -> bool:
    """Whether the GPU's kernels do it."""
    known = (torch.bfloat16, torch.float32)
    return (
        TRITON
        and on_gpu(X)
        and X.dtype in known
        and matrix.values.dtype in known
        and matrix.groups <= MAX_GROUPS
    )


def _within(X_BTI: torch.Tensor) -> bool:
    """Whether weights are made within the product; in full float32 precision cuBLAS is far ahead of Triton's."""
    return X_BTI.dtype == torch.bfloat16 and X_BTI.shape[1] <= TOKENS_WITHIN


def _spread(matrix: ExpertMatrix, X_BTI: torch.Tensor) -> Spread | None:
    """What the kernels make weights of; a single weight is made of the entries."""
    return spread(matrix) if len(X_BTI) > 1 and _by_kernels(matrix, X_BTI) else None


def _dense(
    matrix: ExpertMatrix, gates_PG: torch.Tensor, W_POI: torch.Tensor, dense: Spread | None = None
) -> torch.Tensor:
    """Write the dense weights of the samples' gates."""
    if dense is not None:
        dense_weights(dense, gates_PG, W_POI)
        return W_POI
    if _by_kernels(matrix, W_POI):
        for gates_G, W_OI in zip(gates_PG, W_POI, strict=True):
            dense_weight(matrix, gates_G, W_OI)
        return W_POI
    values = matrix.values.to(torch.promote_types(matrix.values.dtype, torch.float32))
    gates_PG = gates_PG.detach().to(values.dtype)
    if not _in_passes(matrix, W_POI):
        places, groups = _places_and_groups(matrix)
        gates_PE = gates_PG.index_select(1, groups)
        W_PE = torch.where(gates_PE == 0, 0, gates_PE * values).to(W_POI.dtype)
        W_POI.zero_().flatten(1).index_copy_(1, places, W_PE)
        return W_POI
    rows = block_rows(matrix.inputs, W_POI.itemsize)
    entries = entries_of(matrix, values.contiguous().numpy())
    store = to_bfloat16 if W_POI.dtype == torch.bfloat16 else same
    in_bands(fill, -(-matrix.out // rows), rows, entries, gates_PG.numpy(), store, _bits(W_POI))
    return W_POI


def _gather(
    matrix: ExpertMatrix, value_gates_PG: torch.Tensor, of_W_POI: torch.Tensor, of_values: torch.Tensor | None,
    of_gates_PG: torch.Tensor | None,
) -> None:  # fmt: skip
    """Add the samples' part to the gradients of values, and write that of the gates."""
    if _by_kernels(matrix, of_W_POI):
        if of_gates_PG is not None:
            of_gates_PG.copy_(gate_sums(matrix, of_W_POI))
        if of_values is not None:
            gpu_gather(matrix, of_W_POI, value_gates_PG, of_values)
        return
    values = matrix.values.to(torch.promote_types(matrix.values.dtype, torch.float32))
    value_gates_PG = value_gates_PG.detach().to(values.dtype)
    if not _in_passes(matrix, of_W_POI):
        places, groups = _places_and_groups(matrix)
        found_PE = of_W_POI.flatten(1).index_select(1, places).to(values.dtype)
        if of_gates_PG is not None:
            products_EP = (found_PE * values).T.double().contiguous()
            lengths = matrix.group_sizes()
            of_gates_PG.copy_(torch.segment_reduce(products_EP, "sum", lengths=lengths, initial=0.0).T)
        if of_values is not None:
            gates_PE = value_gates_PG.index_select(1, groups)
            of_values += torch.where(gates_PE == 0, 0, gates_PE * found_PE).sum(0)
        return
    rows = block_rows(matrix.inputs, of_W_POI.itemsize)
    blocks = -(-matrix.out // rows)
    sums = values.new_zeros(blocks if of_gates_PG is not None else 0, *value_gates_PG.shape)
    gradients = Gradients((values.new_empty(0) if of_values is None else of_values).numpy(), sums.numpy())
    entries = entries_of(matrix, values.contiguous().numpy())
    load = of_bfloat16 if of_W_POI.dtype == torch.bfloat16 else same
    in_bands(gather, blocks, rows, entries, value_gates_PG.numpy(), load, _bits(of_W_POI), gradients)
    if of_gates_PG is not None:
        of_gates_PG.copy_(sums.double().sum(0))


def _places_and_groups(matrix: ExpertMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Place in the dense weight and group of each entry, int64 [entries]."""
    rows, groups = rows_and_groups(matrix)
    return rows * matrix.inputs + matrix.columns.long(), groups


def _in_passes(matrix: ExpertMatrix, W_POI: torch.Tensor) -> bool:
    """Whether the compiled passes do it: not for so few entries that compiling takes longer than they ever save."""
    floats = W_POI.dtype in (torch.bfloat16, torch.float32, torch.float64)
    return floats and COMPILED and not W_POI.is_cuda and matrix.values.numel() >= COMPILED_ENTRIES


def _bits(W_POI: torch.Tensor) -> Any:
    """Floats, or the bits of bfloat16, [samples, out * inputs]."""
    flat = W_POI.view(len(W_POI), -1)
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
