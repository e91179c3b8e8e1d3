"""A look at one expert: how many weights it has where, and which; saved beside exported models."""

from __future__ import annotations

from typing import Any

import torch

from .linear_tinyonn import ExpertLinear
from .sparse_tinyonn import dense_of


class TinyONNExpert:
    """One expert of a model, or its core, for a look inside.

    Parameters
    ----------
    model : TinyONNForCausalLM
    number : int
        From 0; the core has the number k.
    """

    def __init__(self, model: Any, number: int) -> None:
        self.model, self.number = model, number

    @property
    def is_core(self) -> bool:
        """Whether this one is always on."""
        return self.number == int(self.model.config.experts)

    @property
    def sizes(self) -> dict[str, int]:
        """Weights in each layer."""
        return {name: self._range(layer)[1] for name, layer in self.model.sparse_layers.items()}

    @property
    def size(self) -> int:
        """Weights in all layers."""
        return sum(self.sizes.values())

    def entries(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows int64, columns int64 and values of its weights in a layer, sorted by row and column."""
        layer = self._layer(name)
        first, count = self._range(layer)
        start = self.number * layer.out_features
        lengths = layer.row_pointer[start : start + layer.out_features + 1].long().diff()
        rows = torch.arange(layer.out_features, device=lengths.device).repeat_interleave(lengths)
        part = slice(first, first + count)
        return rows, layer.columns[part].long(), layer.values.detach()[part]

    def dense(self, name: str) -> torch.Tensor:
        """What it adds to a layer's weight, [out, in]."""
        layer = self._layer(name)
        alone = torch.zeros(layer.groups, device=layer.values.device)
        alone[self.number] = 1
        return dense_of(layer.matrix, alone).detach()

    def _layer(self, name: str) -> ExpertLinear:
        layers: dict[str, ExpertLinear] = self.model.sparse_layers
        if name not in layers:
            raise ValueError(
                f"no sparse layer {name!r}; there are {len(layers)}, {next(iter(layers), None)} first"
            )
        return layers[name]

    def _range(self, layer: ExpertLinear) -> tuple[int, int]:
        start = self.number * layer.out_features
        first, last = layer.row_pointer[[start, start + layer.out_features]].tolist()
        return first, last - first

    def __repr__(self) -> str:
        kind = "core" if self.is_core else f"expert {self.number}"
        return f"<{kind} of {self.size} weights in {sum(map(bool, self.sizes.values()))} layers>"
