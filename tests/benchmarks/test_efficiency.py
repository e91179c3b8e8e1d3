"""What a model costs to run is measured with all that a user waits for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.benchmarks.test_benchmarks import ROOT, run
from tests.options import written
from tests.train.runs import make_world
from tinyonn.config import EvaluateConfig
from tinyonn.train.stage import train_run


@pytest.mark.slow
@pytest.mark.nightly
def test_every_model_takes_its_turn(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    world = make_world(tmp_path / "world")
    train_run(world.run, world.config, world.options(tmp_path))
    held_out = shutil.copy(world.config.data.path, tmp_path / "held-out.jsonl")
    data = world.config.data.model_copy(update={"path": held_out})
    config = world.config.model_copy(update={"evaluate": EvaluateConfig(data=data)})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written(config)), "utf-8")
    tree = run(
        "benchmarks/efficiency.py",
        world.run,
        *("--config", str(tmp_path / "config.yaml"), "--model", str(tmp_path / "model")),
        *("--lengths", "6", "9", "--new", "4", "--draws", "2", "--ks", "2"),
    )
    models = tree["figures"]["models"]
    assert list(models) == ["dense BF16", "dense NF4", "all", "2"]
    for name, model in models.items():
        assert set(model["lengths"]) == {"6", "9"}
        for times in model["lengths"].values():
            assert 0 < times["first"] < times["all"] and times["step"] > 0
            assert (times["merged_bytes"] > 0) == (name not in ("dense BF16", "dense NF4"))
    merged = [models[name]["lengths"]["9"]["merged_bytes"] for name in ("all", "2")]
    assert merged[1] <= merged[0]  # of fewer experts


def test_weights_of_a_large_model() -> None:
    command = [sys.executable, "benchmarks/weights.py", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tree = json.loads(done.stdout.splitlines()[-1])
    sizes = tree["figures"]["bytes"]
    assert tree["figures"]["weights"] == 40 * (4 * 2560**2 + 3 * 2560 * 6912)
    assert sizes["NF4"] == sizes["Q4_K"] < sizes["BF16"] / 3
    starts = 40 * (4 * 2560 + 2 * 6912 + 2560) * 101 * 4  # of every row of every expert and of the core
    assert sizes["ours, 31.5% kept, as saved"] == pytest.approx(0.315 * 2 * sizes["BF16"] + starts)
