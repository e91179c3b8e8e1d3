from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyonn.config import DataConfig
from tinyonn.corpus import json_rows
from tinyonn.corpus.files import file_columns, file_rows
from tinyonn.corpus.rows import Source
from tinyonn.errors import InputError

ROWS = [{"text": f'row {number}: "quoted" \\ [{{ü水', "id": number} for number in range(5)]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def leading_commas(rows: list[Any]) -> str:
    return "[\n" + "\n,".join(json.dumps(row) for row in rows) + "\n]"


def row_a_line(rows: list[Any]) -> str:
    return "[" + ",\n".join(json.dumps(row) for row in rows) + "]\n"


LAYOUTS: dict[str, Callable[[list[Any]], str]] = {
    "lines": lines,
    "lines with CRLF": lambda rows: lines(rows).replace("\n", "\r\n"),
    "array": json.dumps,
    "indented array": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False),
    "row a line": row_a_line,
    "leading commas": leading_commas,
    "wrapped": lambda rows: json.dumps({"version": "1", "tags": ["a"], "data": rows, "more": [{"x": [1]}]}),
    "wrapped, indented": lambda rows: json.dumps({"about": {"data": [{}]}, "Examples": rows}, indent=2),
    "wrapped, row a line": lambda rows: '{"set":\n' + row_a_line(rows) + "}",
    "lines with commas": lambda rows: lines(rows).replace("}\n", "},\n"),
    "lines that end as on a Macintosh": lambda rows: lines(rows).replace("\n", "\r"),
    "indented objects": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(path: Path) -> list[Any]:
    return [record for _, record in file_rows(path)]


def source(path: Path, **options: Any) -> Source:
    return Source(DataConfig(path=str(path), **options))


def texts(path: Path, **options: Any) -> list[str | None]:
    return [row.text for row in source(path, **options)]


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
    tracemalloc.start()
    assert read(path) == [ROWS[0], json_rows.TOO_LONG, ROWS[1]]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


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
    tracemalloc.start()
    assert sum(record in ROWS for _, record in file_rows(path)) == 50_000
    assert tracemalloc.get_traced_memory()[1] < 1 << 20 < path.stat().st_size // 2
    tracemalloc.stop()


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


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_off(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"rows.jsonl{packing}"
    path.write_bytes(PACKINGS[packing](lines(ROWS).encode())[:-9])
    with pytest.raises(InputError, match=r"unreadable from row \d.*fetch it again"):
        source(path)


def test_what_is_wrongly_named_packed_is_read_plainly(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl.gz", lines(ROWS).encode()),
        ("b.jsonl", gzip.compress(lines(ROWS).encode())),
    ):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == ROWS


def table_of(rows: list[Any], delimiter: str) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize(
    ("ending", "delimiter"), [(".csv", ","), (".CSV", ";"), (".tsv", "\t"), (".csv", "|")]
)
def test_tables_as_text(tmp_path: Path, ending: str, delimiter: str, packing: str, encoding: str) -> None:
    path = tmp_path / f"rows{ending}{packing}"
    rows = [{"text": 'one, "two";\nthree\t|', "more": ""}, {"text": "ü水", "more": "5"}]
    path.write_bytes(PACKINGS[packing](table_of(rows, delimiter).encode(encoding)))
    assert read(path) == rows
    assert file_columns(path) == ["text", "more"]


def test_lines_of_a_table_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text,more\na,b\na\na,b,c\n\n\xff,b\nc,d\n"e,f\ng,h\ni,j\n')
    found = read(path)
    assert [found[0], found[4]] == [{"text": "a", "more": "b"}, {"text": "c", "more": "d"}]
    assert found[1:3] == [
        "malformed CSV (1 fields and not 2, line 3)",
        "malformed CSV (3 fields and not 2, line 4)",
    ]
    assert [row.fault for row in source(path)][3] == "not valid Unicode (surrogates not allowed)"
    assert found[5:] == ["malformed CSV (unexpected end of data), from line 8 on"] * 3  # as many as are lost


def test_a_line_of_a_text_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffOne.\r\n\r\n  Two. \n".encode() + b"\xff\n")
    assert list(file_rows(path)) == [
        (0, {"text": "One."}),
        (2, {"text": "Two."}),
        (3, "not UTF-8 at byte 0 of the line"),
    ]
    assert source(path).described(2, 1) == "text: text; 2 texts (a line each), 1 set aside"
    assert texts(tmp_path) == ["One.", "Two.", None]
    (tmp_path / "rows.jsonl").write_text(lines(ROWS))  # what lies beside data is about them
    assert texts(tmp_path) == [row["text"] for row in ROWS]


def archive(name: str) -> bytes:
    stream = io.BytesIO()
    if name == "zip":
        with zipfile.ZipFile(stream, "w") as packed:
            packed.writestr("rows.jsonl", lines(ROWS))
    else:
        with tarfile.open(fileobj=stream, mode="w") as packed_:
            packed_.addfile(tarfile.TarInfo("rows.jsonl"))
    return stream.getvalue()


FOREIGN = {
    "is a zip archive": archive("zip"),
    "is a tar archive; unpack it": archive("tar"),
    "is a Git LFS pointer and not the data": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "is a web page and not the data": b"<!DOCTYPE html><html>Not found</html>",
}


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".txt", ".json.gz"])
@pytest.mark.parametrize("told", FOREIGN)
def test_what_a_file_is_in_truth(tmp_path: Path, told: str, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    path.write_bytes(FOREIGN[told])
    with pytest.raises(InputError, match=rf"rows\{ending} {told}"):
        source(path)


def test_a_table_by_another_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"is a Parquet file; give it the ending \.parquet"):
        source(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.jsonl.zip", "unpack it"),
        ("a.tar.gz", "unpack it"),
        ("a.xlsx", "save it as CSV"),
        ("a.md", r"copy it to a \.txt"),
        ("a.pkl", "write it as JSONL"),
        ("a.safetensors", "convert it"),
    ],
)
def test_files_of_another_kind_are_refused_with_a_remedy(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).write_bytes(b"a")
    with pytest.raises(InputError, match=rf"nor another of .*; {remedy}"):
        source(tmp_path / name)


