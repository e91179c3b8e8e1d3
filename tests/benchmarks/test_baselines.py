"""The benchmark of published methods works at toy scale; what it measures there means nothing."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.baselines import FILES, METHODS, divide, rows_of_table
from tests.dense.architectures import make_model
from tests.evaluate.test_intervals import model
from tinyonn.evaluate.report import EvaluateReport, Line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The four files, a list of rows in two of them and lines in the others."""
    for number, (name, file) in enumerate(FILES.items()):
        rows = [
            {"question": f"What is {n} + {number}?", "answer": f"{n + number}, {name}"} for n in range(90)
        ]
        lines = json.dumps(rows) if number % 2 else "\n".join(map(json.dumps, rows))
        (tmp_path / file).write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def test_no_row_is_recorded_and_held_out(data: Path, tmp_path: Path) -> None:
    divide(data, tmp_path / "parts")
    for name in FILES:
        recorded, held_out = (
            set((tmp_path / "parts" / f"{name}.{what}.jsonl").read_text("utf-8").splitlines())
            for what in ("recorded", "heldout")
        )
        assert len(recorded) == len(held_out) == 45 and not recorded & held_out


def test_a_row_says_how_far_a_method_is_behind_the_default() -> None:
    lines = [Line("original", 1.0, 100, model(-1)), Line("dense", 1.0, 100, model(-0.5))]
    for number, method in enumerate(METHODS):
        lines += [Line(method, share, 50, model(number / 8)) for share in (0.5, 0.7)]
    rows = list(rows_of_table(EvaluateReport("run", tuple(lines), 120, 3000, 4, 1.0), (0.7, 0.5)))
    assert [row[0] for row in rows] == ["original", "NF4", *METHODS.values()]
    assert [row[2] for row in rows[:4]] == ["", "", "", "+0.125 [+0.125, +0.125]"]
    nats = f"{model(1 / 8).mean:.3f}"
    assert rows[3][1].startswith(f"{nats} [") and rows[3][3].startswith(f"{nats} [")


@pytest.mark.slow
def test_it_runs(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/baselines.py", str(tmp_path / "run"), "--data", str(data)]
    command += ["--model", str(make_model("qwen2", tmp_path / "model")), "--budgets", "0.5", "--json"]
    command += ["--max-tokens", "128"]  # the model's context
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout.splitlines()[-1])
    assert len(tree["tables"][0]["rows"]) == 2 + len(METHODS)
    assert tree["figures"]["split"] == "test" and tree["figures"]["calibration"] == 64
