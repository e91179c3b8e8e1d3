"""AdamW for the values of sparse layers, group by group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tinyonn.train.value_groups import Run, runs, touched
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
            state["step"] = torch.zeros(len(sizes), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(values)
            state["exp_avg_sq"] = torch.zeros_like(values)
        live = touched(grad, sizes)
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


def _by_entry(factors: torch.Tensor, run: Run, like: torch.Tensor) -> torch.Tensor:
    """A factor of each group for each entry; one alone if all are the same."""
    known = factors.to(like)
    if bool((factors == factors[0]).all()):
        return known[:1]
    return known.repeat_interleave(torch.tensor(run.sizes, device=like.device), output_size=len(like))