def test_images_are_not_loaded_but_seen(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "text": ["a", "b", "c"],
        "image": pa.array([{"bytes": b"\xff", "path": None}, None, None], struct),
        "Images": pa.array([[], None, [{"bytes": b"", "path": "c"}]], pa.list_(struct)),
        "video": ["", None, ""],
    }
    pq.write_table(pa.table(columns), path)
    assert [(row.text, row.fault) for row in source(path)] == [
        (None, "'image' is not empty: only text is read (data.text names a column that is read alone)"),
        ("b", None),
        (None, "'Images' is not empty: only text is read (data.text names a column that is read alone)"),
    ]
    assert read(path)[0] == {"text": "a", "image": True, "video": ""}
    assert texts(path, text="text") == ["a", "b", "c"]


def test_a_folder_of_everything(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_text(lines(ROWS[:2]) + "{\n")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(ROWS[2:3]).encode()))
    pq.write_table(pa.table({"text": ["from Parquet"], "other": [1]}), tmp_path / "c.Parquet")
    datasets.Dataset.from_list([{"text": "saved"}]).save_to_disk(tmp_path / "d")
    (tmp_path / "d" / "cache-123.arrow").write_bytes(b"left over")
    (tmp_path / "e.json").write_text(json.dumps(ROWS[3:]))
    hidden_files = (
        "._a.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        "__MACOSX/a.jsonl",
        "e.json.gz",
        "f.zip",
    )
    for hidden in hidden_files:
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"\0Mac OS X")
    (tmp_path / "README.md").write_text("# about")
    (tmp_path / "dataset_info.json").write_text("{}")
    found = source(tmp_path)
    rows = list(found)
    assert [row.index for row in rows] == list(range(8))
    said = [row["text"] for row in ROWS]
    assert [row.text for row in rows] == [*said[:2], None, said[2], "from Parquet", "saved", *said[3:]]
    assert len(found.skipped) == 6
    assert "7 texts, 1 set aside; 6 files skipped (hidden, copies, archives): ._a.jsonl, " in found.described(
        7, 1
    )


def test_a_folder_of_hidden_files_alone_says_so(tmp_path: Path) -> None:
    (tmp_path / "._a.jsonl").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"a folder without \.jsonl.*hidden: \._a\.jsonl"):
        source(tmp_path)


def test_saved_data_sets(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": str(number)}] * (number + 1)} for number in range(600)]
    datasets.Dataset.from_list(chats).save_to_disk(tmp_path / "one", num_shards=3)
    rows = list(source(tmp_path / "one"))
    assert [len(row.messages or ()) for row in rows] == list(range(1, 601))
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "many")
    assert len(texts(tmp_path / "many")) == 5
    assert texts(tmp_path / "many", split="test") == [ROWS[0]["text"]]
    with pytest.raises(InputError, match=r"data\.split = 'dev' is not in .*\['test', 'train'\]"):
        source(tmp_path / "many", split="dev")


def test_an_arrow_file_of_the_file_format_and_a_bad_one(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {number}" for number in range(700)]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, 300)
    assert texts(tmp_path / "a.arrow") == table["text"].to_pylist()
    (tmp_path / "b.arrow").write_bytes(b"no Arrow at all")
    with pytest.raises(InputError, match=r"b\.arrow: not a readable Arrow file"):
        source(tmp_path / "b.arrow")


def test_keys_that_arrow_added_are_dropped(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Lima"}}}
    other = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1, "b": 2}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": None, "tool_calls": [one]},
            ]
        }
        for one in (call, other)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    user, assistant = next(iter(source(tmp_path / "rows.parquet"))).messages or ()
    assert user == {"role": "user", "content": "?"}
    assert assistant["tool_calls"] == [call]


def test_only_the_columns_that_are_read_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "image": [b"\xff" * 9] * 2}), path)
    assert file_columns(path) == ["text", "image"]
    assert [record for _, record in file_rows(path, ["text", "slice"])] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("columns", "print_"),
    [
        (["text"], "Columns(text='text', messages=None, slice=None)"),
        (["messages"], "Columns(text=None, messages='messages', slice=None)"),
        (
            ["text", "messages", "prompt", "completion"],
            "Columns(text='text', messages='messages', slice=None)",
        ),
    ],
)
def test_the_fingerprint_of_plain_data_stays(tmp_path: Path, columns: list[str], print_: str) -> None:
    """What it was before there were other forms: runs that were recorded then go on."""
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([dict.fromkeys(columns, "some")]))
    file = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source(path).fingerprint() == hashlib.sha256(print_.encode() + file.encode()).hexdigest()


def test_the_form_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([{"instruction": "a", "output": "b", "text": "c", "tools": "[]"}]))
    prints = {source(path, format=name).fingerprint() for name in ("auto", "alpaca", "text")}
    assert len(prints) == 2
