"""Rows in one JSON object that holds no array of them: columns, rows by their ids, splits, pages of the hub."""

from __future__ import annotations

from typing import Any

from tinyonn.corpus.forms import NEEDED, SAID

WRAPPERS = ("data", "rows", "train", "examples", "instances", "records", "items", "samples")
SCALARS = (str, int, float, bool, type(None))


def told_by_hub(value: Any) -> Any:
    """Take a row out of what the hub's viewer and its `/rows` give: ``{"row_idx": 0, "row": {...}}``."""
    return value["row"] if isinstance(value, dict) and {"row", "row_idx"} <= value.keys() else value


def unfold(value: Any) -> list[Any]:
    """Make rows of a file's only value; of an object that is a row itself, one.

    ==================================================  =====================================
    ``{"text": ["a", "b"]}``                            columns
    ``{"text": {"0": "a", "1": "b"}}``                  columns, as pandas writes them
    ``{"columns": ["text"], "data": [["a"], ["b"]]}``   split, as pandas writes it
    ``{"id1": {"text": "a"}, "id2": {"text": "b"}}``    rows by their ids
    ``{"data": {"train": [{"text": "a"}]}}``            a split, or any of these, in a wrapper
    ==================================================  =====================================
    """
    if not isinstance(value, dict) or not value:
        return [value]
    inner = next((value[name] for name in WRAPPERS if isinstance(value.get(name), dict)), None)
    if inner is not None and not _named(value, NEEDED):
        rows = next((inner[name] for name in WRAPPERS if isinstance(inner.get(name), list)), None)
        return rows if rows is not None else unfold(inner)
    names, lines = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(lines, list) and all(isinstance(line, list) for line in lines):
        return [dict(zip(map(str, names), line, strict=False)) for line in lines]
    parts = list(value.values())
    if all(isinstance(part, dict) for part in parts):
        keys = list(parts[0])
        if _named(value, NEEDED) and keys and all(key.isdigit() for key in keys):
            return [{name: part.get(key) for name, part in value.items()} for key in keys]
        rows = not _named(value, NEEDED) and all(_named(part, NEEDED) for part in parts)
        return parts if rows else [value]
    columns = all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts)
    if columns and _named(value, SAID) and all(isinstance(one, SCALARS) for part in parts for one in part):
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    return [value]


def _named(record: dict[str, Any], names: frozenset[str]) -> bool:
    return any(key.lower() in names for key in record)
