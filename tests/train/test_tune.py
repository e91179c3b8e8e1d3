"""The search over short runs of a real training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.runs import OPTIONS, World
from tinyonn.errors import InputError
from tinyonn.train.options import option_of, with_options
from tinyonn.train.search import Range
from tinyonn.train.tune import TuneOptions, tune_train

RANGES = {
    "optimizers.experts_lr": Range(1e-5, 1e-1, log=True),
    "weights.ce": Range(0.01, 1.0, log=True),
}
TUNE = TuneOptions(trials=4, steps=6, ranges=RANGES)


@pytest.fixture(scope="module")
def copy(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    return world.copy(tmp_path_factory.mktemp("tune") / "world")


def test_options_by_their_names() -> None:
    assert option_of(OPTIONS, "optimizers.experts_lr") == OPTIONS.optimizers.experts_lr
    changed = with_options(OPTIONS, {"weights.ce": 0.5, "temperature": 3.0, "warm_start": 7.4})
    assert (changed.weights.ce, changed.temperature, changed.warm_start) == (0.5, 3.0, 7)
    assert replace(changed, weights=OPTIONS.weights, temperature=1.0, warm_start=3) == OPTIONS
    with pytest.raises(InputError, match=r"train\.weights\.cee is no option of a training"):
        option_of(OPTIONS, "weights.cee")
    with pytest.raises(InputError, match=r"train\.precision = 'float32' is no number"):
        option_of(OPTIONS, "precision")


def test_the_search_goes_on_where_it_stopped_and_leaves_no_trainings(copy: World, tmp_path: Path) -> None:
    told: list[str] = []
    train = copy.options(tmp_path)
    first = tune_train(copy.run, copy.config, train, replace(TUNE, trials=2), told.append)
    assert first.finished + first.pruned == 2
    assert first.first_loss is not None
    assert sum(line.startswith("trial ") for line in told) == 2
    more = tune_train(copy.run, copy.config, train, TUNE, told.append)
    assert more.finished + more.pruned == 4
    assert more.loss <= first.loss <= first.first_loss
    assert math.isfinite(more.loss)
    assert sum(line.startswith("trial ") for line in told) == 4
    folder = copy.folder / "run" / "tune"
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "study.json", "train.log"]
    assert len(more.table().rows) == 2
    with pytest.raises(InputError, match=r"was begun with batch = 4, now it is 2"):
        tune_train(copy.run, copy.config, copy.options(tmp_path, batch=2), TUNE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_tasks_of_ray_share_a_search(world: World, tmp_path: Path, ray_cluster: str) -> None:
    copy = world.copy(tmp_path / "world")
    report = tune_train(
        copy.run, copy.config, copy.options(tmp_path, address=ray_cluster), replace(TUNE, workers=2)
    )
    assert 4 <= report.finished + report.pruned <= 5  # the other may be in its last when one ends
    alone = tune_train(
        world.copy(tmp_path / "alone").run, world.config, world.options(tmp_path), replace(TUNE, trials=1)
    )
    assert report.first_loss == pytest.approx(alone.first_loss, rel=1e-5)
