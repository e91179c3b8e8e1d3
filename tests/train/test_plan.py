"""From the configuration to a training's options."""

from __future__ import annotations

import pytest

from tinyonn.config import Config, StagesConfig, TrainConfig
from tinyonn.train.plan import train_options


@pytest.mark.parametrize(("given", "wanted"), [(0, None), (3, 3)])
def test_no_limit_of_stage_one_is_no_limit(given: int, wanted: int | None) -> None:
    stages = StagesConfig(first=0.5, act_k=given, min_k=given)
    options = train_options(Config(train=TrainConfig(stages=stages))).stages
    assert (options.act_k, options.min_k, options.first) == (wanted, wanted, 0.5)
