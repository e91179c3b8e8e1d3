"""Rows in JSON, however it is laid out, encoded, packed, cut off or broken."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.corpus.layouts import (
    LAYOUTS,
    PACKINGS,
    ROWS,
    read,
    texts,
)
from tinyonn.corpus import json_rows
from tinyonn.corpus.files import file_rows
from tinyonn.errors import InputError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_encoding_gives_the_same_rows(tmp_path: Path, layout: str, encoding: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(LAYOUTS[layout](ROWS).encode(encoding))
    assert list(file_rows(path)) == list(enumerate(ROWS))
    assert texts(path) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("ending", [".jsonl", ".JSON"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("layout", ["lines", "indented array"])
def test_any_packing_gives_the_same_rows(
    tmp_path: Path, layout: str, encoding: str, packing: str, ending: str
) -> None:
    path = tmp_path / f"rows{ending}{packing.upper() if ending.isupper() else packing}"
    path.write_bytes(PACKINGS[packing](LAYOUTS[layout](ROWS).encode(encoding)))
    assert list(file_rows(path)) == list(enumerate(ROWS))
    assert texts(path) == [row["text"] for row in ROWS]


def columns(rows: list[Any]) -> dict[str, Any]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def numbered(rows: list[Any]) -> dict[str, Any]:
    return {str(number): row for number, row in enumerate(rows)}


UNFOLDED: dict[str, Callable[[list[Any]], Any]] = {
    "columns": columns,
    "columns, as pandas writes them": lambda rows: {
        name: numbered(values) for name, values in columns(rows).items()
    },
    "split, as pandas writes it": lambda rows: {
        "columns": list(rows[0]),
        "index": [0],
        "data": [list(row.values()) for row in rows],
    },
    "rows by their ids": lambda rows: {f"id {number}": row for number, row in enumerate(rows)},
    "a split in a wrapper": lambda rows: {"version": 1, "data": {"train": rows, "test": rows[:1]}},
    "ids in a wrapper": lambda rows: {"data": numbered(rows)},
    "a page of the hub": lambda rows: {
        "features": [{"name": "text"}],
        "rows": [{"row_idx": place, "row": row, "truncated_cells": []} for place, row in enumerate(rows)],
        "num_rows_total": 5,
    },
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("form", UNFOLDED)
def test_rows_within_one_object(tmp_path: Path, form: str, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(UNFOLDED[form](ROWS), indent=indent), "utf-8")
    assert read(path) == ROWS


def test_values_that_are_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    chat = [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]
    for layout in ("lines", "array", "indented array", "row a line"):
        path.write_text(LAYOUTS[layout](["a", "b ]"]))
        assert read(path) == [{"text": "a"}, {"text": "b ]"}]
        path.write_text(LAYOUTS[layout]([chat, chat]))
        assert read(path) == [{"messages": chat}] * 2
        for rows in (["a", chat, {"text": "b"}], [chat, [1], "a"], [{"text": "b"}, "a", chat], [[["a"]], 3]):
            path.write_text(LAYOUTS[layout](rows))
            assert read(path)[0] == (
                {"text": "a"}
                if rows[0] == "a"
                else {"messages": chat}
                if rows[0] == chat
                else rows[0]
                if isinstance(rows[0], dict)
                else "malformed JSON (not an object)"
            )
            others = [row for row in read(path)[1:] if row != {"text": "b"}]
            assert others == ["malformed JSON (not an object)"] * len(others)


def test_a_row_that_is_broken_ends_where_one_like_the_last_begins(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"text": str(number), "more": [{"text": "x", "other": 1}]} for number in range(6)]
    broken = json.dumps(rows).replace('"2", ', '"2, ')
    path.write_text(broken)
    found = read(path)
    assert found[:2] == rows[:2]
    assert found[2].startswith("malformed JSON")
    assert found[3:] == rows[3:]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\[]{},:\n\u2028ü水 ', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('b"[', max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)
RECORDS = st.lists(
    st.fixed_dictionaries({"text": st.text(max_size=4), "more": VALUES}), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=RECORDS, layout=st.sampled_from(sorted(LAYOUTS)), chunk=st.integers(1, 40))
def test_rows_survive_any_content_and_any_cut(
    tmp_path: Path, rows: list[Any], layout: str, chunk: int
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(LAYOUTS[layout](rows), "utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK", chunk)
        assert read(path) == rows


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60) | st.text('{}[]",:a\\\n 1', max_size=40).map(str.encode),
    suffix=st.sampled_from([".json", ".jsonl", ".jsonl.gz"]),
)
def test_garbage_is_rows_with_reasons_or_an_input_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with contextlib.suppress(InputError):  # a packed file that is cut off
        found = list(file_rows(path))
        assert all(isinstance(record, dict | str) for _, record in found)
        numbers = [number for number, _ in found]
        assert numbers == sorted(set(numbers))


LONG = '{"text": "a number", "id": ' + "7" * 5000 + "}"
DEEP = '{"text": "deep", "id": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (LONG, "malformed JSON (a number with too many digits)"),
        (DEEP, "malformed JSON (nested too deeply)"),
        ('"a string"', "malformed JSON (not an object)"),
        ('{"text": "unclosed, "id": 1}', "malformed JSON (Expecting ',' delimiter"),
    ],
)
@pytest.mark.parametrize("layout", ["lines", "array", "row a line", "wrapped, row a line"])
def test_a_row_that_is_no_json_is_set_aside_alone(tmp_path: Path, layout: str, bad: str, reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(LAYOUTS[layout]([*ROWS, "BAD", *ROWS]).replace('"BAD"', bad))
    rows = read(path)
    assert rows[:5] == rows[6:] == ROWS
    assert rows[5].startswith(reason)


@pytest.mark.parametrize("layout", ["lines", "array", "indented array", "wrapped"])
def test_a_file_that_is_cut_off_keeps_the_rows_before(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "rows.json"
    whole = LAYOUTS[layout](ROWS)
    path.write_text(whole[: whole.index("row 3") + 3])
    rows = read(path)
    assert rows[:3] == ROWS[:3]
    assert [row[:14] for row in rows[3:]] == ["malformed JSON"]
    path.write_text('[{"text": "a"},')
    assert read(path)[0] == {"text": "a"}
    assert "malformed" in read(path)[1]


def test_a_mark_in_the_middle_and_blank_lines_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n\xef\xbb\xbf{"text": "b"}\n\xef\xbb\xbf\n{"text": "c"}')
    assert list(file_rows(path)) == [(0, {"text": "a"}), (2, {"text": "b"}), (4, {"text": "c"})]


def peak_bytes(work: Callable[[], object], tries: int = 3) -> int:
    """What Python held at most meanwhile; the least of some tries, since threads that tests before left are in it."""
    peaks = []
    for _ in range(tries):
        tracemalloc.start()
        try:
            work()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_a_row_that_is_too_long_is_not_held(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "ROW_BYTES", 1 << 20)
    monkeypatch.setattr(json_rows, "HEAD_BYTES", 1 << 16)
    monkeypatch.setattr(json_rows, "CHUNK", 1 << 16)
    path = tmp_path / "rows.json"
    huge = {"text": 'a long \\" text ' * 700_000}
    path.write_text(LAYOUTS[layout]([ROWS[0], huge, ROWS[1]]))
    found: list[Any] = []
    assert peak_bytes(lambda: found.append(read(path))) < 8 << 20
    assert all(rows == [ROWS[0], json_rows.TOO_LONG, ROWS[1]] for rows in found)


def test_an_object_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "WHOLE_CHARACTERS", 100)
    monkeypatch.setattr(json_rows, "CHUNK", 10)
    path = tmp_path / "rows.json"
    path.write_text(LAYOUTS["wrapped, row a line"](ROWS))
    with pytest.raises(InputError, match=r"rows\.json: one JSON object of over .* MiB; make it an array"):
        read(path)


def test_an_array_in_a_long_object_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "CHUNK", 1 << 16)
    path = tmp_path / "rows.json"
    monkeypatch.setattr(json_rows, "HEAD_BYTES", 1 << 16)
    path.write_text(LAYOUTS["wrapped"](ROWS * 10_000))
    counts: list[int] = []
    peak = peak_bytes(lambda: counts.append(sum(record in ROWS for _, record in file_rows(path))))
    assert peak < 1 << 20 < path.stat().st_size // 2
    assert set(counts) == {50_000}


def test_one_row_in_a_file_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows: list[dict[str, Any]] = [
        {"items": [{"x": 1}], "text": "a"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"tools": []},
    ]
    for row in rows:
        path.write_text(json.dumps(row, indent=1))
        assert read(path) == [row]
        path.write_text(json.dumps(row, indent=1) * 2)
        assert read(path) == [row, row]
