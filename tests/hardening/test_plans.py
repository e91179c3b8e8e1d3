"""What every stage says that it needs is what it takes: at least, and not much more; what does not fit is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.conftest import world  # noqa: F401
from tests.train.defaults import optimizer_options
from tests.train.runs import OPTIONS, World
from tinyonn.config import ModelConfig
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import CapacityError
from tinyonn.plan.demands import LOGITS_BYTES, ModelFacts
from tinyonn.plan.facts import describe_model
from tinyonn.plan.training import StudentFacts, train_needs
from tinyonn.show.sizes import GiB, MiB
from tinyonn.store.arrays import SegmentWriter, bands
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.records import TensorCalibration
from tinyonn.store.repository import Store
from tinyonn.train.stage import train_run

Usage = namedtuple("Usage", "total used free")
CLOSE = 1.15  # planned over measured, at most
# What a process holds the first time, when its kernels are compiled, and may not hold later.
KERNELS = 192 * MiB


def random_run(folder: Path, parameters: tuple[Parameter, ...], slices: int = 2, parts: int = 2) -> Path:
    """A recorded run of these tensors: random codes, as many live segments of each slice as it takes."""
    names = {f"slice{number}": parts * 2 for number in range(slices)}
    manifest = Manifest({}, {}, {}, names, 2, parameters, 5, parts)  # of no model: any is the recorded one
    store = Store.create(folder / "store", manifest)
    calibration = {p.name: TensorCalibration(200, 190, -3) for p in parameters}
    store.commit_calibration(calibration)
    books = np.tile(np.linspace(0.5, 14.5, 16), (3, 1))
    books[2] /= 16
    draw = np.random.default_rng(0)
    for name in names:
        for part in range(parts):
            segment = Segment(name, 2 * part, 2 * part + 2, 2)
            fork = store.begin(segment)
            writer = SegmentWriter(fork, segment.slice, segment.first, segment.last)
            for p in parameters:
                records = [
                    (
                        first,
                        draw.normal(2048, 400, (last - first, *p.shape[1:])).astype(np.uint16)
                        * np.uint16(16),
                    )
                    for first, last in bands(p.shape)
                ]
                writer.write(p.name, p.shape, calibration[p.name], books, records)
            assert store.commit(fork, segment)
    return folder


def run_stage(stage: str, run: Path, *more: str, code: int = 0) -> dict[str, Any]:
    """A stage in a process of its own; its figures, or the message of its error."""
    command = [sys.executable, "-m", "tinyonn", stage, str(run), *more, "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == code, done.stderr[-2000:]
    return {"message": done.stderr} if code else dict(json.loads(done.stdout.splitlines()[-1]))


def close(figures: dict[str, Any]) -> None:
    """Measured <= planned <= 1.15 times measured, or 192 MiB above it."""
    planned, measured = figures["planned_rss_bytes"], figures["peak_rss_bytes"]
    assert measured <= planned <= max(CLOSE * measured, measured + KERNELS), (
        f"{figures['stage']}: planned {planned / MiB:.0f}, took {measured / MiB:.0f} MiB"
    )


def test_stages_over_a_store_take_what_they_said(tmp_path: Path) -> None:
    parameters, _ = describe_model(ModelConfig(path="reference", device="cpu"))
    run = random_run(tmp_path / "run", tuple(parameters))
    for stage in ("merge", "score", "cluster"):
        close(run_stage(stage, run))
    refused = run_stage("score", run, "--memory", "200MiB", code=0)  # scored already: nothing to do
    assert refused["planned_rss_bytes"] == 0


def test_less_memory_than_a_task_needs_is_refused_by_name(tmp_path: Path) -> None:
    parameters = (Parameter("layers.0.mlp.up_proj.weight", (64, 64), 0, "linear"),)
    run = random_run(tmp_path / "run", parameters)
    message = run_stage("score", run, "--memory", "100MiB", code=3)["message"]
    assert "scoring needs" in message and "100 MiB of --memory" in message


def test_norms_of_queries_and_keys_count_and_a_chunk_of_logits_holds_a_token() -> None:
    facts = ModelFacts("m", 4, 256, 1024, 32_000, "none", 2)
    plain = [Parameter("layers.0.norm.weight", (256,), 0, "norm")]
    with_norms = [*plain, Parameter("layers.0.attn.q_norm.weight", (64,), 0, "norm")]
    student = StudentFacts(1000, 1000, 100, 2000, 1000)

    def need(parameters: list[Parameter], model: ModelFacts, what: str) -> int:
        found = train_needs(student, model, parameters, None, OPTIONS, 128, "cpu")
        return sum(one.bytes for one in found if what in one.what)

    more = need(with_norms, facts, "activations") - need(plain, facts, "activations")
    assert more == 4 * OPTIONS.micro_batch * 128 * 8 * 256
    # A vocabulary whose one row of logits is larger than a chunk
    large = replace(facts, vocabulary=LOGITS_BYTES)
    chunks = need(plain, large, "logits") - OPTIONS.micro_batch * 128 * LOGITS_BYTES * 4 * 3
    assert chunks >= 4 * LOGITS_BYTES


def test_a_disk_too_small_for_checkpoints_is_refused_before_the_first_step(
    world: World,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = world.options(tmp_path, steps=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(GiB, GiB - MiB, MiB))
    with pytest.raises(
        CapacityError, match=r"training needs .* of disk where .* 1\.00 MiB are free .*checkpoint"
    ):
        train_run(world.run, world.config, options)
    left = [path.name for path in (tmp_path / "train").iterdir()]
    assert not [name for name in left if "checkpoint" in name or name.endswith(".jsonl")], left
    assert not (tmp_path / "model").exists()


def test_a_training_writes_what_it_said(world: World, tmp_path: Path) -> None:  # noqa: F811
    options = world.options(tmp_path, steps=12)
    report = train_run(world.run, world.config, options)
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    one = max(path.stat().st_size for path in (tmp_path / "train").rglob("state.safetensors"))
    assert stored + one <= report.planned_disk_bytes  # there is one more while it is written


def test_a_checkpoint_has_the_bytes_of_masters_and_moments(world: World, tmp_path: Path) -> None:  # noqa: F811
    from tinyonn.plan.training import router_weights, written
    from tinyonn.train.spec import read_student

    rules = optimizer_options(norms_lr=1e-3)
    options = world.options(tmp_path, steps=2, optimizers=rules)
    train_run(world.run, world.config, options)
    tree = read_student(tmp_path / "model")
    parameters, facts = describe_model(world.config.model)
    student = StudentFacts.of(tree, parameters)
    router = router_weights(tree["router"], facts.hidden)
    said = written(student, router, rules, 5, 2).checkpoint
    one = max(path.stat().st_size for path in (tmp_path / "train").rglob("state.safetensors"))
    assert 0.9 * said <= one <= said + 256 * 1024  # with its header


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", ["shipped", "smollm2"])
def test_every_stage_takes_what_it_said(shape: str, tmp_path: Path) -> None:
    from benchmarks.memory_plan import STAGES, measure, random_model

    model = "reference" if shape == "shipped" else str(random_model(tmp_path / "model", "135m"))
    found = measure(model, tmp_path, STAGES)
    wrong = {
        line.stage: (line.planned >> 20, line.measured >> 20)
        for line in found
        if line.planned and not line.measured <= line.planned
    }
    assert not wrong, f"planned and measured MiB: {wrong}"
