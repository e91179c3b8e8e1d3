"""Rows of plain texts and of comma- or tab-separated tables.

A line of a text is a row, as `datasets` reads it; blank ones are none. A table's first line names its columns, and all
that it says are strings; a quoted field may hold line ends.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from tinyonn.corpus.json_rows import ROW_BYTES, TOO_LONG, Numbered, lines_of

DELIMITERS = ",;\t|"


def text_rows(stream: BinaryIO) -> Iterator[Numbered]:
    """Read the lines that are not blank of a text in UTF-8.

    Yields
    ------
    number : int
        Line of the file.
    record : dict or str
        The line as ``text``, or why it cannot be read.
    """
    for number, line in lines_of(stream):
        try:
            yield number, TOO_LONG if line is None else {"text": line.decode()}
        except UnicodeDecodeError as error:
            yield number, f"not UTF-8 at byte {error.start} of the line"


def csv_rows(stream: BinaryIO, tabs: bool) -> Iterator[Numbered]:
    """Read a table whose first line names its columns.

    Parameters
    ----------
    stream : binary file
        At its beginning, in UTF-8.
    tabs : bool
        Tabs part the fields; else what the first line has most of: comma, semicolon, tab or bar.

    Yields
    ------
    number : int
        Place in the file, the first line not counted. A quote that is never closed takes as many as it has lines.
    record : dict or str
        The row, or why it cannot be read.
    """
    csv.field_size_limit(max(csv.field_size_limit(), ROW_BYTES))
    # Bytes that are no UTF-8 become lone surrogates, which no row may hold.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        first = text.readline(ROW_BYTES)
        mark = "\t" if tabs else max(DELIMITERS, key=first.count)
        names = next(csv.reader([first], delimiter=mark), [])
        yield from _rows(csv.reader(text, delimiter=mark, strict=True), [name.strip() for name in names])
    finally:
        text.detach()


def _rows(reader: Any, names: list[str]) -> Iterator[Numbered]:
    number = line = 0
    while True:
        try:
            fields = next(reader, None)
            reason = None
        except csv.Error as error:
            fields, reason = [], f"malformed CSV ({error})"
        last, line = line, reader.line_num
        if fields is None:
            return
        if reason is not None:
            for place in range(line - last):
                yield number + place, f"{reason}, from line {last + 2} on"
            number += line - last
        elif fields:
            fits = len(fields) == len(names)
            wrong = f"malformed CSV ({len(fields)} fields and not {len(names)}, line {last + 2})"
            yield number, dict(zip(names, fields, strict=True)) if fits else wrong
            number += 1
