"""The sparse experts of a linear layer as one compressed matrix, and as a dense one.

    Y_TO = X_TI W_OI^T + b,   W = sum over groups g of gate_g * W_g,   the W_g disjoint

Shape suffixes: ``T`` tokens, ``I`` inputs, ``O`` outputs, ``G`` groups. This file is saved beside exported models: it
needs Torch and NumPy, and is quicker where Numba or, on a GPU, Triton is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_map

try:
    from .cpu_tinyonn import Entries, in_bands, scatter

    COMPILED = True
except ImportError:
    COMPILED = False

try:
    from .triton_tinyonn import scatter as gpu_scatter

    TRITON = True
except ImportError:
    TRITON = False

COMPILED_ENTRIES = 1 << 15  # fewer are not worth the second that Numba takes to compile
CHECKED = 1 << 22  # entries looked at together
# The GPU's kernels run without one, slowly
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor takes the GPU's ways: it lies on one, or Triton's interpreter plays one."""
    return tensor.is_cuda or INTERPRETED


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


def matrix_fault(matrix: ExpertMatrix) -> str | None:
    """What is wrong with the places of a matrix's entries, if anything.

    Row pointers must rise from 0 to the number of entries, and the columns of a row rise within the inputs. Reads
    `CHECKED` entries at a time.
    """
    pointer, columns, entries = matrix.row_pointer, matrix.columns, matrix.values.numel()
    steps = pointer.diff()
    if columns.numel() != entries:
        return f"there are {columns.numel()} columns but {entries} entries"
    if int(pointer[0]) != 0 or int(pointer[-1]) != entries:
        return (
            f"row_pointer goes from {int(pointer[0])} to {int(pointer[-1])} but there are {entries} entries"
        )
    if steps.numel() and int(steps.min()) < 0:
        return f"row_pointer falls at {int((steps < 0).nonzero()[0])}"
    starts = pointer[:-1][steps > 0].long()  # ascending, each once
    for first in range(0, entries, CHECKED):
        last = min(first + CHECKED, entries)
        part = columns[max(first - 1, 0) : last].int()
        low, high = (int(bound) for bound in part.aminmax())
        if low < 0 or high >= matrix.inputs:
            return f"a column is {low if low < 0 else high} but there are {matrix.inputs} inputs"
        falls = part.diff() <= 0
        begin, end = torch.searchsorted(
            starts, torch.tensor([max(first, 1), last], device=starts.device)
        ).tolist()
        falls[starts[begin:end] - max(first, 1)] = False  # a row begins there
        if falls.any():
            return f"columns do not rise at entry {int(falls.nonzero()[0]) + max(first, 1)}"
    return None


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
    if on_gpu(values) and TRITON and values.itemsize <= 4:  # the kernel multiplies in float32
        return gpu_scatter(values, matrix.columns, matrix.row_pointer, gates_G, matrix.out, matrix.inputs)
    if _compiled(matrix):
        W_OI = values.new_empty(matrix.out, matrix.inputs)
        groups = gates_G.nonzero()[:, 0].numpy()
        entries = entries_of(matrix, items(folded(matrix, gates_G)))
        in_bands(scatter, matrix.out, entries, groups, items(W_OI))
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


def _compiled(matrix: ExpertMatrix) -> bool:
    """Whether Numba's kernels do it: small matrices are not worth the seconds of compiling."""
    return COMPILED and not on_gpu(matrix.values) and matrix.values.numel() >= COMPILED_ENTRIES


def items(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bits of a CPU tensor as unsigned integers."""
    integer = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[tensor.itemsize]
    return tensor.detach().contiguous().view(integer).numpy()


def entries_of(matrix: ExpertMatrix, values: np.ndarray[Any, Any]) -> Entries:
    """The matrix on a CPU for a compiled kernel, with these values in place of its own."""
    pointer = matrix.row_pointer.contiguous().numpy()
    return Entries(values, items(matrix.columns), pointer, matrix.out, matrix.inputs)


GATED = (
    "an adapter asks for an expert layer's weight while some experts are off or samples have their own: there is "
    "no one weight; use an adapter that adds to the layer's output (LoRA without DoRA, IA3), or set_gates() of ones"
)
REFUSAL = (
    "an expert's layer holds its weight compressed, and what is added to weights that were left out would be lost or "
    "fill them in: keep the adapter beside the model, or merge it into a dense one, `tinyonn export --format dense`"
)


class DenseWeight(torch.Tensor):
    """The sum of a matrix's groups with gate 1, [out, in]: a shape until something is computed with it.

    Parameters
    ----------
    matrix : ExpertMatrix
    all_on : callable
        Whether all groups are on, asked when something is computed.

    Raises
    ------
    ValueError
        What is computed would write to it, or some groups are off.
    """

    _matrix: ExpertMatrix
    _all_on: Callable[[], bool]

    @staticmethod
    def __new__(cls, matrix: ExpertMatrix, all_on: Callable[[], bool]) -> DenseWeight:  # noqa: D102 as the class
        values = matrix.values
        made: DenseWeight = torch.Tensor._make_wrapper_subclass(
            cls, (matrix.out, matrix.inputs), dtype=values.dtype, device=values.device
        )
        made._matrix, made._all_on = matrix, all_on
        return made

    def dense(self) -> torch.Tensor:
        """A plain tensor of its own memory."""
        if not self._all_on():
            raise ValueError(GATED)
        matrix = self._matrix
        return dense_of(matrix, torch.ones(matrix.groups, device=matrix.values.device))

    @property
    def data(self) -> torch.Tensor:
        """The same as `dense`; not to be set."""
        return self.dense()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise ValueError(REFUSAL)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DenseWeight({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        written = [
            a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ]
        named = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | (kwargs or {})
        if any(isinstance(named.get(name), DenseWeight) for name in written):
            raise ValueError(REFUSAL)

        def plain(part: Any) -> Any:
            return part.dense() if isinstance(part, DenseWeight) else part

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
