"""The parts of a training as the default configuration wants them, with changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tinyonn.config import Config
from tinyonn.train.options import LossWeights, OptimizerOptions, RoutingOptions, StageOptions, TrainOptions
from tinyonn.train.plan import train_options

DEFAULT = train_options(Config())


def training(**changes: Any) -> TrainOptions:
    """Options of a training."""
    return replace(DEFAULT, **changes)


def loss_weights(**changes: Any) -> LossWeights:
    """Weights of its losses."""
    return replace(DEFAULT.weights, **changes)


def routing_options(**changes: Any) -> RoutingOptions:
    """How its experts are chosen."""
    return replace(DEFAULT.routing, **changes)


def stage_options(**changes: Any) -> StageOptions:
    """Its stages."""
    return replace(DEFAULT.stages, **changes)


def optimizer_options(**changes: Any) -> OptimizerOptions:
    """Its optimizers."""
    return replace(DEFAULT.optimizers, **changes)
