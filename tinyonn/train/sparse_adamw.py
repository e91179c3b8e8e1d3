"""AdamW for the values of sparse layers, group by group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tinyonn.train.value_groups import Run, group_of_entries, runs, touched
from tinyonn.train.values_optimizer import Named, ValuesOptimizer


class SparseAdamW(ValuesOptimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) that counts the steps of every group of values apart.

    Parameters
    ----------
    layers : iterable of (name, ExpertLinear)
    lr, weight_decay, eps : float
    betas : (float, float)
    """

    def __init__(
        self,
        layers: Iterable[Named],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(layers, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(
        self, values: nn.Parameter, grad: torch.Tensor, sizes: list[int], group: dict[str, Any]
    ) -> None:
        state = self.state[values]
        if not state:
            state["step"] = torch.zeros(len(sizes), dtype=torch.float32, device=values.device)
            state["exp_avg"] = torch.zeros_like(values)
            state["exp_avg_sq"] = torch.zeros_like(values)
        (update_together if values.is_cuda else update_runs)(values, grad, sizes, state, group)


def update_runs(
    values: torch.Tensor, grad: torch.Tensor, sizes: list[int], state: dict[str, Any], group: dict[str, Any]
) -> None:
    """A step of the groups that have a gradient, by slices: nothing else is read."""
    live = touched(grad, sizes).tolist()
    count_G = state["step"]
    count_G += torch.tensor(live, dtype=torch.float32)
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    for run in runs(live, sizes):
        w, g = values[run.entries], grad[run.entries].to(values.dtype)
        m, v = state["exp_avg"][run.entries], state["exp_avg_sq"][run.entries]
        w.mul_(1 - lr * group["weight_decay"])
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        count = count_G[run.groups].double()
        below = v.sqrt().div_(_by_entry((1 - beta2**count).sqrt(), run, v)).add_(group["eps"])
        w.sub_(m.div(below).mul_(_by_entry(lr / (1 - beta1**count), run, v)))


def update_together(
    values: torch.Tensor, grad: torch.Tensor, sizes: list[int], state: dict[str, Any], group: dict[str, Any]
) -> None:
    """The same step of all groups at once, for a GPU: launching run after run takes longer than their work.

    Nothing waits for the device. Holds 21 bytes an entry of the layer meanwhile.
    """
    live_G = touched(grad, sizes)
    count_G = state["step"] = state["step"].to(values.device).add_(live_G)
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    count = count_G.double()
    below_G = torch.where(live_G, (1 - beta2**count).sqrt(), 1).to(values.dtype)
    rate_G = torch.where(live_G, lr / (1 - beta1**count), 0).to(values.dtype)
    group_E = group_of_entries(sizes, values.device)
    live_E = live_G[group_E]
    w, m, v, g = values, state["exp_avg"], state["exp_avg_sq"], grad.to(values.dtype)
    torch.where(live_E, m.lerp(g, 1 - beta1), m, out=m)
    torch.where(live_E, v.mul(beta2).addcmul_(g, g, value=1 - beta2), v, out=v)
    step = m.div(v.sqrt().div_(below_G[group_E]).add_(group["eps"])).mul_(rate_G[group_E])
    torch.where(live_E, w.mul(1 - lr * group["weight_decay"]).sub_(step), w, out=w)


def _by_entry(factors: torch.Tensor, run: Run, like: torch.Tensor) -> torch.Tensor:
    """A factor of each group for each entry; one alone if all are the same."""
    known = factors.to(like)
    if bool((factors == factors[0]).all()):
        return known[:1]
    return known.repeat_interleave(torch.tensor(run.sizes, device=like.device), output_size=len(like))
