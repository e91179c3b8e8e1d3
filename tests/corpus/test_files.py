"""Files of rows by what they are in truth: packed, tables, texts, Arrow, folders of all of them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpus.layouts import (
    PACKINGS,
    ROWS,
    lines,
    read,
    source,
    texts,
)
from tinyonn.corpus.files import file_columns, file_rows
from tinyonn.errors import InputError


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
