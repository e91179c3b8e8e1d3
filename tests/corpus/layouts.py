"""Rows written as JSON in many ways, and read back."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from tinyonn.config import DataConfig
from tinyonn.corpus.files import file_rows
from tinyonn.corpus.rows import Source

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
