"""JSON text to rows, one at a time: an object a line, an array, an object that holds the array, objects in a row.

How a file is laid out is seen from its first lines and not from its name. A row that cannot be read is a reason
(str) in the place of a record. No more than one row is held, but for an object around an array of an unusual name,
which is held whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, BinaryIO

from tinyonn.base.forms import NEEDED
from tinyonn.errors import InputError

Record = dict[str, Any]
Numbered = tuple[int, Record | str]

ROW_BYTES = 64 << 20  # a longer row is set aside
TOO_LONG = f"longer than {ROW_BYTES >> 20} MiB"
WHOLE_CHARACTERS = 256 << 20  # a longer object around an array is refused
CHUNK = 1 << 20
HEAD_LINES = 20
HEAD_BYTES = 8 << 20  # of one of them
MARK = b"\xef\xbb\xbf"  # UTF-8's byte-order mark

# A string never holds a line end: one that is not closed ends with its line, before the brackets that close the line.
TOKEN = re.compile(r'"(?:[^"\\\n]++|\\[^\n])*+(?P<end>["\n])?|[{}\[\],]')
LINE_END = re.compile(r"[\s,}\]]*$")
KEY = re.compile(r'\s*:\s*(?P<array>\[\s*\{\s*"(?P<first>[^"]*)"\s*:)?')
# With these begin messages and tools.
IN_A_ROW = {"role", "from", "content", "value", "type", "function"}
WRAPPERS = ("data", "rows", "train", "examples", "instances", "records", "items", "samples")


def json_rows(stream: BinaryIO, name: str) -> Iterator[Numbered]:
    """Read the rows of JSON text in UTF-8.

    Parameters
    ----------
    stream : binary file
        At its beginning; seekable.
    name : str
        Of the file, for messages.

    Yields
    ------
    number : int
        Line of the file, or place in the array.
    record : dict or str
        The row, or why it cannot be read.

    Raises
    ------
    InputError
        One object of over 256 MiB.
    """
    layout = _layout(stream)
    stream.seek(0)
    if layout == "lines":
        yield from _lines(stream)
    elif layout == "array":
        yield from _parsed(_split(_text(stream), depth=1))
    else:
        yield from _objects(stream, name)


def parse_row(text: str | bytes) -> Record | str:
    """Parse one JSON object; what is none comes back as the reason."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            return f"not UTF-8 at byte {error.start} of the line"
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        return f"malformed JSON ({error})"
    except ValueError:  # Python's guard: sys.set_int_max_str_digits
        return "malformed JSON (a number with too many digits)"
    except RecursionError:
        return "malformed JSON (nested too deeply)"
    return record if isinstance(record, dict) else "malformed JSON (not an object)"


def _layout(stream: BinaryIO) -> str:
    """Tell 'lines', 'array' or 'objects' from the first lines."""
    head: list[bytes] = []
    size = 0
    while (
        len(head) < HEAD_LINES and (len(head) < 2 or size < CHUNK) and (line := stream.readline(HEAD_BYTES))
    ):
        size += len(line)
        if line := line.removeprefix(MARK).rstrip():
            head.append(line)
    first = head[0].lstrip() if head else b""
    whole = sum(line[:1] == b"{" and isinstance(parse_row(line), dict) for line in head)
    parted = any(line.lstrip()[:1] == b"," for line in head)  # a comma before the row or on a line of its own
    if first.startswith(b"["):
        rows = first != b"[" and not parted and (whole > 1 or (len(head) > 1 and _is_list(first)))
        return "lines" if rows else "array"
    if first.startswith(b"{") and (len(head) == 1 or not isinstance(parse_row(first), dict)):
        within = any(line.endswith(b",") or line.lstrip()[:1] in (b"]", b"}") for line in head)
        return "objects" if parted or not whole or len(head) == 1 or (whole == 1 and within) else "lines"
    return "lines"


def _is_list(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), list)
    except (ValueError, RecursionError):
        return False


