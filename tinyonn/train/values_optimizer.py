"""An optimizer of the values of sparse layers, of which a step may touch some groups and must not touch the others.

A group is updated if its gradient has any entry that is not 0. All others keep their values, moments and counts of
steps bit for bit: no decay, no old momentum. So an expert that was masked or unused goes on later where it was left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tinyonn.model.linear_tinyonn import ExpertLinear
from tinyonn.train.value_groups import group_sizes

Named = tuple[str, ExpertLinear]


class ValuesOptimizer(Optimizer):
    """Steps of sparse layers one after another; a subclass updates one.

    Parameters
    ----------
    layers : iterable of (name, ExpertLinear)
        On their device already.
    defaults : dict
        Hyperparameters.
    """

    def __init__(self, layers: Iterable[Named], defaults: dict[str, Any]) -> None:
        known = list(layers)
        self._layers = {layer.values: layer for _, layer in known}
        self._sizes = {
            layer.values: group_sizes(layer.row_pointer, layer.out_features, layer.groups)
            for _, layer in known
        }
        super().__init__([(f"{name}.values", layer.values) for name, layer in known], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every layer that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None:
                    self._update(values, values.grad, self._sizes[values], group)
        return loss

    def _update(
        self, values: nn.Parameter, grad: torch.Tensor, sizes: list[int], group: dict[str, Any]
    ) -> None:
        raise NotImplementedError
