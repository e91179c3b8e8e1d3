"""``ray job submit`` to a real head with dashboard and token: it records; a second time there is nothing to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.conftest import HOME, free_ports
from tests.experts.runs import clustered_run
from tests.options import written
from tests.record.runs import (
    assert_same_run,
    config_of,
    expected_aside,
    make_sick_model,
    serial_run,
    write_rows,
)
from tinyonn.experts.folder import open_assembled
from tinyonn.store.repository import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
SLICES = {"even": 7, "odd": 4, "sick": 2}
UPLOAD = 40 << 20  # bytes; the shipped model and corpus are 24 MiB of them
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "RAY_AUTH_MODE": "token",
}


@dataclass(frozen=True)
class Head:
    """A head of its own."""

    dashboard: str
    folder: Path

    def submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", *command],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """``ray start --head`` as in docs/cluster.md, on ports of its own; ``--block`` ties its processes to this one."""
    folder = HOME / "head"
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
             "runtime-env-agent-port", "metrics-export-port", "ray-client-server-port", "node-manager-port",
             "object-manager-port")  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}",
               "--object-store-memory=268435456", *(f"--{name}={port}" for name, port in ports.items())]  # fmt: skip
    log = (HOME / "head.log").open("w+")
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while "Ray runtime started" not in (HOME / "head.log").read_text():
            assert process.poll() is None, (HOME / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield Head(f"http://127.0.0.1:{ports['dashboard-port']}", folder)
    finally:
        process.terminate()
        process.wait(60)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.nightly
def test_a_job_records_and_a_second_one_has_nothing_to_do(head: Head, tmp_path: Path) -> None:
    model = make_sick_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", SLICES)
    settings = config_of(model, tmp_path / "rows.jsonl")
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(json.dumps(written(settings)), "utf-8")
    job = ("python", "jobs/record.py", str(run), "--config", str(config))

    first = head.submit(*job)
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"{len(rows) - len(expected_aside(rows))} (" in first.stdout
    assert "Traceback" not in first.stdout
    store = Store.open(run / "store")
    assert_same_run(serial_run(tmp_path / "serial", settings), store)
    recorders = re.findall(r"\(process (\d+)\)", (run / "logs" / "record.log").read_text("utf-8"))
    assert recorders  # and they were the head's own
    assert all(list(head.folder.glob(f"session_2*/logs/worker-*-{pid}.out")) for pid in recorders)

    second = head.submit(*job)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"all {len(rows)} samples are recorded: nothing to do" in second.stdout
    assert Store.open(run / "store").segments() == store.segments()

    config.write_text("data: {max_token: 3}", "utf-8")
    wrong = head.submit(*job)
    assert wrong.returncode != 0
    assert "did you mean 'data.max_tokens'?" in wrong.stdout
    assert "Traceback" not in wrong.stdout
    check_upload(head)


def test_a_job_assembles_and_then_trains(head: Head, tmp_path: Path) -> None:
    settings = clustered_run(tmp_path)
    small = {"router": {"top_k": 2}, "profile": {"samples": 12}}
    train = {"steps": 4, "batch": 4, "micro_batch": 2, "warm_start": 2, "routing": {"ks": [2, 0]}}
    tree = written(settings) | small | {"train": train}
    (tmp_path / "config.yaml").write_text(json.dumps(tree), "utf-8")
    job = ("python", "jobs/assemble.py", str(tmp_path / "run"), "--config", str(tmp_path / "config.yaml"))
    done = head.submit(*job, "--then-train")
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("assembled", "profiled", "trained"):
        assert re.search(rf"^ *{what}", done.stdout, re.MULTILINE)
    model = open_assembled(tmp_path / "run" / "model")
    assert model.config.assembly["training"]["steps"] == 6
    prompt = torch.arange(3, 11)[None]
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 12)


def check_upload(head: Head) -> None:
    """What has been unpacked on the head is the code and what it ships with, and nothing else."""
    packages = [
        path for path in head.folder.glob("session_2*/runtime_resources/working_dir_files/*") if path.is_dir()
    ]
    assert packages
    for package in packages:
        assert (package / "jobs" / "record.py").is_file()
        assert (package / "tinyonn" / "reference").is_dir()
        assert not {path.name for path in package.iterdir()} & {".git", ".venv", ".mypy_cache", ".hypothesis"}
        assert not [path for path in (package / "storage").glob("*") if path.name != "README.md"]
        assert sum(path.stat().st_size for path in package.rglob("*") if path.is_file()) < UPLOAD


def test_without_the_token_nothing_can_be_submitted(head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    result = subprocess.run(
        [RAY, "job", "submit", "--address", head.dashboard, "--", "true"],
        env={**ENVIRONMENT, "RAY_AUTH_TOKEN_PATH": str(wrong)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "token" in (result.stdout + result.stderr).lower()
