"""The search for the weights of S, on a run of a small real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dense.architectures import make_model
from tests.record.runs import config_of, serial_run, write_rows
from tinyonn.config import Config
from tinyonn.score.tune import tune_run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("tune")
    write_rows(folder / "rows.jsonl")
    config = config_of(make_model("qwen2", folder / "model"), folder / "rows.jsonl")
    serial_run(folder / "run", config)
    return folder / "run", config


def test_the_search_beats_the_default_and_goes_on_where_it_stopped(recorded: tuple[Path, Config]) -> None:
    folder, config = recorded
    first = tune_run(str(folder), config, 6)
    assert first.trials == 6
    again = tune_run(str(folder), config, 6)  # nothing is left to try
    assert again == first
    more = tune_run(str(folder), config, 25)
    assert more.trials == 25
    assert more.agreement >= first.agreement
    assert more.agreement > more.default_agreement  # a gradient that counts for a weight is part of |w g|
    assert more.config.weights[1] < 0
