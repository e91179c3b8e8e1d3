"""The benchmarks work at toy scale. What they measure there means nothing; that they measure it is checked."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.exact import SMALLEST, exact_statistics
from benchmarks.report import at_least, at_most, finish, show
from tests.dense.architectures import make_model
from tests.experts.runs import CELLS, clustered_run
from tests.record.oracle import float64_copy, statistics
from tinyonn.config import ModelConfig
from tinyonn.corpus.file import Sample
from tinyonn.dense.load import load_model
from tinyonn.record.recorder import Recorder
from tinyonn.run import merge_run, open_run
from tinyonn.store.records import TensorCalibration

ROOT = Path(__file__).resolve().parents[2]
QWEN_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen2", tmp_path_factory.mktemp("models") / "qwen2")


def run(*arguments: str, threads: str = "--threads") -> dict[str, Any]:
    """Run a benchmark as its first lines say, on one thread; the last line of its output."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments, *([threads, "1"] if threads else []), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(tree, dict)
    assert all(set(goal) == {"name", "value", "goal", "met"} for goal in tree["goals"])
    return tree


def test_fidelity(qwen2: Path) -> None:
    tree = run(
        "benchmarks/fidelity.py", "--model", str(qwen2),
        *"--samples 14 --max-tokens 64 --calibration 14 --segment 2".split(),
    )  # fmt: skip
    assert [goal["name"].split(":")[0] for goal in tree["goals"]] == ["act", "grad", "freq"]
    assert tree["figures"]["samples"] == 14
    assert tree["figures"]["segments"] >= 7  # at least one for each slice
    rows = tree["figures"]["tensors"]
    matrices = [row["spearman"] for row in rows if row["spearman"] and row["tensor"].endswith("proj.weight")]
    assert len(matrices) == 3 * 2 * 7
    for found in matrices:
        assert 0.8 < found["INT4"] <= 1
        assert found["levels"] > found["saturating"] - 1e-9
        assert found["ideal"] > 0.99


