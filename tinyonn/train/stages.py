"""The rules of the two stages: which experts may learn from a step, how many run, and how fast all of it learns.

    surprise of an expert   rms of the loss's gradient over all its entries, all layers
    stage 1                 top_k run, act_k get gradients, the min_k least surprised of these are updated
    stage 2                 k grows with surprise; PI scales the learning rate
    PI                      exp(-alpha * ((1 - gamma) * eps / tau + gamma * S))

with eps the loss per token, tau the mean entropy of the predicted distributions (both nats) and S the gradient's norm.
Source: Predictive Integrity, github.com/dmf-archive/PILF, utils/pi_calculator.py, with alpha 1, gamma 0.5 and S the
raw norm. Here S is the norm over its running mean. A raw norm goes with the number of weights and the loss's scale, so
that its share of PI would differ from model to model; eps / tau is about 1 for a calibrated one, and now so is S.

Shape suffixes: E experts, G groups (experts and, last, the core), B samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tinyonn.train.expert_optimizers import expert_layers, group_sizes
from tinyonn.train.optimizers import SpikeWatch
from tinyonn.train.options import StageOptions


class RunningMean:
    """Exponential mean of one or more numbers, each over the times that it was seen.

    m <- decay * m + (1 - decay) * x,  w <- decay * w + (1 - decay),  mean = m / w  (as Adam corrects its moments)

    Parameters
    ----------
    size : int
        Numbers.
    decay : float
        0..1; the mean looks back over some 1 / (1 - decay) values.
    """

    def __init__(self, size: int = 1, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of a running mean is {decay}; it lies from 0 to below 1")
        self.decay = decay
        self.moments = torch.zeros(size, dtype=torch.float64)
        self.weights = torch.zeros(size, dtype=torch.float64)

    def update(self, values: torch.Tensor | float, seen: torch.Tensor | None = None) -> None:
        """Take in new values; those that are not finite, or not `seen` (bool [size]), leave their mean alone."""
        new = torch.as_tensor(values, dtype=torch.float64).detach().cpu().reshape(-1)
        taken = new.isfinite() if seen is None else new.isfinite() & seen.cpu()
        step = torch.where(taken, 1 - self.decay, 0.0)
        self.moments += step * (torch.where(taken, new, 0.0) - self.moments)
        self.weights += step * (1 - self.weights)

    @property
    def mean(self) -> torch.Tensor:
        """Float64 [size]; nan where nothing was seen."""
        return self.moments / self.weights

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {"moments": self.moments.clone(), "weights": self.weights.clone()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint."""
        for name in ("moments", "weights"):
            if state[name].shape != self.moments.shape:
                raise ValueError(
                    f"a running mean of {state[name].numel()} values does not fit {self.moments.numel()}"
                )
        self.moments = state["moments"].to(torch.float64).clone()
        self.weights = state["weights"].to(torch.float64).clone()


def expert_norms(grad: torch.Tensor, row_pointer: torch.Tensor, out: int, groups: int) -> torch.Tensor:
    """Squared norm of each group's gradient."""
    lengths = group_sizes(row_pointer, out, groups).to(grad.device)
    return torch.segment_reduce(grad.double().square(), "sum", lengths=lengths, initial=0.0)


def group_surprise(model: nn.Module) -> torch.Tensor:
    """Rms of the gradient over each group's entries in all layers, as it lies in ``values.grad`` now."""
    squares: torch.Tensor | None = None
    entries: torch.Tensor | None = None
    for _, layer in expert_layers(model):
        sizes = layer.matrix.group_sizes().cpu()
        zero = torch.zeros(layer.groups, dtype=torch.float64)
        grad = layer.values.grad
        part = zero
        if grad is not None:
            part = expert_norms(grad, layer.row_pointer, layer.out_features, layer.groups).cpu()
        squares = part if squares is None else squares + part
        entries = sizes if entries is None else entries + sizes
    if squares is None or entries is None:
        raise ValueError("the model has no sparse layers, so no expert has a surprise")
    return (squares / entries.clamp(min=1)).sqrt()


