"""The sparse experts of a linear layer as one compressed matrix, and as a dense one with gradients.

    Y_TO = X_TI W_OI^T + b,   W = sum over groups g of gate_g * W_g,   the W_g disjoint

Shape suffixes: ``T`` tokens, ``I`` inputs, ``O`` outputs, ``G`` groups. This file is saved beside exported models: it
needs Torch and NumPy, and is quicker where Numba or, on a GPU, Triton is installed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

try:
    from .cpu_tinyonn import collect, in_bands, scatter

    COMPILED = True
except ImportError:
    COMPILED = False

try:
    from .triton_tinyonn import collect as gpu_collect
    from .triton_tinyonn import scatter as gpu_scatter

    TRITON = True
except ImportError:
    TRITON = False

COMPILED_ENTRIES = 1 << 15  # fewer are not worth the second that Numba takes to compile


class ExpertMatrix(NamedTuple):
    """A linear layer's weight, compressed by group and row; groups are disjoint.

    Attributes
    ----------
    values : bfloat16 or float32 [nnz]
        Sorted by group, row and column.
    columns : uint16 [nnz], int32 where `inputs` is above 65,536
    row_pointer : int32 [groups * out + 1]
        Group g's row o holds the entries row_pointer[g * out + o] : row_pointer[g * out + o + 1].
    out, inputs : int
    """

    values: torch.Tensor
    columns: torch.Tensor
    row_pointer: torch.Tensor
    out: int
    inputs: int

    @property
    def groups(self) -> int:
        """Experts and the core."""
        return (self.row_pointer.numel() - 1) // self.out

    def group_sizes(self) -> torch.Tensor:
        """Entries of each group, int64 [groups]."""
        return self.row_pointer[:: self.out].long().diff()


def dense_of(matrix: ExpertMatrix, gates_G: torch.Tensor) -> torch.Tensor:
    """The dense weight: the sum of the groups, each times its gate.

    Parameters
    ----------
    matrix : ExpertMatrix
    gates_G : float [groups]
        Not negative; 1 gives the stored value bit for bit, 0 leaves the group out.

    Returns
    -------
    tensor [out, inputs], dtype of the values

    Raises
    ------
    ValueError
        Gates of another number, negative or not finite.
    """
    check_gates(matrix, gates_G)
    return dense(matrix, gates_G)


def gated_linear(
    X: torch.Tensor, matrix: ExpertMatrix, gates_G: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer with its weight made dense for the call: for training, and with most groups on.

    Gradients reach `X`, the kept values and the gates: a gate's is the sum of W * dL/dW over its group's entries.
    Forward and backward each hold one dense matrix of the layer, never one per group, and keep none between them.

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
    if torch.is_autocast_enabled(X.device.type):
        X = X.to(torch.get_autocast_dtype(X.device.type))
    if bias is not None:
        bias = bias.to(X.dtype)
    Y: torch.Tensor = _GatedLinear.apply(  # type: ignore[no-untyped-call]
        X, matrix.values, gates_G, bias, matrix.columns, matrix.row_pointer, matrix.out, matrix.inputs
    )
    return Y


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, X: torch.Tensor, values: torch.Tensor, gates_G: torch.Tensor, bias: torch.Tensor | None,
        columns: torch.Tensor, row_pointer: torch.Tensor, out: int, inputs: int,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(X, values, gates_G, columns, row_pointer)
        ctx.shape = out, inputs
        W_OI = dense(ExpertMatrix(values, columns, row_pointer, out, inputs), gates_G)
        return functional.linear(X, W_OI.to(X.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, G: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        X, values, gates_G, columns, row_pointer = ctx.saved_tensors
        to_X, to_values, to_gates, to_bias = ctx.needs_input_grad[:4]
        matrix = ExpertMatrix(values, columns, row_pointer, *ctx.shape)
        of_X = of_values = of_gates = of_bias = None
        if to_X:
            of_X = G @ dense(matrix, gates_G).to(G.dtype)
        G_TO = G.reshape(-1, matrix.out)
        if to_values or to_gates:
            of_W_OI = G_TO.T @ X.reshape(-1, matrix.inputs)
            of_values, of_gates = _kept_gradients(matrix, gates_G, of_W_OI, to_values, to_gates)
        if to_bias:
            of_bias = G_TO.sum(0)
        return of_X, of_values, of_gates, of_bias, None, None, None, None


def check_gates(matrix: ExpertMatrix, gates_G: torch.Tensor) -> None:
    """Raise ValueError if the gates do not fit the matrix."""
    if gates_G.shape != (matrix.groups,):
        raise ValueError(
            f"gates of shape {list(gates_G.shape)} do not fit {matrix.groups} groups; "
            "give one gate for each expert and one, the last, for the core"
        )
    if not gates_G.is_floating_point():
        raise ValueError(f"gates of dtype {gates_G.dtype} are not floats; give them as float32")
    wrong = ~((gates_G >= 0) & (gates_G < torch.inf))
    if wrong.any():
        group = int(wrong.nonzero()[0])
        raise ValueError(f"gate {group} is {gates_G[group].item()}; a gate is at least 0 and finite")


def check_input(X: torch.Tensor, inputs: int) -> None:
    """Raise ValueError if the input does not fit the layer."""
    if not X.dim() or X.shape[-1] != inputs:
        raise ValueError(f"an input of shape {list(X.shape)} does not fit a layer of {inputs} inputs")


def rows_and_groups(matrix: ExpertMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and group of every entry, int64 [nnz]."""
    places = torch.arange(matrix.row_pointer.numel() - 1, device=matrix.row_pointer.device)
    places = places.repeat_interleave(matrix.row_pointer.long().diff(), output_size=matrix.values.numel())
    return places % matrix.out, places // matrix.out


