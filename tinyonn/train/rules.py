"""The stage rules applied to a model: what of a step's gradients is kept, and how fast it is learnt from.

`tinyonn.train.smk` has the rules themselves; here is what they remember from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tinyonn.train.clipping import SpikeWatch
from tinyonn.train.options import StageOptions
from tinyonn.train.routing import Growth
from tinyonn.train.running import RunningMean
from tinyonn.train.smk import (
    Surprise,
    integrity_scale,
    mask_value_gradients,
    predictive_integrity,
    stage1_mask,
)


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
        """Observe every group's gradient, and in stage 1 zero those that are not to be updated.

        Parameters
        ----------
        model : module
            With the gradients of the whole batch.
        stage : int
        active_E : bool [E]
            Experts that were on for any sample.

        Returns
        -------
        float
            Mean surprise of the groups that got a gradient; nan if none did.
        """
        now_G = self.surprise.observe(model)
        options = self.options
        if stage == 1 and (options.act_k is not None or options.min_k is not None):
            min_k = self.groups - 1 if options.min_k is None else options.min_k
            allowed_E = stage1_mask(now_G[:-1], active_E.cpu(), options.act_k, min_k)
            mask_value_gradients(model, torch.cat([allowed_E, torch.ones(1, dtype=torch.bool)]))
        seen_G = now_G > 0
        return float(now_G[seen_G].mean()) if seen_G.any() else math.nan

    def judge(self, stage: int, loss: float, entropy: float, norm: float) -> Verdict:
        """Predictive integrity of a step, and what it does to the learning rates; takes the step in.

        Parameters
        ----------
        stage : int
        loss, entropy : float
            Per token, nats.
        norm : float
            Of all gradients.
        """
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