class Surprise(RunningMean):
    """Running mean of every group's surprise; steps without its gradient do not count for a group.

    Parameters
    ----------
    groups : int
        Experts and the core.
    decay : float
    """

    def __init__(self, groups: int, decay: float = 0.9) -> None:
        super().__init__(groups, decay)

    def observe(self, model: nn.Module) -> torch.Tensor:
        """Measure the gradients as they are, take them in, and return them: float64 [G], see `group_surprise`."""
        now = group_surprise(model)
        self.update(now, now > 0)
        return now


def stage1_mask(
    surprise_E: torch.Tensor, active_E: torch.Tensor, act_k: int | None = None, min_k: int = 10
) -> torch.Tensor:
    """Experts that stage 1 may update: of those with gradients, the least surprised, to deepen what they do well."""
    experts = surprise_E.numel()
    if min_k < 0 or (act_k is not None and act_k < 0):
        raise ValueError(f"act_k is {act_k} and min_k {min_k}; neither can be negative")
    surprise = surprise_E.detach().double()
    surprise = torch.where(surprise > 0, surprise, torch.inf)  # 0 and nan last
    order = surprise.argsort(stable=True)
    active = active_E.to(order.device)[order]
    ranked = torch.cat([order[active], order[~active]])
    reached = max(int(active.sum()), experts if act_k is None else min(act_k, experts))
    candidate = torch.zeros(experts, dtype=torch.bool, device=order.device)
    candidate[ranked[:reached]] = True
    allowed = torch.zeros_like(candidate)
    allowed[order[candidate[order]][:min_k]] = True
    return allowed


def mask_value_gradients(model: nn.Module, allowed_G: torch.Tensor) -> None:
    """Zero the gradients of groups that are not allowed, in place; the experts' optimizers leave such groups alone."""
    allowed = allowed_G.tolist()
    for name, layer in expert_layers(model):
        if len(allowed) != layer.groups:
            raise ValueError(
                f"{len(allowed)} groups are allowed or not but {name} has {layer.groups}, the core being the last"
            )
        grad = layer.values.grad
        if grad is None:
            continue
        sizes = group_sizes(layer.row_pointer, layer.out_features, layer.groups).tolist()
        for part, may in zip(grad.split(sizes), allowed, strict=True):
            if not may:
                part.zero_()


def dynamic_k(
    surprise_B: torch.Tensor, mean: float, base: int, lo: int, hi: int, power: float = 1.0
) -> torch.Tensor:
    """How many experts a sample gets: k = clip(round(base * (surprise / mean) ** power), lo, hi)."""
    if not 0 <= lo <= hi:
        raise ValueError(f"k lies between {lo} and {hi}; give 0 <= lo <= hi")
    surprise = surprise_B.detach().double()
    relative = surprise / mean if math.isfinite(mean) and mean > 0 else torch.ones_like(surprise)
    wanted = base * relative**power
    wanted = torch.where(surprise.isfinite(), wanted, float(hi)).nan_to_num(nan=hi, posinf=hi)
    return wanted.clamp(lo, hi).round().long()


def predictive_integrity(
    loss: float, entropy: float, surprise: float, alpha: float = 1.0, gamma: float = 0.5
) -> float:
    """PI = exp(-alpha * ((1 - gamma) * loss / entropy + gamma * surprise)), in 0..1."""
    cost = (1 - gamma) * loss / max(entropy, 1e-9) + gamma * surprise
    return math.exp(-alpha * cost) if math.isfinite(cost) else 0.0


def integrity_scale(integrity: float, mean: float, lo: float = 0.5, hi: float = 1.5) -> float:
    """Factor on the learning rate: PI over its running mean, bounded, so that doubtful steps move the weights less."""
    if not 0 <= lo <= 1 <= hi:
        raise ValueError(f"the learning rate's factor lies between {lo} and {hi}; give 0 <= lo <= 1 <= hi")
    if not (math.isfinite(mean) and mean > 0):
        return 1.0
    return min(max(integrity / mean, lo), hi) if math.isfinite(integrity) else lo


