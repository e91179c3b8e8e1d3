"""Measured figures as they are kept: a JSON file below ``results/`` for each run of a benchmark.

``command, commit, date, machine`` (words) say where the figures come from, beside ``seeds`` where there are some and
``source`` where they were not written by the run itself. The figures are what else the file holds: by `report.finish`
``tables`` (title, columns, rows as printed), ``goals`` and ``figures``; ``about`` is a sentence that stands above them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyonn.errors import InputError
from tinyonn.files import write_whole

FOLDER = Path(__file__).resolve().parents[1] / "results"
FIELDS = ("command", "commit", "date", "machine")
OPTIONAL = ("benchmark", "seeds", "source", "about")


@dataclass(frozen=True)
class Table:
    """As printed; cells are text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def cell(self, row: str, column: str) -> str:
        """What stands in the row that begins with `row`, below `column`."""
        (cells,) = (cells for cells in self.rows if cells[0] == row)
        return cells[self.columns.index(column)]


@dataclass(frozen=True)
class Stored:
    """A stored result.

    Attributes
    ----------
    name : str
        Path below ``results/`` without its ending.
    command, commit, date, machine : str
        Where the figures come from.
    seeds : tuple of int
        Empty where there are none.
    source : str
        Empty where the run itself wrote the file.
    about : str
    tables : tuple of Table
    tree : mapping
        All that the file holds.
    """

    name: str
    command: str
    commit: str
    date: str
    machine: str
    seeds: tuple[int, ...]
    source: str
    about: str
    tables: tuple[Table, ...]
    tree: Mapping[str, Any]

    @property
    def figures(self) -> Mapping[str, Any]:
        """What was measured beside tables and goals."""
        figures: Mapping[str, Any] = self.tree.get("figures", {})
        return figures

    @property
    def goals(self) -> list[dict[str, Any]]:
        """Name, value, goal and whether it is met, of all parts."""
        parts = [self.tree, *self.tree.get("parts", ())]
        return [goal for part in parts for goal in part.get("goals", ())]

    def goal(self, name: str) -> float:
        """The value of a goal."""
        (value,) = (goal["value"] for goal in self.goals if goal["name"] == name)
        return float(value)

    def cell(self, row: str, column: str, table: int = 0) -> str:
        """A cell of a table, as printed."""
        return self.tables[table].cell(row, column)


def read_results(folder: Path = FOLDER) -> dict[str, Stored]:
    """All stored results below a folder, by name, in the order of names.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    InputError
        A file is no stored result; names it, what is wrong and what to do.
    """
    paths = sorted(folder.rglob("*.json"), key=lambda path: path.relative_to(folder).as_posix())
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    return {name: read_result(path, name) for name, path in zip(names, paths, strict=True)}


def read_result(path: Path, name: str) -> Stored:
    """One stored result."""
    try:
        tree = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; store the benchmark's figures again") from None
    return checked(tree, path, name)


def checked(tree: Any, path: Path, name: str) -> Stored:
    """What a file holds, or an error that says what it lacks."""
    if not isinstance(tree, dict):
        raise InputError(f"{path} is no JSON object but {type(tree).__name__}")
    for field in FIELDS:
        if not isinstance(tree.get(field), str) or not tree[field].strip():
            raise InputError(
                f"{path}: {field} is {json.dumps(tree.get(field))[:80]} and should be text; a stored result has "
                f"{', '.join(FIELDS)}, as `python benchmarks/report.py BENCHMARK` writes them"
            )
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", tree["date"]):
        raise InputError(f"{path}: date is {tree['date']!r} and should be a day such as 2026-11-22")
    if not re.match(r"[0-9a-f]{7,40}\b", tree["commit"]):
        raise InputError(f"{path}: commit is {tree['commit']!r} and should begin with one, such as 6d18afe")
    if not set(tree) - {*FIELDS, *OPTIONAL}:
        raise InputError(f"{path} holds no figures, only {', '.join(sorted(tree))}")
    seeds = tree.get("seeds") or []
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
        raise InputError(f"{path}: seeds is {json.dumps(seeds)[:80]} and should be a list of whole numbers")
    return Stored(
        name=name,
        command=tree["command"],
        commit=tree["commit"],
        date=tree["date"],
        machine=tree["machine"],
        seeds=tuple(seeds),
        source=str(tree.get("source", "")),
        about=str(tree.get("about", "")),
        tables=_tables(path, tree),
        tree=tree,
    )


def _tables(path: Path, tree: dict[str, Any]) -> tuple[Table, ...]:
    """Of a file, with rows as long as their columns."""
    tables = []
    try:
        for table in tree.get("tables", ()):
            rows = tuple(tuple(str(cell) for cell in row) for row in table["rows"])
            tables.append(Table(table.get("title", ""), tuple(table["columns"]), rows))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: a table needs title, columns and rows of cells: {error!r}") from None
    for one in tables:
        for row in one.rows:
            if len(row) != len(one.columns):
                raise InputError(f"{path}: {row} has {len(row)} cells under {len(one.columns)} columns")
    return tuple(tables)


def write_result(tree: dict[str, Any], name: str, folder: Path = FOLDER) -> Path:
    """Check a stored result and write it whole.

    Parameters
    ----------
    tree : dict
        JSON values.
    name : str
        Path below `folder`, without the ending.
    folder : Path
    """
    path = folder / f"{name}.json"
    checked(tree, path, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    return path


def in_words(machine: Mapping[str, Any]) -> str:
    """What `report.machine` says, as a sentence has it."""
    load = " ".join(str(value) for value in machine["load"])
    free = machine["free_ram_bytes"] / 2**30
    return f"{machine['cpus']} CPUs ({machine['cpu']}), {free:.1f} GiB free, load before the start {load}"
