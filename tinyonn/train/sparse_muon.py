"""Muon for the values of sparse layers, group by group."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tinyonn.model.linear_tinyonn import ExpertLinear
from tinyonn.train.newton_schulz import orthogonalised
from tinyonn.train.value_groups import group_of_entries, runs, touched
from tinyonn.train.values_optimizer import Named, ValuesOptimizer


class SparseMuon(ValuesOptimizer):
    """Muon for sparse matrices: the momentum of the entries, as a dense matrix, orthogonalised and read at the entries.

        B <- momentum B + (1 - momentum) G,   U = NS(G + momentum (B - G)) at the entries that are updated, 0 elsewhere
        W <- (1 - lr * weight_decay) W - lr * 0.2 sqrt(max(out, in) * n / (out * in)) U

    for the n entries that are updated. Muon: Jordan et al. 2024; 0.2 sqrt(max(out, in)), by which AdamW's learning
    rates can be used: Liu et al. 2025, Muon is Scalable, section 2.2. Orthogonalising spreads a fixed norm over the
    entries, so the fewer are updated the larger each update were; sqrt(n / (out * in)) holds its rms at about 0.2 lr.
    With every entry kept it is `torch.optim.Muon` with ``adjust_lr_fn="match_rms_adamw"``.

    Parameters
    ----------
    layers : iterable of (name, ExpertLinear)
    lr, momentum, weight_decay : float
    nesterov : bool
    ns_steps : int
    """

    def __init__(
        self,
        layers: Iterable[Named],
        lr: float = 1e-4,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
        }
        super().__init__(layers, defaults)

    def _update(
        self, values: nn.Parameter, grad: torch.Tensor, sizes: list[int], group: dict[str, Any]
    ) -> None:
        state = self.state[values]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(values)
        if values.is_cuda:
            self.update_together(values, grad, sizes, group)
        else:
            self.update_runs(values, grad, sizes, group)

    def update_runs(
        self, values: nn.Parameter, grad: torch.Tensor, sizes: list[int], group: dict[str, Any]
    ) -> None:
        """A step of the groups that have a gradient, by slices."""
        layer, momenta = self._layers[values], self.state[values]["momentum_buffer"]
        parts = [run.entries for run in runs(touched(grad, sizes).tolist(), sizes)]
        if not parts:
            return
        lr, momentum = float(group["lr"]), group["momentum"]
        places = _places(layer)
        dense = values.new_zeros(layer.out_features * layer.in_features)
        for part in parts:
            buffer, g = momenta[part], grad[part].to(values.dtype)
            buffer.lerp_(g, 1 - momentum)
            dense[places[part]] = g.lerp(buffer, momentum) if group["nesterov"] else buffer
        U_OI = orthogonalised(dense.view(layer.out_features, layer.in_features), group["ns_steps"])
        updated = sum(part.stop - part.start for part in parts)
        size = 0.2 * math.sqrt(updated / min(layer.out_features, layer.in_features))
        for part in parts:
            values[part].mul_(1 - lr * group["weight_decay"])
            values[part].add_(U_OI.reshape(-1)[places[part]].to(values.dtype), alpha=-lr * size)

    def update_together(
        self, values: nn.Parameter, grad: torch.Tensor, sizes: list[int], group: dict[str, Any]
    ) -> None:
        """The same step of all groups at once, for a GPU: see `tinyonn.train.sparse_adamw.update_together`."""
        layer, buffer = self._layers[values], self.state[values]["momentum_buffer"]
        lr, momentum = float(group["lr"]), group["momentum"]
        live_G = touched(grad, sizes)
        live_E = live_G[group_of_entries(sizes, values.device)]
        g = grad.to(values.dtype)
        torch.where(live_E, buffer.lerp(g, 1 - momentum), buffer, out=buffer)
        moved = torch.where(live_E, g.lerp(buffer, momentum) if group["nesterov"] else buffer, 0)
        places = _places(layer)
        dense = values.new_zeros(layer.out_features * layer.in_features).index_copy_(0, places, moved)
        U_OI = orthogonalised(dense.view(layer.out_features, layer.in_features), group["ns_steps"])
        updated = (live_G * torch.tensor(sizes, device=values.device)).sum()
        size = 0.2 * (updated / min(layer.out_features, layer.in_features)).sqrt()
        step = U_OI.reshape(-1)[places].to(values.dtype).mul_(lr * size)
        torch.where(live_E, values.mul(1 - lr * group["weight_decay"]).sub_(step), values, out=values)


def _places(layer: ExpertLinear) -> torch.Tensor:
    """Where every entry lies in the dense weight, row by row, int64 [entries]."""
    counts = layer.row_pointer.long().diff()
    rows = torch.arange(layer.out_features, device=counts.device).repeat(layer.groups)
    starts = rows.mul_(layer.in_features).repeat_interleave(counts, output_size=layer.values.numel())
    return starts.add_(layer.columns.to(torch.int64))
