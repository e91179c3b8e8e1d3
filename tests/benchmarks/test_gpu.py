"""`benchmarks/gpu.py` in Triton's interpreter, in a process that can import few of the project's packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_imports import ABSENT, ROOT

WITHOUT = """
import runpy, sys
absent, script, *arguments = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent.split()))
sys.path.insert(0, "benchmarks")
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


def run(*arguments: str, without: list[str] = ABSENT, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, " ".join(without), "benchmarks/gpu.py", *arguments]
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        command, cwd=ROOT, env={**known, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True
    )


def lines(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """What every part said."""
    trees = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"part"')]
    return {tree["part"]: tree for tree in trees}


def test_every_part_runs_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is an optional package")
    done = run("--device", "cpu", "--tiny", "--json", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = lines(done)
    assert list(parts) == ["bits", "model", "record", "memory", "decode", "train", "profile"]
    goals = {goal["name"]: goal for part in parts.values() for goal in part["goals"]}
    assert all(set(goal) == {"name", "value", "goal", "met"} for goal in goals.values())
    timed = ("record, ", "decode, ", "routed to dense")  # the interpreter's times say nothing
    wrong = [
        name for name, goal in goals.items() if not goal["met"] and not any(mark in name for mark in timed)
    ]
    assert wrong == []
    decoded = parts["decode"]["figures"]["shares"]["0.31"]
    assert decoded["forms"] != ["dense"]
    assert set(decoded["batch 1"]["ms a layer"]) == {"dense", "torch CSR", "chosen", "rows", "masks"}
    assert parts["model"]["figures"]["set aside"]
    last = json.loads(done.stdout.splitlines()[-1])
    assert [goal["name"] for goal in last["goals"]] == list(goals)
    (summary,) = tmp_path.iterdir()
    tree = json.loads(summary.read_text("utf-8"))
    assert summary.name == f"interpreter-{tree['date']}.json"
    assert [part["part"] for part in tree["parts"]] == list(parts)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("bits", PATH=str(tmp_path))
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "--device cpu --tiny" in done.stderr


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("gpu.NEEDED['numba'] = '99.1'", ["numba", "too old", "numba >= 99.1"]),
        ("gpu.NEEDED['nosuch'] = '1.0'", ["nosuch is not installed"]),
        ("gpu.OF_TRITON = ('dot', 'nosuch')", ["lacks triton.language.nosuch", "install triton >= 3.2"]),
    ],
)
def test_what_a_package_lacks_is_named(change: str, named: list[str]) -> None:
    pytest.importorskip("triton", reason="Triton is an optional package")
    code = f"import sys; sys.path[:0] = ['benchmarks', '.']; import gpu; {change}; gpu.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "bits", "--device", "cpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    for word in named:
        assert word in done.stderr


def test_an_unknown_part_is_refused_with_the_known_ones() -> None:
    done = run("bitts")
    assert done.returncode == 2
    assert "'bitts'" in done.stderr
    assert "bits, model, record" in done.stderr


FAILING = """
import os, sys, time
sys.path[:0] = ["benchmarks", "."]
import gpu, gpu_record, torch

def hang(setting): time.sleep(60)
def die(setting): os._exit(9)
def run_out(setting): raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
def fine(setting): return gpu_record.Result([], {"fine": True})

for part, function in zip(("bits", "model", "record", "memory"), (hang, die, run_out, fine)):
    setattr(gpu_record, part, function)
gpu.PARTS["bits"], gpu.CPU_LIMIT = (1, 0), 1
sys.argv = ["gpu.py", "bits", "model", "record", "memory", "--device", "cpu", "--tiny"]
gpu.main()
"""


def test_a_part_that_hangs_dies_or_runs_out_costs_the_others_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    parts = lines(done)
    assert "limit of 1 s" in parts["bits"]["error"]
    assert "exit code 9" in parts["model"]["error"]
    assert "out of device memory" in parts["record"]["error"]
    assert parts["memory"]["figures"] == {"fine": True}
