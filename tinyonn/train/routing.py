"""Which experts are on in a step, and the router's own losses.

Every worker routes the whole batch: the router is small, so that costs less than to exchange what balance and capacity
need of all samples, and the choice is the same everywhere. Gradients of the router's own losses come out
`world` times over and are divided by that; those of the gates come from a worker's own samples alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tinyonn.train import losses
from tinyonn.train.data import Batch, generator
from tinyonn.train.options import LossWeights, RoutingOptions
from tinyonn.train.smk import dynamic_k
from tinyonn.train.student import Student
from tinyonn.train.targets import ProfileTargets


@dataclass(frozen=True)
class Routed:
    """The choice for a batch.

    Attributes
    ----------
    gates_BE : float32 [B, E]
        With the router's graph.
    active_BE : bool [B, E]
    probabilities_BE : float32 [B, E]
    load_E : int64 [E]
        Samples that chose each expert; experts that are always on have none.
    loss : Tensor []
        Weighted sum of the router's own losses, means over samples.
    parts : dict of str to float
        Those losses unweighted, and the entropy of the probabilities, nats.
    """

    gates_BE: torch.Tensor
    active_BE: torch.Tensor
    probabilities_BE: torch.Tensor
    load_E: torch.Tensor
    loss: torch.Tensor
    parts: dict[str, float]


@dataclass(frozen=True)
class Growth:
    """How surprise changes the number of experts on; see `tinyonn.train.smk.dynamic_k`.

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


def drawn_ks(
    options: RoutingOptions, seed: int, step: int, samples: int, experts: int, growth: Growth | None = None
) -> torch.Tensor | None:
    """Experts on for each sample, int64 [B]; None leaves it to the router's rule."""
    if not options.ks:
        return None
    counts = [k or experts for k in options.ks]
    choices = torch.tensor([growth.of(k, experts) if growth else k for k in counts])
    return choices[torch.from_numpy(generator(seed, "ks", step).integers(0, len(choices), samples))]


def choose_experts(
    student: Student,
    batch: Batch,
    step: int,
    seed: int,
    options: RoutingOptions,
    weights: LossWeights,
    targets: ProfileTargets | None,
    growth: Growth | None = None,
) -> Routed:
    """Route a whole batch.

    Parameters
    ----------
    student : Student
        With a router.
    batch : Batch
    step, seed : int
        Decide what is drawn.
    options : RoutingOptions
    weights : LossWeights
    targets : ProfileTargets, optional
    growth : Growth, optional
        Of the numbers that are drawn.
    """
    router, samples, experts = student.router, len(batch), student.experts
    ks = drawn_ks(options, seed, step, samples, experts, growth)
    noise = dropped = None
    if options.noise > 0:
        drawn = generator(seed, "noise", step).standard_normal((samples, experts), "float32")
        noise = torch.from_numpy(drawn) * options.noise
    if options.dropout > 0:
        dropped = torch.from_numpy(generator(seed, "dropout", step).random(experts) < options.dropout)
    choice = student.route(batch, ks, noise, dropped, options.capacity)
    return _measured(choice, router, batch, weights, targets)


def _measured(
    choice: Any, router: Any, batch: Batch, weights: LossWeights, targets: ProfileTargets | None
) -> Routed:
    p_BE, logits, options = choice.probabilities_BE, choice.logits, router.options
    free_E = torch.ones(p_BE.shape[1], dtype=torch.bool, device=p_BE.device)
    free_E[list(options.shared)] = False
    load_E = choice.active_BE.sum(0) * free_E
    # Experts that are always on count as evenly loaded, else all probability would flee to them.
    mean_load = load_E.sum() / free_E.sum().clamp(min=1)
    share_E = losses.shares(torch.where(free_E, load_E.double(), mean_load.double()))
    found = {
        "balance": losses.balance(p_BE, share_E).mean,
        "z": losses.z_loss(logits.main_BN).mean + losses.z_loss(logits.sub_BE, options.branches).mean,
    }
    if targets is not None:
        known, targets_RE = targets.of(batch)
        if known:
            found["profile"] = losses.profile_kl(targets_RE.to(p_BE.device), p_BE[known]).mean
    loss = torch.stack([getattr(weights, name) * value for name, value in found.items()]).sum()
    parts = {name: float(value.detach()) for name, value in found.items()}
    entropy = -torch.xlogy(p_BE.detach(), p_BE.detach().clamp(min=1e-30)).sum(1).mean()
    parts["gate_entropy"] = float(entropy)
    return Routed(choice.gates_BE, choice.active_BE, p_BE, load_E, loss, parts)
