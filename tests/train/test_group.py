"""Ray Train: two workers learn what one does, and a worker that is killed costs one checkpoint interval at most."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from transformers import AutoModelForCausalLM

from tests.train.runs import OPTIONS, World
from tests.train.trained import read_curve
from tinyonn.errors import CapacityError, InputError
from tinyonn.train.monitor import FILE, read_lines
from tinyonn.train.stage import train_run
from tinyonn.workers.group import MAX_LOSSES, GroupOptions, Report, run_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def connected(ray_cluster: str) -> Iterator[None]:
    ray.init(address=ray_cluster, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_curve(folder / "train")]


def actors(title: str) -> list[psutil.Process]:
    """Processes of Ray Train's workers below this one, or of its controller."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join([process.name(), *process.cmdline()]):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda process: process.pid)


def kill_one(path: Path, step: int, title: str) -> None:
    """Once a training has come to a step, kill a worker or the controller."""
    while max((line["step"] for line in read_lines(path)), default=0) < step:
        time.sleep(0.02)
    os.kill(actors(title)[-1].pid, signal.SIGKILL)


@pytest.mark.parametrize("title", ["TrainWorker", "TrainController"])
def test_a_killed_worker_costs_one_interval_at_most(world: World, tmp_path: Path, title: str) -> None:
    alone = train_run(world.run, world.config, world.options(tmp_path / "alone", steps=STEPS))
    folder = tmp_path / "group"
    killer = threading.Thread(target=kill_one, args=(folder / "train" / FILE, 17, title), daemon=True)
    killer.start()
    told: list[str] = []
    report = train_run(world.run, world.config, world.options(folder, steps=STEPS, workers=2), told.append)
    killer.join(timeout=1)
    assert not killer.is_alive()
    assert (report.workers, report.restarts, report.steps) == (2, 1, alone.steps)
    starts = [
        json.loads(line) for line in (folder / "train" / "starts.jsonl").read_text("utf-8").splitlines()
    ]
    first, second = (start["step"] for start in starts)
    assert first == 0
    assert second >= 17 - OPTIONS.checkpoint_every
    assert second % OPTIONS.checkpoint_every == 0
    # Two experts whose loads are level take turns, and rounding says who begins: two steps' losses then change places.
    found, wanted = np.array(losses(folder)), np.array(losses(tmp_path / "alone"))
    assert np.isclose(found, wanted, rtol=1e-3).mean() > 0.85
    assert found.mean() == pytest.approx(wanted.mean(), rel=1e-2)
    assert [line["step"] for line in read_lines(folder / "train" / FILE)] == list(range(1, report.steps + 1))
    assert any(line.startswith(f"step {report.steps} of {report.steps}") for line in told)
    AutoModelForCausalLM.from_pretrained(folder / "model")
    again = train_run(world.run, world.config, world.options(folder, steps=STEPS, workers=2))
    assert again == replace(report, fresh=False)


def test_an_error_of_a_worker_comes_out_as_itself(world: World, tmp_path: Path) -> None:
    (tmp_path / "train" / "checkpoint-00000004").mkdir(parents=True)
    about = {"format": 1, "identity": {"corpus": "another"}}
    (tmp_path / "train" / "checkpoint-00000004" / "state.json").write_text(json.dumps(about), "utf-8")
    with pytest.raises(InputError, match="is of another training: corpus is 'another' there"):
        train_run(world.run, world.config, world.options(tmp_path, workers=2))


def test_more_workers_than_places_or_samples_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 workers are asked for and there is work for 4"):
        train_run(world.run, world.config, world.options(tmp_path, workers=5))
    with pytest.raises(CapacityError, match=r"2 workers of 3 CPU\(s\) each .* has places for 1"):
        train_run(world.run, world.config, world.options(tmp_path, workers=2, threads=3))


def dies(spec: str, report: Report) -> None:
    """A worker that is killed whenever it starts, and leaves a trace of it."""
    with Path(spec).open("a", encoding="utf-8") as file:
        file.write(".")
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_are_lost_again_and_again_end_it(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(CapacityError, match="workers are lost again and again before the next checkpoint"):
        # Of all CPUs there are, so that nothing starts while a group that was lost holds its places.
        run_group(dies, str(trace), tmp_path / "train", GroupOptions(1, 4, "cpu"), lambda: 0)
    assert len(trace.read_text("utf-8")) >= MAX_LOSSES


def fails(spec: str, report: Report) -> None:
    raise ZeroDivisionError(spec)


def test_a_fault_of_the_program_comes_out_and_is_no_loss(tmp_path: Path) -> None:
    from ray.train.v2.api.exceptions import WorkerGroupError

    with pytest.raises(WorkerGroupError, match="ZeroDivisionError: a fault"):
        run_group(fails, "a fault", tmp_path / "train", GroupOptions(1, 1, "cpu"), lambda: 0)