def gated(values: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Products in float32 at least, rounded once."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return (values.to(wide) * gates.to(wide)).to(values.dtype)


def dense(matrix: ExpertMatrix, gates_G: torch.Tensor) -> torch.Tensor:
    """`dense_of` for gates that were checked."""
    values, gates_G = matrix.values.detach(), gates_G.detach()
    if values.is_cuda and TRITON:
        return gpu_scatter(values, matrix.columns, matrix.row_pointer, gates_G, matrix.out, matrix.inputs)
    if _compiled(matrix):
        W_OI = values.new_empty(matrix.out, matrix.inputs)
        groups = gates_G.nonzero()[:, 0].numpy()
        known = (items(folded(matrix, gates_G)), items(matrix.columns), items(matrix.row_pointer), groups)
        in_bands(scatter, matrix.out, *known, matrix.out, items(W_OI))
        return W_OI
    rows, groups_E = rows_and_groups(matrix)
    W_OI = values.new_zeros(matrix.out, matrix.inputs)
    places = rows * matrix.inputs + matrix.columns.long()
    gates = gates_G[groups_E]
    active = gates != 0
    W_OI.view(-1)[places[active]] = gated(values, gates)[active]
    return W_OI


def folded(matrix: ExpertMatrix, gates_G: torch.Tensor) -> torch.Tensor:
    """Values times gates; those of groups that are off are anything."""
    gates = gates_G.tolist()
    if all(gate in (0, 1) for gate in gates):
        return matrix.values.detach()
    folded = torch.empty_like(matrix.values)
    sizes = matrix.group_sizes().tolist()
    for gate, gate_value, old, new in zip(
        gates, gates_G, matrix.values.detach().split(sizes), folded.split(sizes), strict=True
    ):
        if gate:
            new.copy_(old if gate == 1 else gated(old, gate_value))
    return folded


def _kept_gradients(
    matrix: ExpertMatrix, gates_G: torch.Tensor, of_W_OI: torch.Tensor, to_values: bool, to_gates: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the kept values and of the gates from that of the dense weight."""
    wide = torch.promote_types(matrix.values.dtype, torch.float32)
    of_kept = _kept(matrix, of_W_OI)
    of_values = of_gates = None
    if to_gates:
        of_gates = _by_group(matrix, of_kept.to(wide) * matrix.values.to(wide)).to(gates_G.dtype)
    if to_values:
        gates = gates_G.repeat_interleave(matrix.group_sizes(), output_size=of_kept.numel())
        of_values = (of_kept.to(wide) * gates.to(wide)).to(matrix.values.dtype)
    return of_values, of_gates


def _kept(matrix: ExpertMatrix, of_W_OI: torch.Tensor) -> torch.Tensor:
    """The dense gradient's entries at the kept places, in their order."""
    of_W_OI = of_W_OI.contiguous()
    of_kept = of_W_OI.new_empty(matrix.values.numel())
    if of_W_OI.is_cuda and TRITON:
        gpu_collect(of_W_OI, matrix.columns, matrix.row_pointer, of_kept)
    elif _compiled(matrix):
        groups = np.arange(matrix.groups)
        known = (items(of_W_OI), items(matrix.columns), items(matrix.row_pointer), groups)
        in_bands(collect, matrix.out, *known, matrix.out, items(of_kept))
    else:
        rows, _ = rows_and_groups(matrix)
        of_kept = of_W_OI[rows, matrix.columns.long()]
    return of_kept


def _by_group(matrix: ExpertMatrix, products: torch.Tensor) -> torch.Tensor:
    """Sums over the entries of each group: float32 within a row, float64 over rows."""
    lengths = matrix.row_pointer.long().diff()
    by_row = torch.segment_reduce(products, "sum", lengths=lengths, initial=0.0)
    return by_row.view(matrix.groups, matrix.out).double().sum(1)


def _compiled(matrix: ExpertMatrix) -> bool:
    """Whether Numba's kernels do it: small matrices are not worth the seconds of compiling."""
    return COMPILED and not matrix.values.is_cuda and matrix.values.numel() >= COMPILED_ENTRIES


def items(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bits of a CPU tensor as unsigned integers."""
    integer = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[tensor.itemsize]
    return tensor.detach().contiguous().view(integer).numpy()
