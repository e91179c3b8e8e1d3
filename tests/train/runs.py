"""An assembled and profiled run of a small real model, and short trainings of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.experts.runs import clustered_run
from tests.train.defaults import loss_weights, optimizer_options, routing_options, stage_options, training
from tinyonn.config import Config, ExpertsConfig
from tinyonn.experts.assemble import assemble_run
from tinyonn.profile.stage import ProfileOptions, profile_run
from tinyonn.train.options import (
    ScheduleOptions,
)
from tinyonn.train.spec import RouterShape
from tinyonn.train.stage import TrainStageOptions

OPTIONS = training(
    steps=12,
    batch=4,
    micro_batch=2,
    warm_start=3,
    warm_start_batch=8,
    prompt_tokens=4,
    precision="float32",
    checkpoint_every=4,
    prompt_loss=False,
    weights=loss_weights(balance=0.01),
    routing=routing_options(ks=(), bias_rate=0.001),
    stages=stage_options(first=0.5),
    schedule=ScheduleOptions(decay=0.2),
    optimizers=optimizer_options(router_lr=2e-3, experts="adamw", experts_lr=1e-4, norms_lr=0.0),
)
ROUTER = RouterShape(branches=2, width=16, top_k=2)


@dataclass(frozen=True)
class World:
    """A run with experts and profile; the dense model lies in ``folder / "model"``."""

    folder: Path
    config: Config

    @property
    def run(self) -> str:
        return str(self.folder / "run")

    def options(self, folder: Path, **changes: Any) -> TrainStageOptions:
        """A training into a folder of its own; `changes` are of `TrainOptions` or of the stage's options."""
        train = {name: value for name, value in changes.items() if hasattr(OPTIONS, name)}
        rest = {name: value for name, value in changes.items() if name not in train}
        given = TrainStageOptions(
            train=replace(OPTIONS, **train),
            router=ROUTER,
            threads=1,
            folder=folder / "train",
            output=folder / "model",
        )
        return replace(given, **rest)

    def copy(self, folder: Path) -> World:
        """One that may be changed."""
        shutil.copytree(self.folder, folder)
        return replace(self, folder=folder)


def make_world(folder: Path) -> World:
    """Record, score, cluster, assemble and profile."""
    config = clustered_run(folder, quantization="none")
    assemble_run(str(folder / "run"), config.model, ExpertsConfig(budget=0.6))
    profile_run(str(folder / "run"), config, ProfileOptions(workers=1))
    return World(folder, config)
