"""The dense model whose matrices can be cut: NF4 dequantized once, every matrix restored bit for bit after a cut.

The packed NF4 weights (9/16 byte each) are kept beside the dequantized ones and are what a matrix is restored from; of
an unquantized model a copy is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from tinyonn.config import ModelConfig
from tinyonn.dense.load import DTYPES, load_model
from tinyonn.dense.nf4 import dequantized, is_nf4
from tinyonn.dense.parameters import Parameter, list_parameters


class DenseWeights:
    """A model with its prunable matrices, which are those of the linear layers within the decoder's layers.

    Parameters
    ----------
    config : ModelConfig
        With ``nf4`` the model is quantized and dequantized, as assembly takes its values.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        Plain Torch modules in ``config.dtype``.
    parameters : list of Parameter
        The prunable matrices, model order, with the names and shapes that a run of this config has.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.model: Any = load_model(config).model
        every = list_parameters(self.model)
        self.parameters: list[Parameter] = [p for p in every if p.kind == "linear" and p.layer is not None]
        self._packed: dict[str, torch.nn.Module] = {}
        self._copies: dict[str, torch.Tensor] = {}
        self._last: tuple[str, torch.Tensor] = ("", torch.empty(0))
        self._dtype = DTYPES[config.dtype]
        for parameter in self.parameters:
            self._make_plain(parameter.name)

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows of a matrix before any cut, float32: what `tinyonn.score.source.RunSource` reads weights from."""
        if self._last[0] != name:  # bands of a tensor follow one another, and NF4 is dequantized whole
            self._last = (name, self.original(name))
        return np.asarray(self._last[1][first:last].float().cpu().numpy())

    @property
    def transposed(self) -> frozenset[str]:
        """Names of matrices that are [in, out]: those of a ``Conv1D`` that is not quantized."""
        return frozenset(
            p.name for p in self.parameters if not isinstance(self.module(p.name), torch.nn.Linear)
        )

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def module(self, name: str) -> torch.nn.Module:
        """The module that owns a tensor."""
        module: torch.nn.Module = self.model.get_submodule(name.rpartition(".")[0])
        return module

    def original(self, name: str) -> torch.Tensor:
        """A matrix before any cut, in the tensor's own shape; read it, do not change it."""
        if name in self._packed:
            return dequantized(self._packed[name]).to(self._dtype)
        return self._copies[name]

    @contextlib.contextmanager
    def masked(self, masks: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Any]:
        """The model with some weights zero.

        Parameters
        ----------
        masks : iterable of (str, bool tensor)
            True where a weight is kept; the tensor's own shape. Matrices without one stay whole.
        """
        with self.replaced({}) as model:
            for name, mask in masks:
                self.module(name).get_parameter("weight").mul_(mask.to(self.device))
            yield model

    @contextlib.contextmanager
    def replaced(self, weights: Mapping[str, torch.Tensor]) -> Iterator[Any]:
        """The model with other matrices; all matrices are what they were afterwards."""
        try:
            for name, weight in weights.items():
                self.module(name).get_parameter("weight").copy_(weight)
            yield self.model
        finally:
            for parameter in self.parameters:
                self.module(parameter.name).get_parameter("weight").copy_(self.original(parameter.name))

    def _make_plain(self, name: str) -> None:
        path, _, _ = name.rpartition(".")
        module = self.module(name)
        if not is_nf4(module):
            self._copies[name] = module.get_parameter("weight").detach().clone()
            return
        self._packed[name] = module
        weight = self.original(name)
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        if isinstance(module.bias, torch.nn.Parameter):
            plain.bias = module.bias
        parent, _, leaf = path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, plain.eval())