def _lines(stream: BinaryIO) -> Iterator[Numbered]:
    number = 0
    while line := stream.readline(ROW_BYTES):
        if line.endswith(b"\n") or len(line) < ROW_BYTES:
            if line := line.removeprefix(MARK).strip():
                yield number, parse_row(line)
        else:
            while line and not line.endswith(b"\n"):
                line = stream.readline(ROW_BYTES)
            yield number, TOO_LONG
        number += 1


def _parsed(texts: Iterator[str | None]) -> Iterator[Numbered]:
    for number, text in enumerate(texts):
        yield number, TOO_LONG if text is None else parse_row(text)


def _objects(stream: BinaryIO, name: str) -> Iterator[Numbered]:
    pieces = _text(stream)
    head = next(pieces, "")
    inside = _array_inside(head, closed=False)
    if inside is not None:
        yield from _parsed(_split(chain([head[inside:]], pieces), depth=1, once=True))
        return
    texts = _split(chain([head], pieces), depth=0, limit=WHOLE_CHARACTERS)
    values = list(islice(texts, 2))
    if values and values[0] is None:
        raise InputError(
            f"{name}: one JSON object of over {WHOLE_CHARACTERS >> 20} MiB; make it an array of rows or one row a line"
        )
    inside = _array_inside(values[0], closed=True) if len(values) == 1 and values[0] is not None else None
    if inside is not None and values[0] is not None:
        yield from _parsed(_split(iter([values[0][inside:]]), depth=1, once=True))
    else:
        yield from _parsed(chain(values, texts))


def _array_inside(text: str, closed: bool) -> int | None:
    """Where the array of rows begins that an object holds; None if the object is a row itself.

    Of an object that is not `closed`, for it is longer than the text, a usual name of the array must be found.
    """
    found: dict[str, int] = {}
    depth = 0
    for token in TOKEN.finditer(text):
        sign = token.group()
        if sign in "{[":
            depth += 1
        elif sign in "}]":
            depth -= 1
            if not depth and not closed:
                return None
        elif depth == 1 and sign != "," and (key := KEY.match(text, token.end())):
            if sign[1:-1] in NEEDED:
                return None
            name = sign[1:-1].lower()
            if key["array"] and (name in WRAPPERS or key["first"] not in IN_A_ROW):
                found[name] = key.start("array")
    places = [found[name] for name in WRAPPERS if name in found] or (list(found.values()) if closed else [])
    return places[0] if places else None


def _text(stream: BinaryIO) -> Iterator[str]:
    """The text in pieces; bytes that are no UTF-8 become lone surrogates, which no row may hold."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    while chunk := stream.read(CHUNK):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _split(
    pieces: Iterator[str], depth: int, limit: int | None = None, once: bool = False
) -> Iterator[str | None]:
    """Cut text into the values at a depth: 0 one after another, 1 the elements of the array that it begins with.

    None stands for a value of more than `limit` characters (64 Mi if left out); `once` ends with the array.
    """
    limit = ROW_BYTES if limit is None else limit
    buffer, level, place, start, skipped, ended = "", 0, 0, 0, False, False
    while not ended:
        piece = next(pieces, None)
        ended = piece is None
        buffer, place, start = buffer[start:] + (piece or ""), place - start, 0
        open_string = None
        while token := TOKEN.search(buffer, place):
            sign = token.group()
            if sign[0] == '"' and token["end"] is None and token.end() >= len(buffer) - 1 and not ended:
                open_string = token.end()
                break
            place = token.end()
            if token["end"] == "\n":
                place -= len(LINE_END.findall(sign)[0])
            elif sign in "{[":
                level += 1
                if level == depth:
                    start = place
            elif (sign in "}]" and level <= max(depth, 1)) or (sign == "," and level == depth == 1):
                level -= sign != ","
                text = buffer[start : place - depth]
                if skipped or text.strip():
                    yield None if skipped else text
                if once and level < depth:
                    return
                level, start, skipped = max(level, 0), place, False
            elif sign in "}]":
                level -= 1
        if len(buffer) - start > limit:
            skipped = True
            buffer = "" if open_string is None else '"' + buffer[open_string:]
            place, start = 0, 0
    rest = buffer[start:].strip()
    if skipped or rest or level:
        yield None if skipped else rest or "["
