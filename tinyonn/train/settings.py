"""From the configuration to what a training is asked for: the sections ``train`` and ``router``."""

from __future__ import annotations

from pathlib import Path

from tinyonn.config import Config
from tinyonn.train.optimizers import OptimizerOptions
from tinyonn.train.options import (
    LossWeights,
    RoutingOptions,
    ScheduleOptions,
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
        exclude={"data", "teacher", "teacher_model", "loss", "routing", "stages", "schedule", "optimizers"}
    )
    stages = given.stages.model_dump()
    stages |= {name: stages[name] or None for name in ("act_k", "min_k")}  # 0 stands for all
    return TrainOptions(
        **plain,
        prompt_tokens=config.profile.prompt_tokens,
        checkpointing=config.model.checkpointing,
        weights=LossWeights(**given.loss.model_dump()),
        routing=RoutingOptions(**given.routing.model_dump()),
        stages=StageOptions(**stages),
        schedule=ScheduleOptions(**given.schedule.model_dump()),
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
        router=RouterShape(**config.router.model_dump()),
        teacher_k=TEACHER_K if config.train.teacher == "cached" else None,
        output=output,
        workers=workers,
        address=address,
        memory=memory,
        fresh=fresh,
    )
