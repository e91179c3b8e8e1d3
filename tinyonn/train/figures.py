"""What a step says of itself to the curve and the monitors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from tinyonn.train.options import LossWeights
from tinyonn.train.routing import Routed
from tinyonn.train.samples import Sums

TRAINED = ("kl", "ce", "hidden")


def loss_of(sums: Sums, routed: Routed | None, weights: LossWeights) -> float:
    """The whole loss: all parts by their weights, the router's own among them."""
    parts = [getattr(weights, name) * sums.mean(name) for name in TRAINED if name in sums.counts]
    return math.fsum(parts) + (0.0 if routed is None else float(routed.loss.detach()))


def load_of(routed: Routed | None) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Samples that chose each expert, int64 [E]; None without a router, or while all experts are on."""
    if routed is None or bool(routed.active_BE.all()):
        return None
    load: np.ndarray[Any, np.dtype[np.int64]] = routed.load_E.cpu().numpy()
    return load


def active_experts(routed: Routed | None, config: Any) -> torch.Tensor:
    """Experts that were on for any sample, bool [E]; without a router those of the stated rule."""
    if routed is not None:
        return routed.active_BE.any(0).cpu()
    active_E = torch.zeros(config.experts, dtype=torch.bool)
    active_E[config.chosen_experts] = True
    return active_E


def sparsity(routed: Routed, sizes: list[int]) -> dict[str, float]:
    """Experts and expert weights that a token runs through, mean over samples; the core counted among the weights."""
    sizes_G = torch.tensor(sizes, dtype=torch.float64)
    active_BE = routed.active_BE.cpu().double()
    weights = float((active_BE @ sizes_G[:-1]).mean() + sizes_G[-1])
    return {"active_experts": float(active_BE.sum(1).mean()), "active_weights": weights}