def test_four_billion_record() -> None:
    tree = run("benchmarks/four_billion.py", "record", "--tokens", "16", "--change", json.dumps(QWEN_TINY))
    goals = {goal["name"]: goal for goal in tree["goals"]}
    assert goals["bands read back that differ"]["met"]
    assert (
        tree["figures"]["weights"] == 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    )
    assert tree["figures"]["record_bytes"] == 2 * tree["figures"]["weights"]
    assert 0 < tree["figures"]["stored_bytes"] < 2 * tree["figures"]["record_bytes"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a merged and clustered run of it, and its configuration."""
    folder = tmp_path_factory.mktemp("merged")
    config = clustered_run(folder)
    merge_run(str(folder / "run"))
    tree = {"model": config.model.model_dump(exclude_unset=True), "cluster": {"cells": CELLS}}
    (folder / "run.yaml").write_text(json.dumps(tree), "utf-8")  # YAML holds JSON
    return folder


def test_kmeans_peers(merged: Path) -> None:
    more = ("--config", str(merged / "run.yaml"), "--points", "30000", "--rounds", "1")
    tree = run("benchmarks/kmeans_peers.py", str(merged / "run"), *more, threads="")
    figures = tree["figures"]
    assert figures["cells"] == CELLS and figures["axes"] == ["need code", "need prose"]
    plain, evened = figures["even"]
    assert evened["most"] - evened["least"] < plain["most"] - plain["least"]
    assert all(goal["value"] < 1.05 for goal in tree["goals"] if "distance" in goal["name"])


@pytest.mark.slow
def test_four_billion_stages(merged: Path, tmp_path: Path) -> None:
    """A run drawn from the records of another one, and each stage beside its input and output alone."""
    script, place, shape = (
        "benchmarks/four_billion.py",
        str(tmp_path / "run"),
        ("--shape", str(merged / "model")),
    )
    run(script, "synth", place, "--reference", str(merged / "run"), "--slices", "2", *shape)
    run(script, "score", place, threads="--workers")
    read = run(script, "cluster", place, *shape, "--budget", "0.5", threads="--workers")["figures"]
    cut = [p for p in open_run(place).parameters if p.kind == "linear" and p.layer is not None]
    assert read["weights"] == sum(p.size for p in cut)
    assert read["written"] > 0 and read["read"] > 2 * read["weights"]  # a base model in two bytes a weight
    figures = run(script, "assemble", place, *shape, "--budget", "0.5", threads="--workers")["figures"]
    assert figures["written"] > 0


def test_decode() -> None:
    tree = run("benchmarks/decode.py", "--small")
    assert len(tree["goals"]) == 2 * 5
    assert tree["figures"]["shares"]["1.0"]["forms"] == ["dense"]


@pytest.mark.slow
@pytest.mark.nightly
def test_routing(tmp_path: Path) -> None:
    more = ("--teacher-steps", "2", "--leave-out", "romance")
    tree = run("benchmarks/routing.py", str(tmp_path / "run"), "--small", *more)
    lines = {(line["arm"], line["k"]): line for line in tree["figures"]["lines"]}
    routed = [lines["routed", k] for k in ("10", "25", "50", "all")]
    shares = [line["active"][0] for line in routed]
    assert shares == sorted(shares)
    for name, limit in (("half", shares[-1] / 2), ("tenth", 0.1)):  # one expert is no tenth of it
        assert 0.9 * limit < lines["routed", name]["active"][0] <= limit
    for arm in ("static", "own", "magnitude", "random", "wanda"):
        for k, share in zip(("10", "25", "50", "all"), shares, strict=True):
            assert lines[arm, k]["active"][0] == pytest.approx(share, abs=0.01)
    assert {k for arm, k in lines if arm == "small"} == {"10", "25", "50"}
    assert lines["dense", "as it is"]["losses"][0] < lines["routed", "10"]["losses"][0]
    assert {k for arm, k in lines if arm == "label"} == {"10", "25", "50"}
    assert all(line["unseen"] != line["losses"] for line in lines.values())
    assert tree["tables"][0]["title"].endswith("trained on: romance")
    assert len(tree["goals"]) == 3 + 2 * 3


def test_exact_statistics_are_autograds(qwen2: Path) -> None:
    """Two samples: means of log2 act and log2 |grad| and shares, beside autograd in float64."""
    config = ModelConfig(path=str(qwen2), dtype="float32", device="cpu")
    dense = load_model(config)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (2, 12)).astype(np.int32)
    samples = [
        Sample(number, "a", row, np.where(np.arange(12) < 4, -100, row)) for number, row in enumerate(ids)
    ]
    recorder = Recorder(dense)
    calibration = TensorCalibration(240, 220, -40)
    found = exact_statistics(recorder, samples, {p.name: calibration for p in recorder.parameters})
    twin = float64_copy(load_model(config).model)
    expected = [statistics(twin, sample) for sample in samples]
    for name, tensor in found.items():
        act, grad, share = (part.reshape(-1) for part in tensor.means(zero=-126.0))
        acts = np.stack(
            [np.broadcast_to(sample[name][0], sample[name][1].shape).ravel() for sample in expected]
        )
        grads = np.stack([sample[name][1].ravel() for sample in expected])
        np.testing.assert_allclose(act, _mean_log2(acts), atol=2e-3, err_msg=name)
        np.testing.assert_allclose(share, (acts > 2.0**-5).mean(axis=0), atol=0.5, err_msg=name)
        assert abs(share.mean() - (acts > 2.0**-5).mean()) < 0.01, name
        loud = (grads > grads.max() * 1e-3).all(axis=0)  # float32 noise is large beside a vanishing gradient
        np.testing.assert_allclose(grad[loud], _mean_log2(grads)[loud], atol=0.05, err_msg=name)


def _mean_log2(values: Any) -> Any:
    return np.log2(np.maximum(values, SMALLEST)).mean(axis=0)


def test_a_table_is_plain_text_where_rich_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show("times", ("what", "seconds"), [("sum", 1.5), ("product", 12)])
    assert capsys.readouterr().out.splitlines() == [
        "times",
        "what     seconds",
        "sum       1.5000",
        "product       12",
    ]


def test_the_report_ends_in_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    goals = [at_least("share", math.nan, 0.5), at_most("ratio", 1.0, 1.15)]
    finish("toy", ("what", "value"), [("x", 1.0)], goals, as_json=True, figures={"x": 1})
    tree = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [goal["met"] for goal in tree["goals"]] == [False, True]
    assert tree["goals"][1] == {"name": "ratio", "value": 1.0, "goal": "<= 1.15", "met": True}
    assert tree["figures"] == {"x": 1}