@dataclass(frozen=True)
class Growth:
    """How surprise changes the number of experts on; see `tinyonn.train.stages.dynamic_k`.

    Attributes
    ----------
    surprise, mean : float
        Of the step before: the gradient's norm, and its running mean.
    power : float
    least, most : float
        Bounds of the factor.
    """

    surprise: float
    mean: float
    power: float
    least: float
    most: float

    def of(self, k: int, experts: int) -> int:
        """What becomes of a number of experts; all stay all."""
        if k >= experts:
            return experts
        lo, hi = max(1, round(k * self.least)), min(experts, round(k * self.most))
        return int(dynamic_k(torch.tensor([self.surprise]), self.mean, k, min(lo, k), max(hi, k), self.power))


@dataclass(frozen=True)
class Verdict:
    """What the rules say of a step.

    Attributes
    ----------
    scale : float
        Of the learning rates.
    integrity : float
        Predictive integrity.
    """

    scale: float
    integrity: float


class Rules:
    """Running means of surprise, of the gradient's norm and of predictive integrity.

    Parameters
    ----------
    options : StageOptions
    groups : int
        Experts and the core; 0 for a model without.
    spike : float
        As of `SpikeWatch`.
    """

    def __init__(self, options: StageOptions, groups: int, spike: float) -> None:
        self.options, self.groups = options, groups
        self.surprise = Surprise(groups)
        self.norm, self.integrity = RunningMean(), RunningMean()
        self.spikes = SpikeWatch(spike)
        self._last = RunningMean(decay=0.0)

    @property
    def growth(self) -> Growth | None:
        """For the step to come; None if the number of experts does not depend on surprise."""
        if self.options.grow == 0:
            return None
        last, mean = float(self._last.mean), float(self.norm.mean)
        return Growth(last, mean, self.options.grow, self.options.least, self.options.most)

    def sort_out(self, model: torch.nn.Module, stage: int, active_E: torch.Tensor) -> float:
        """Observe every group's gradient, and in stage 1 zero those that are not to be updated."""
        now_G = self.surprise.observe(model)
        options = self.options
        if stage == 1 and (options.act_k is not None or options.min_k is not None):
            min_k = self.groups - 1 if options.min_k is None else options.min_k
            allowed_E = stage1_mask(now_G[:-1], active_E.cpu(), options.act_k, min_k)
            mask_value_gradients(model, torch.cat([allowed_E, torch.ones(1, dtype=torch.bool)]))
        seen_G = now_G > 0
        return float(now_G[seen_G].mean()) if seen_G.any() else math.nan

    def judge(self, stage: int, loss: float, entropy: float, norm: float) -> Verdict:
        """Predictive integrity of a step, and what it does to the learning rates; takes the step in."""
        usual = float(self.norm.mean)
        surprise = norm / usual if math.isfinite(usual) and usual > 0 else 1.0
        found = predictive_integrity(loss, entropy, surprise, self.options.alpha, self.options.gamma)
        scaled = self.options.integrity and stage == 2
        scale = integrity_scale(found, float(self.integrity.mean)) if scaled else 1.0
        self.norm.update(norm)
        self._last.update(norm)
        self.integrity.update(found)
        return Verdict(scale, found)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {f"{name}/{key}": value for name, part in self._parts() for key, value in part.state().items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint."""
        for name, part in self._parts():
            own = {key.partition("/")[2]: value for key, value in state.items() if key.startswith(f"{name}/")}
            part.load_state(own)

    def _parts(self) -> list[tuple[str, Any]]:
        named = {"surprise": self.surprise, "norm": self.norm, "last": self._last}
        return list({**named, "integrity": self.integrity, "spikes": self.spikes}.items())
