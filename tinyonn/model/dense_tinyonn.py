"""A compressed weight that looks dense to who reads it, and refuses to be written; saved beside exported models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .matrix_tinyonn import ExpertMatrix, dense_of

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
