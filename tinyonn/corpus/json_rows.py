"""JSON text to rows, one at a time: an object a line, an array, an object that holds the array, objects in a row.

How a file is laid out is seen from its first lines and not from its name. A row that cannot be read is a reason
(str) in the place of a record. No more than one row is held, but for an object around an array of an unusual name,
or around columns or numbered rows (`tinyonn.corpus.forms`), which is held whole.

A value that is no object is a row where the file begins with one of its kind: a string is a text, a list of messages
a conversation.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, BinaryIO, cast

from tinyonn.corpus.forms import NEEDED, WRAPPERS, told_by_hub, unfold
from tinyonn.corpus.messages import ROLE_KEYS
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
# Between the elements of an array.
NEXT = re.compile(r"\s*([,\]])")
SPACE = re.compile(r"\s*")
EDGE = 16  # an error so near to the end of what is there may lie in what is not
DECODE = json.JSONDecoder().raw_decode
# With these begin messages and tools.
IN_A_ROW = {"role", "from", "content", "value", "type", "function"}


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
    rows = _Rows()
    if layout == "lines":
        values = _lines(stream)
    elif layout == "array":
        values = enumerate(_split(_text(stream)))
    else:
        values = enumerate(_objects(stream, name))
    for number, value in values:
        yield number, rows.row(value)


class Reason(str):
    """Why a value cannot be read."""


class _Rows:
    """What a file's values are as rows, by the kind of the first one."""

    _first: type | None = None

    def row(self, value: Any) -> Record | str:
        kind = type(value)
        if kind is Reason:
            return str(value)
        self._first = self._first or kind
        if kind is dict:
            return cast(Record, value)
        if kind is str and self._first is str:
            return {"text": value}
        if kind is list and self._first is list and value and all(map(_is_message, value)):
            return {"messages": value}
        return "malformed JSON (not an object)"


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in ROLE_KEYS)


def parse_value(text: str | bytes) -> Any:
    """Parse one JSON value; what is none comes back as the `Reason`."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            return Reason(f"not UTF-8 at byte {error.start} of the line")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return Reason(f"malformed JSON ({error})")
    except ValueError:  # Python's guard: sys.set_int_max_str_digits
        return Reason("malformed JSON (a number with too many digits)")
    except RecursionError:
        return Reason("malformed JSON (nested too deeply)")


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
    whole = sum(line[:1] == b"{" and isinstance(parse_value(line), dict) for line in head)
    parted = any(line.lstrip()[:1] == b"," for line in head)  # a comma before the row or on a line of its own
    if first.startswith(b"["):
        rows = (
            first != b"["
            and not parted
            and (whole > 1 or (len(head) > 1 and isinstance(parse_value(first), list)))
        )
        return "lines" if rows else "array"
    if first.startswith(b"{") and first.endswith(b"},") and isinstance(parse_value(first[:-1]), dict):
        return "lines"
    if first.startswith(b"{") and (len(head) == 1 or not isinstance(parse_value(first), dict)):
        within = any(line.endswith(b",") or line.lstrip()[:1] in (b"]", b"}") for line in head)
        return "objects" if parted or not whole or len(head) == 1 or (whole == 1 and within) else "lines"
    return "lines"


def lines_of(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Read lines that are not blank with their numbers; None stands for one of over 64 MiB."""
    number = 0
    while line := stream.readline(ROW_BYTES):
        if line.endswith(b"\n") or len(line) < ROW_BYTES:
            if line := line.removeprefix(MARK).strip():
                yield number, line
        else:
            while line and not line.endswith(b"\n"):
                line = stream.readline(ROW_BYTES)
            yield number, None
        number += 1


