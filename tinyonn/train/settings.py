"""From the configuration to what a training is asked for: the sections ``train`` and ``router``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyonn.checks import experts_of, fitting
from tinyonn.config import Config
from tinyonn.train.optimizers import OptimizerOptions
from tinyonn.train.options import (
    LossWeights,
    RoutingOptions,
    StageOptions,
    TrainOptions,
)
from tinyonn.train.plan import TrainStageOptions
from tinyonn.train.spec import RouterShape

TEACHER_K = 64  # tokens of a cached teacher


def train_options(config: Config) -> TrainOptions:
    """What decides a training's result.

    Raises
    ------
    InputError
        Values that contradict each other.
    """
    given = config.train
    plain = given.model_dump(
        exclude={"data", "teacher", "teacher_model", "loss", "routing", "stages", "optimizers"}
    )
    stages = given.stages.model_dump()
    stages |= {name: stages[name] or None for name in ("act_k", "min_k")}  # 0 stands for all
    return TrainOptions(
        **plain,
        checkpointing=config.model.checkpointing,
        weights=LossWeights(**given.loss.model_dump()),
        routing=RoutingOptions(**_routing(config)),
        stages=StageOptions(**stages),
        optimizers=OptimizerOptions(**given.optimizers.model_dump()),
    )


def train_stage_options(
    config: Config,
    output: Path | None = None,
    workers: int | None = None,
    address: str | None = None,
    memory: int | None = None,
    fresh: bool = False,
) -> TrainStageOptions:
    """A call of `tinyonn.train.stage.train_run` as the configuration wants it.

    Parameters
    ----------
    config : Config
    output, workers, address, memory, fresh
        As of `TrainStageOptions`.
    """
    return TrainStageOptions(
        train=train_options(config),
        router=RouterShape(**_router(config)),
        teacher_k=TEACHER_K if config.train.teacher == "cached" else None,
        output=output,
        workers=workers,
        address=address,
        memory=memory,
        fresh=fresh,
    )


def _routing(config: Config) -> dict[str, Any]:
    """The section's options; default numbers of experts that there are too few for are left out."""
    given = config.train.routing
    tree = given.model_dump()
    return tree if "ks" in given.model_fields_set else tree | {"ks": fitting(given.ks, experts_of(config))}


def _router(config: Config) -> dict[str, Any]:
    """The section's options; a default `top_k` beyond the experts is all that can be chosen."""
    given = config.router
    tree = given.model_dump()
    if "top_k" not in given.model_fields_set and given.top_k is not None:
        tree["top_k"] = min(given.top_k, experts_of(config) - given.shared)
    return tree
