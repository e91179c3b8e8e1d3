"""The search for a, b and c of S, on a run of a small real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.experts.runs import clustered_run
from tinyonn.config import Config, EvaluateConfig
from tinyonn.errors import InputError
from tinyonn.evaluate.exponents import tune_run
from tinyonn.evaluate.stage import evaluate_options, evaluate_run


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("tune")
    config = clustered_run(folder)
    rows = [{"text": f"def g(y): return y * {n}", "kind": "code"} for n in range(8)]
    rows += [{"text": f"It snowed on the {n}th night.", "kind": "prose"} for n in range(8)]
    (folder / "held.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    data = config.data.model_copy(update={"path": str(folder / "held.jsonl")})
    return folder / "run", config.model_copy(update={"evaluate": EvaluateConfig(data=data)})


def test_the_search_begins_with_the_named_ones_and_goes_on_where_it_stopped(
    scored: tuple[Path, Config],
) -> None:
    run, config = scored
    first = tune_run(str(run), config, 6)
    assert first.trials == 6
    again = tune_run(str(run), config, 6)  # nothing is left to try
    assert again == first
    more = tune_run(str(run), config, 9)
    assert more.trials == 9
    assert more.loss <= first.loss <= more.default_loss  # the default is one of the named
    assert more.config.exponents[3] == 1


def test_its_loss_is_the_one_that_is_evaluated(scored: tuple[Path, Config]) -> None:
    run, config = scored
    found = tune_run(str(run), config, 6)
    wanted = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"methods": ("default",), "budgets": (0.315,)})}
    )
    report = evaluate_run(str(run), wanted, evaluate_options(str(run), wanted, split="development"))
    line = next(line for line in report.lines if line.method == "default")
    assert found.default_loss == pytest.approx(line.losses.mean, abs=1e-4)


def test_without_held_out_data_it_is_refused(scored: tuple[Path, Config]) -> None:
    run, config = scored
    with pytest.raises(InputError, match="there are no held-out data"):
        tune_run(str(run), config.model_copy(update={"evaluate": EvaluateConfig()}), 3)
