"""What every benchmark ends with: tables for people, goals met or missed, and with ``--json`` one last line.

The line is one JSON object: ``{"benchmark", "goals": [{"name", "value", "goal", "met"}, ...], "figures", "machine"}``.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyonn.machine import free_ram, usable_cpus


@dataclass(frozen=True)
class Goal:
    """A figure beside what it should be: ``Goal("ratio", 1.1, "<= 1.15", True)``."""

    name: str
    value: float
    goal: str
    met: bool


def at_least(name: str, value: float, limit: float) -> Goal:
    """A figure that should not be smaller; NaN never is what it should be."""
    return Goal(name, value, f">= {limit:g}", value >= limit)


def at_most(name: str, value: float, limit: float) -> Goal:
    """A figure that should not be larger."""
    return Goal(name, value, f"<= {limit:g}", value <= limit)


def machine() -> dict[str, Any]:
    """Where and beside what a benchmark runs; figures of a busy machine say less."""
    cpu = platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    load = [round(value, 2) for value in os.getloadavg()]
    return {
        "cpu": models[0] if models else cpu,
        "cpus": usable_cpus(),
        "free_ram_bytes": free_ram(),
        "load": load,
    }


BEFORE = machine()  # at the import, so that the load is that of others


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; columns after the first stand to the right, floats with four decimals."""
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(title, columns, cells))
        return
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


def plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text alone, where rich is not installed."""
    lines = [columns, *rows]
    widths = [max(len(line[number]) for line in lines) for number in range(len(columns))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    return "\n".join([title, *text])


def finish(
    benchmark: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    goals: Sequence[Goal],
    as_json: bool,
    figures: dict[str, Any] | None = None,
) -> None:
    """Print the last table and the goals, and with `as_json` the last line.

    Parameters
    ----------
    benchmark : str
    columns, rows
        Of the table.
    goals : sequence of Goal
    as_json : bool
    figures : dict, optional
        JSON values: whatever else was measured.
    """
    show(benchmark, columns, rows)
    verdicts = [(goal.name, goal.value, goal.goal, "met" if goal.met else "MISSED") for goal in goals]
    show("goals", ("goal", "value", "wanted", ""), verdicts)
    print(f"{BEFORE['cpus']} CPUs ({BEFORE['cpu']}), load before the start {BEFORE['load']}")
    if as_json:
        tree = {"benchmark": benchmark, "goals": [asdict(goal) for goal in goals], "figures": figures or {}}
        print(json.dumps({**tree, "machine": BEFORE}), flush=True)
