"""What a recording was planned to hold is enough: all processes together, at every size of model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.memory_plan import random_model

ROOT = Path(__file__).parents[2]
NEAR = 0.60  # of what is planned, at least: short samples, and no merges of many segments


def write_rows(path: Path, count: int, words: int) -> Path:
    """Texts of ever other lengths."""
    texts = [" ".join(f"word {number} of {row}," for number in range(words + row)) for row in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def record(folder: Path, model: Path | str, rows: Path, **options: Any) -> dict[str, Any]:
    """The figures of `tinyonn record` in a process of its own, with a Ray of its own."""
    tree = {
        "model": {"path": str(model), "device": "cpu"},
        "data": {"path": str(rows), "max_tokens": options.pop("max_tokens")},
        "record": {"workers": 1, **options},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    command = [
        sys.executable,
        "-m",
        "tinyonn",
        "record",
        str(folder / "run"),
        "--config",
        "config.yaml",
        "--json",
    ]
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS",)}
    process = subprocess.run(
        command, cwd=folder, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return dict(json.loads(process.stdout.splitlines()[-1]))


def check(figures: dict[str, Any]) -> None:
    measured, planned = figures["peak_rss_bytes"], figures["planned_rss_bytes"]
    print(f"measured {measured >> 20} MiB, planned {planned >> 20} MiB: {figures['peak_parts_bytes']}")
    assert NEAR * planned < measured <= planned, figures["peak_parts_bytes"]
    assert figures["peak_parts_bytes"].keys() == {"main", "workers", "ray", "libraries"}


def test_the_shipped_model(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 4, 20)
    check(record(tmp_path, "reference", rows, max_tokens=128, segment=2))


@pytest.mark.slow
def test_a_model_of_the_size_of_smollm2(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", "135m")
    rows = write_rows(tmp_path / "rows.jsonl", 36, 40)
    check(record(tmp_path, model, rows, max_tokens=256, segment=18))
