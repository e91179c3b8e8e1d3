"""What every benchmark ends with: tables for people, goals met or missed, and with ``--json`` one last line.

    python benchmarks/report.py [--name NAME] [--dirty] benchmarks/quality.py --seeds 3

The line is one JSON object: ``{"benchmark", "goals": [{"name", "value", "goal", "met"}, ...], "figures", "tables",
"machine"}``. This script runs a benchmark and keeps what its lines say in ``results/NAME.json`` (by default its own
name), with command, commit, day and machine, from which ``make results`` writes docs/results.md. It refuses a tree
with changes that are not committed; ``--dirty`` says in the file that there were some.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.stored import FOLDER, in_words, write_result
from tinyonn.errors import InputError
from tinyonn.machine import free_ram, usable_cpus

ROOT = Path(__file__).resolve().parents[1]


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
SHOWN: list[dict[str, Any]] = []  # tables since the last line


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; columns after the first stand to the right, floats with four decimals."""
    cells = printed(rows)
    SHOWN.append({"title": title, "columns": list(columns), "rows": cells})
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


def printed(rows: Iterable[Sequence[object]]) -> list[list[str]]:
    """The text of all cells."""
    return [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]


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
        JSON values: whatever else was measured; ``seeds`` are those of the run.
    """
    show(benchmark, columns, rows)
    tables = SHOWN.copy()
    verdicts = [(goal.name, goal.value, goal.goal, "met" if goal.met else "MISSED") for goal in goals]
    show("goals", ("goal", "value", "wanted", ""), verdicts)
    print(f"{BEFORE['cpus']} CPUs ({BEFORE['cpu']}), load before the start {BEFORE['load']}")
    if as_json:
        tree = {"benchmark": benchmark, "goals": [asdict(goal) for goal in goals], "figures": figures or {}}
        print(json.dumps({**tree, "tables": tables, "machine": BEFORE}), flush=True)
    SHOWN.clear()


def git(*words: str) -> str:
    """What git says of this project."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(dirty: bool) -> str:
    """The commit that is checked out; results may have changed since, nothing else unless `dirty` allows it."""
    changes = git("status", "--porcelain", "--", ".", ":!results", ":!docs/results.md")
    if changes and not dirty:
        raise InputError(
            f"{len(changes.splitlines())} files are not committed, such as {changes.split()[-1]}, so that no commit "
            "says what is measured; commit them, or say --dirty"
        )
    return git("rev-parse", "--short", "HEAD") + (" and changes" if changes else "")


def as_stored(line: dict[str, Any], command: str, commit: str, about: str) -> dict[str, Any]:
    """A benchmark's last line as it is stored."""
    figures = dict(line["figures"])
    seeds = figures.pop("seeds", None)
    where = {
        "benchmark": line["benchmark"],
        "command": command,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": in_words(line["machine"]),
        **({} if seeds is None else {"seeds": seeds}),
        "about": about,
    }
    return {**where, "figures": figures, "tables": line["tables"], "goals": line["goals"]}


def store(
    script: Path, arguments: Sequence[str], name: str | None, dirty: bool, folder: Path = FOLDER
) -> list[Path]:
    """Run a benchmark and keep the figures of all its last lines.

    Parameters
    ----------
    script : Path
        Of the benchmark.
    arguments : sequence of str
    name : str, optional
        Of the file, where the benchmark has one table.
    dirty : bool
        Whether changes that are not committed are allowed.
    folder : Path
        Of the stored results.
    """
    at = commit(dirty)
    command = shlex.join(["python", script.resolve().relative_to(ROOT).as_posix(), *arguments])
    about = (ast.get_docstring(ast.parse(script.read_text("utf-8"))) or "").partition("\n")[0]
    lines = []
    with subprocess.Popen(
        [sys.executable, str(script), *arguments, "--json"], stdout=subprocess.PIPE, text=True
    ) as process:
        for text in process.stdout or ():
            if text.startswith('{"benchmark"'):
                lines.append(json.loads(text))
            else:
                print(text, end="", flush=True)
    if process.returncode or not lines:
        raise InputError(
            f"{command} ended with {process.returncode} and {len(lines)} lines; nothing is stored"
        )
    if name is not None and len(lines) > 1:
        raise InputError(f"{command} has {len(lines)} tables: leave out --name")
    names = [name or line["benchmark"].replace(" ", "_") for line in lines]
    return [
        write_result(as_stored(line, command, at, about), one, folder)
        for line, one in zip(lines, names, strict=True)
    ]


def main() -> None:
    """Run a benchmark and store its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", help="of the file below results/; the benchmark's by default")
    parser.add_argument("--dirty", action="store_true", help="store figures of a tree with changes")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        for path in store(options.script, options.arguments, options.name, options.dirty):
            print(f"written: {path}; `make results` writes docs/results.md")
    except InputError as error:
        raise SystemExit(f"report: {error}") from None


if __name__ == "__main__":
    main()