def _lines(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    for number, line in lines_of(stream):
        value = Reason(TOO_LONG) if line is None else parse_value(line)
        if type(value) is Reason and line is not None and line.endswith(b"},"):
            value = parse_value(line[:-1])
        yield number, value


def _objects(stream: BinaryIO, name: str) -> Iterator[Any]:
    pieces = _text(stream)
    head = next(pieces, "")
    inside = _array_inside(head, closed=False)
    if inside is not None:
        yield from map(told_by_hub, _split(chain([head[inside:]], pieces), once=True))
        return
    texts = _texts(chain([head], pieces))
    values = list(islice(texts, 2))
    if values and values[0] is None:
        raise InputError(
            f"{name}: one JSON object of over {WHOLE_CHARACTERS >> 20} MiB; make it an array of rows or one row a line"
        )
    if len(values) == 1 and values[0] is not None:
        inside = _array_inside(values[0], closed=True)
        if inside is not None:
            yield from map(told_by_hub, _split(iter([values[0][inside:]]), once=True))
        else:
            yield from unfold(parse_value(values[0]))
        return
    for text in chain(values, texts):
        yield Reason(TOO_LONG) if text is None else parse_value(text)


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
            if sign[1:-1].lower() in NEEDED:
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


def _texts(pieces: Iterator[str]) -> Iterator[str | None]:
    """Cut text into the values that stand one after another; None stands for one that is too long."""
    return cast(Iterator[str | None], _cut(pieces, 0, WHOLE_CHARACTERS, once=False))


def _split(pieces: Iterator[str], once: bool = False) -> Iterator[Any]:
    """Read the elements of the array that text begins with."""
    for found in _cut(pieces, 1, ROW_BYTES, once):
        if isinstance(found, str):
            yield parse_value(found)
        else:
            yield Reason(TOO_LONG) if found is None else found.value


@dataclass(frozen=True, slots=True)
class _Read:
    """An element that is parsed already."""

    value: Any
    end: int
    sign: str


def _cut(pieces: Iterator[str], depth: int, limit: int, once: bool) -> Iterator[str | _Read | None]:
    """Cut text into the values at a depth: 0 one after another, 1 the elements of the array that it begins with.

    None stands for a value of more than `limit` characters; `once` ends with the array.
    """
    buffer, level, place, start, skipped, ended = "", 0, 0, 0, False, False
    keys: tuple[str, ...] = ()
    open_string: int | None = None
    while not ended:
        held = len(buffer) - start
        # A string that is not closed is searched from its beginning again: when as much more is there.
        more = 1 if open_string is None else max(1, min(held, limit + CHUNK - held))
        piece, ended = _next(pieces, more)
        buffer, place, start = buffer[start:] + piece, place - start, 0
        open_string = None
        while True:
            if place == start and level == depth == 1 and not skipped:
                read = _element(buffer, start, keys, ended)
                if isinstance(read, int):
                    yield buffer[start:read]
                    start = place = buffer.index(",", read) + 1
                    continue
                if read is not None:
                    start = place = read.end
                    keys = tuple(read.value) if type(read.value) is dict else keys
                    yield read
                    level -= read.sign == "]"
                    if once and not level:
                        return
                    continue
            token = TOKEN.search(buffer, place)
            if token is None:
                break
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
            elif sign == "," and not level:
                start = place  # between objects
        if len(buffer) - start > limit:
            skipped = True
            buffer = "" if open_string is None else '"' + buffer[open_string:]
            place, start = 0, 0
    rest = buffer[start:].strip()
    if skipped or rest or level:
        yield None if skipped else rest or "["


def _next(pieces: Iterator[str], enough: int) -> tuple[str, bool]:
    """Text of so many characters or more, and whether it is the last."""
    taken: list[str] = []
    size = 0
    while size < enough:
        piece = next(pieces, None)
        if piece is None:
            return "".join(taken), True
        taken.append(piece)
        size += len(piece)
    return "".join(taken), False


def _element(buffer: str, start: int, keys: tuple[str, ...], ended: bool) -> _Read | int | None:
    """Parse the element that begins here, or say where one ends that is broken; None if a search must tell.

    Where a whole array stands on one line and a string of a row is not closed, the brackets behind tell nothing: the
    row ends before the next one that has the same keys as the last one that was read.
    """
    space = SPACE.match(buffer, start)
    assert space is not None  # it matches nothing, too
    begin = space.end()
    try:
        value, end = DECODE(buffer, begin)
    except json.JSONDecodeError as error:
        torn = error.msg.startswith("Unterminated") or error.pos > len(buffer) - EDGE
        return _resume(buffer, start, keys) if keys and (ended or not torn) else None
    except (ValueError, RecursionError):
        return None
    sign = NEXT.match(buffer, end)
    return _Read(value, sign.end(), sign[1]) if sign else None


def _resume(buffer: str, start: int, keys: tuple[str, ...]) -> int | None:
    line = buffer.find("\n", start)
    behind = re.compile(r"\}\s*,\s*(?=\{\s*" + re.escape(json.dumps(keys[0], ensure_ascii=False)) + r"\s*:)")
    for match in behind.finditer(buffer, start, len(buffer) if line < 0 else line):
        try:
            value, _ = DECODE(buffer, match.end())
        except (ValueError, RecursionError):
            continue
        if type(value) is dict and tuple(value) == keys:
            return match.start() + 1
    return None
