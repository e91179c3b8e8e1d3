"""Results of tasks are kept by what decides them, and shown beside the original's and NF4's."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet
from typer.testing import CliRunner

from tests.options import written
from tinyonn.cli import app
from tinyonn.config import Config
from tinyonn.errors import CapacityError, InputError, StoreDamagedError
from tinyonn.evaluate import tasks
from tinyonn.evaluate.task_report import TasksReport, rows_of, task_results

LINE: dict[str, Any] = {
    "subject": "original",
    "task": "mmlu",
    "results": {
        "mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.1},
        "mmlu_law": {"acc,none": 0.25, "exact_match,strict-match": 0.5},
    },
    "samples": {"mmlu_law": 8},
    "shots": {"mmlu_law": 5},
    "model": {"model": {"a": "b"}},
    "experts": None,
    "configuration": {"limit": 8},
    "versions": {"torch": "2"},
    "commit": None,
    "date": "2026-01-01T00:00:00Z",
}


def perplexity(subject: str, value: float) -> dict[str, Any]:
    results = {"text 16": {"perplexity": value, "nats": 1.0, "nats_stderr": 0.5}}
    return {**LINE, "subject": subject, "task": "text", "results": results, "samples": {"text 16": 3}}


def test_results_are_kept_by_what_decides_them(tmp_path: Path) -> None:
    path = tmp_path / "evaluate" / "tasks.json"
    task_results(path).put(["a", {"limit": 1}], LINE)
    again = task_results(path)
    assert again.get(["a", {"limit": 1}]) == LINE
    assert again.get(["a", {"limit": 2}]) is None
    path.write_text(path.read_text("utf-8").replace("0.25", "0.75"), "utf-8")
    with pytest.raises(StoreDamagedError, match="delete it"):
        task_results(path)


def test_rows_and_ratios() -> None:
    rows = [(row.task, row.metric, row.value, row.top) for row in rows_of(LINE)]
    assert rows == [
        ("mmlu", "acc", 0.5, True),
        ("mmlu_law", "acc", 0.25, False),
        ("mmlu_law", "exact_match,strict-match", 0.5, False),
    ]
    lines = (LINE, perplexity("original", 8.0), perplexity("nf4", 10.0), perplexity("int8", 9.0))
    report = TasksReport("run", lines, 4, 1.0)
    found = {(r["subject"], r["metric"]): r for r in report.figures()["results"] if r["task"] == "text 16"}
    assert found["int8", "perplexity"]["to original"] == 9 / 8
    assert found["int8", "perplexity"]["to nf4"] == 9 / 10
    assert found["int8", "nats"]["stderr"] == 0.5
    told = report.table().plain()
    assert "over that of original" in told and "over that of nf4" in told
    assert "0.5000 ± 0.1000" in told
    assert "mmlu_law" not in told


@pytest.fixture
def arguments(recorded: tuple[Path, Config], tmp_path: Path) -> list[str]:
    run, config = recorded
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written(config)), "utf-8")
    (tmp_path / "text.txt").write_text("It rained for the 3rd day. " * 20, "utf-8")
    return [
        "evaluate",
        str(run),
        "--config",
        str(tmp_path / "config.yaml"),
        "--stream",
        str(tmp_path / "text.txt"),
    ]


def called(arguments: list[str]) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_a_stream_is_measured_once(arguments: list[str], recorded: tuple[Path, Config]) -> None:
    few = [*arguments, "--windows", "32,context", "--limit", "3", "--subjects", "int8"]
    first = called(few)
    names = [(one["task"], one["subject"]) for one in first["results"] if one["metric"] == "perplexity"]
    assert names == [(f"text.txt {n}", s) for n in (32, 128) for s in ("original", "nf4", "int8")]
    assert first["measured"] == 6
    again = called(few)
    assert (again["measured"], again["results"]) == (0, first["results"])
    assert called([*few[:-1], "gobo3"])["measured"] == 2
    assert called([*arguments, "--windows", "32", "--limit", "2"])["measured"] == 3
    table = parquet.read_table(recorded[0] / "evaluate" / "tasks.parquet").to_pylist()
    assert {row["subject"] for row in table} == {"original", "nf4", "int8"}
    assert all(row["samples"] == 2 for row in table)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--windows", "4096"], "from 2 to 128"),
        (["--windows", "many"], "from 2 to 128"),
        (["--subjects", "int5"], "int8"),
        (["--trained"], "exclude"),
        (["--plot"], "exclude"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], more: list[str], told: str) -> None:
    result = CliRunner().invoke(app, [*arguments, *more])
    assert result.exit_code == 2, result.output
    assert told in " ".join(result.output.split())


def test_options_of_tasks_belong_to_tasks(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments[:4], "--limit", "3"])
    assert result.exit_code == 2
    assert "--stream" in result.output


def test_without_lm_eval_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(tasks, "version", absent)
    with pytest.raises(InputError, match=r"pip install 'tiny-onn\[eval\]'"):
        tasks.check_lm_eval()


def test_what_does_not_fit_is_refused(
    recorded: tuple[Path, Config], tmp_path: Path, monkeypatch: Any
) -> None:
    from tinyonn.plan import demands

    (tmp_path / "text.txt").write_text("It snowed. " * 20, "utf-8")
    monkeypatch.setattr(demands, "free_ram", lambda: 1 << 20)
    options = tasks.TasksOptions(stream=tmp_path / "text.txt", windows=("48",))
    with pytest.raises(CapacityError, match="evaluating original needs"):
        tasks.evaluate_tasks(str(recorded[0]), recorded[1], options)
