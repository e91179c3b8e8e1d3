"""What was measured on tasks, kept in a file so that a killed evaluation goes on; its rows, JSON values and table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyonn.evaluate.report import Results
from tinyonn.evaluate.subjects import NF4, ORIGINAL
from tinyonn.files import write_whole
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_seconds

VERSION = 1
NEEDED = ("subject", "task", "results", "samples")
PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")


def task_results(path: Path) -> Results:
    """The file of results of tasks.

    Raises
    ------
    StoreDamagedError
        It is not as it was written.
    """

    def check(line: dict[str, Any]) -> None:
        if missing := [name for name in NEEDED if name not in line]:
            raise ValueError(f"a result has no {missing[0]}")

    return Results(path, VERSION, check)


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes
    ----------
    subject, task, metric : str
        The metric with its filter where it has one, such as ``exact_match,strict-match``.
    value, error : float
        And its standard error; NaN where there is none.
    top : bool
        Of a task as it was asked for, not of a part of it.
    line : dict
        All that is known of it.
    """

    subject: str
    task: str
    metric: str
    value: float
    error: float
    top: bool
    line: Mapping[str, Any]

    @property
    def is_perplexity(self) -> bool:
        """Whether ratios say more than differences."""
        return self.metric in PERPLEXITIES


def rows_of(line: Mapping[str, Any]) -> Iterator[Row]:
    """The figures of a result."""
    tops = set(line["results"]) if line["task"] not in line["results"] else {line["task"]}
    for task, values in line["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or metric in ("alias", "sample_len"):
                continue
            error = values.get(f"{metric}_stderr,{filtered}" if filtered else f"{metric}_stderr")
            shown = metric if filtered in ("", "none") else key
            yield Row(
                *(line["subject"], task, shown, value),
                *(math.nan if error is None else error, task in tops, line),
            )


@dataclass(frozen=True)
class TasksReport:
    """What a call found.

    Attributes
    ----------
    lines : tuple of dict
        Task by task, the original model first.
    measured : int
        Results that were not there from an earlier call.
    """

    location: str
    lines: tuple[dict[str, Any], ...]
    measured: int
    evaluate_seconds: float
    planned_rss_bytes: int = 0

    def rows(self) -> list[Row]:
        """All figures."""
        return [row for line in self.lines for row in rows_of(line)]

    def ratios(self) -> dict[tuple[str, str, str], dict[str, float]]:
        """By subject, task and metric: a perplexity over that of the original and over that of NF4."""
        rows = [row for row in self.rows() if row.is_perplexity]
        value = {(row.subject, row.task, row.metric): row.value for row in rows}
        found: dict[tuple[str, str, str], dict[str, float]] = {}
        for subject, task, metric in value:
            under = {name: value.get((name, task, metric)) for name in (ORIGINAL, NF4)}
            found[subject, task, metric] = {
                f"to {name}": value[subject, task, metric] / other for name, other in under.items() if other
            }
        return found

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        ratios = self.ratios()
        results = [
            {
                "subject": row.subject,
                "task": row.task,
                "metric": row.metric,
                "value": row.value,
                "stderr": None if math.isnan(row.error) else row.error,
                "samples": row.line["samples"].get(row.task),
                **ratios.get((row.subject, row.task, row.metric), {}),
            }
            for row in self.rows()
        ]
        about = {key: line for line in self.lines for key in [line["subject"]]}
        return {
            "location": self.location,
            "results": results,
            "subjects": {
                name: {"model": line["model"], "experts": line["experts"]} for name, line in about.items()
            },
            "versions": self.lines[0]["versions"] if self.lines else {},
            "commit": self.lines[0]["commit"] if self.lines else None,
            "configuration": self.lines[0]["configuration"] if self.lines else {},
            "measured": self.measured,
            "evaluate_seconds": self.evaluate_seconds,
            "planned_rss_bytes": self.planned_rss_bytes,
        }

    def table(self) -> Sheet:
        """For people: a row for each task and metric, a column for each subject."""
        subjects = list(dict.fromkeys(line["subject"] for line in self.lines))
        rows = [row for row in self.rows() if row.top]
        cells = {(row.task, row.metric, row.subject): row for row in rows}
        sheet = Sheet(f"tasks of {whole(self.location)}", self._notes()).text("task").number(*subjects)
        ratios = self.ratios()
        for task, metric in dict.fromkeys((row.task, row.metric) for row in rows):
            of = {subject: cells.get((task, metric, subject)) for subject in subjects}
            sheet.add(f"{task} {metric}", *(_cell(row) for row in of.values()))
            if metric in PERPLEXITIES:
                for name in (ORIGINAL, NF4):
                    over = [ratios.get((subject, task, metric), {}).get(f"to {name}") for subject in subjects]
                    sheet.add(
                        f"  over that of {name}", *("" if one is None else f"{one:.3f}" for one in over)
                    )
        return sheet

    def _notes(self) -> list[str]:
        counts = {task: count for line in self.lines for task, count in line["samples"].items()}
        asked = {task for row in self.rows() if row.top for task in [row.task]}
        told = ", ".join(f"{task} {counts[task]:,}" for task in sorted(asked) if task in counts)
        what = (
            f"{self.measured} results in {format_seconds(self.evaluate_seconds)}"
            if self.measured
            else "nothing to do: measured already"
        )
        return [
            "value ± standard error; original: the model as it was published; nf4: as it is recorded",
            *([f"documents or windows: {told}"] if told else []),
            what,
        ]

    @staticmethod
    def summary(line: Mapping[str, Any]) -> str:
        """A result in a few words."""
        return ", ".join(f"{row.metric} {_cell(row)}" for row in rows_of(line) if row.top)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    digits = 4 if abs(row.value) < 10 else 2
    error = "" if math.isnan(row.error) else f" ± {row.error:.{digits}f}"
    return f"{row.value:,.{digits}f}{error}"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write all figures as a Parquet file, a row for each."""
    import pyarrow

    columns = {
        "subject": [row.subject for row in rows],
        "task": [row.task for row in rows],
        "metric": [row.metric for row in rows],
        "value": [row.value for row in rows],
        "stderr": [None if math.isnan(row.error) else row.error for row in rows],
        "samples": [row.line["samples"].get(row.task) for row in rows],
        "shots": [row.line.get("shots", {}).get(row.task) for row in rows],
        **{
            name: [json.dumps(row.line[name], sort_keys=True) for row in rows]
            for name in ("model", "configuration", "versions")
        },
        "commit": [row.line["commit"] for row in rows],
        "date": [row.line["date"] for row in rows],
    }
    _write(path, pyarrow.table(columns))


def write_values(path: Path, values: Sequence[tuple[str, str, str, int, float]]) -> None:
    """Write what each document scored as a Parquet file: task, metric, filter, document, value."""
    import pyarrow

    names = ("task", "metric", "filter", "document", "value")
    columns = zip(*values, strict=True) if values else ([] for _ in names)
    _write(path, pyarrow.table(dict(zip(names, map(list, columns), strict=True))))


def _write(path: Path, table: Any) -> None:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda side: parquet.write_table(table, side))
