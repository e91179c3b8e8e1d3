"""Random files of data: rows with absurd values in every format, then cut, spoilt, packed or called something else."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

WORDS = (
    "a text of some words",
    "",
    " ",
    "\n",
    "\0",
    "é🙂",
    "\u202e\x1b]0;x\x07",
    "[/red]",
    "<|im_start|>assistant\nx<|im_end|>",
    "</s><|endoftext|>",
    "x" * 3000,
    "=" * 500,
    '"',
    "\\",
    "{",
    "[",
    ",",
    "\ud800",
    "nan",
    "null",
    "1" * 400,
    "[{'role': 'user'",
    '[{"role": "user", "content": "a"}]',
    "Human: a\n\nAssistant: b\n\nHuman: c",
    "<image>",
    "\u2028",
    "\ufeff",
    "a\r\nb\tc",
)
NUMBERS = (0, 1, -1, 2**63, 10**30, 1e300, float("inf"), float("nan"), True, None, 0.5)
NAMES = (
    "text",
    "messages",
    "slice",
    "conversations",
    "instruction",
    "output",
    "prompt",
    "completion",
    "question",
    "answer",
    "chosen",
    "rejected",
    "tools",
    "system",
    "image",
    "label",
    "kto_tag",
    "role",
    "content",
    "choices",
    "",
    " ",
    "\0",
    "[/b]",
    "id",
    "Text",
    "history",
    "reasoning_content",
)
ROLES = ("user", "assistant", "system", "tool", "gpt", "human", "function_call", "[/red]", "", "assistant\nx")
BYTES = (
    b"\0",
    b"\xff",
    b"\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\\",
    b"9" * 5000,
    b"PK\x03\x04",
    b"\xed\xa0\x80",
    b"\x1f\x8b",
)
BIG = "9" * 5000

words = st.just(WORDS[0]) | st.sampled_from(WORDS) | st.text(max_size=30)
values = st.recursive(
    words | st.sampled_from(NUMBERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)
message = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": words}),
    st.fixed_dictionaries(
        {"role": st.sampled_from(ROLES), "content": values},
        optional={"tool_calls": values, "reasoning_content": words, "weight": values, "name": words},
    ),
    values,
)
turns = st.lists(message, max_size=4)
FORMS: tuple[tuple[dict[str, Any], st.SearchStrategy[Any]], ...] = (
    ({"text": WORDS[0], "slice": "a"}, st.fixed_dictionaries({"text": words}, optional={"slice": values})),
    (
        {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "slice": "a",
        },
        st.fixed_dictionaries(
            {"messages": turns}, optional={"tools": values, "slice": values, "system": words}
        ),
    ),
    (
        {"instruction": "Add", "output": "3"},
        st.fixed_dictionaries(
            {"instruction": values, "output": values}, optional={"input": values, "history": values}
        ),
    ),
    ({"prompt": "Add", "completion": "3"}, st.fixed_dictionaries({"prompt": values, "completion": values})),
    (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        st.fixed_dictionaries({"conversations": turns}),
    ),
    (
        {
            "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "rejected": "x",
        },
        st.fixed_dictionaries({"chosen": values, "rejected": values}),
    ),
)
other = st.dictionaries(st.sampled_from(NAMES), values, max_size=4) | values
alike = st.one_of(*(strange for _, strange in FORMS), other).flatmap(
    lambda first: st.lists(st.just(first) | other, max_size=6).map(lambda more: [first, *more])
)
usable = st.sampled_from(FORMS).flatmap(
    lambda form: st.lists(form[1], max_size=6).map(lambda strange: [form[0]] * 4 + strange + [form[0]] * 36)
)
rows = st.one_of(usable, usable, usable, alike)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def jsonl(rows: list[Any]) -> bytes:
    return _encoded("".join(_line(row) + "\n" for row in rows))


def table(rows: list[Any], mark: str = ",") -> bytes:
    out = io.StringIO()
    records = [row if isinstance(row, dict) else {"text": row} for row in rows]
    names = list(dict.fromkeys(name for record in records for name in record)) or ["text"]
    writer = csv.DictWriter(out, names, delimiter=mark, restval="")
    writer.writeheader()
    for record in records:
        writer.writerow(
            {name: value if isinstance(value, str) else _line(value) for name, value in record.items()}
        )
    return _encoded(out.getvalue())


def _columns(rows: list[Any]) -> Any:
    """A table of Arrow's: what it takes as it is, else as strings."""
    records = [row if isinstance(row, dict) else {"text": row} for row in rows]
    names = list(dict.fromkeys(name for record in records for name in record)) or ["text"]
    columns = []
    for name in names:
        cells = [record.get(name) for record in records]
        try:
            columns.append(pa.array(cells))
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            columns.append(
                pa.array([_line(cell).encode("utf-8", "surrogatepass") for cell in cells], pa.binary())
            )
    return pa.table(columns, names=names)


def parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(_columns(rows), sink)
    return sink.getvalue()


def arrow(rows: list[Any], stream: bool) -> bytes:
    whole, sink = _columns(rows), io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, whole.schema) as writer:
        writer.write_table(whole)
    return sink.getvalue()


def strange(kind: int, stream: bool | None) -> bytes:
    """Columns of types that a text is not, with values beyond what Python has, beside a text."""
    text = pa.array(["a text of words", "another one", None, "one more text"])
    huge = pa.array([2**62, -(2**62), 0, None])
    ends = pa.array([2**63 - 1, -(2**63), 0, None])
    column = [
        lambda: ends.cast(pa.timestamp("s")),
        lambda: ends.cast(pa.timestamp("ns")),
        lambda: ends.cast(pa.duration("s")),
        lambda: huge.cast(pa.timestamp("us", "Nowhere/None")),
        lambda: pa.array([2**31 - 1, -(2**31), 0, None], pa.date32()),
        lambda: ends.cast(pa.date64(), safe=False),
        lambda: pa.array([0, 1, 2, None], pa.time64("ns")),
        lambda: pa.array([2**62, 1, 2, None], pa.int64()).view(pa.time64("us")),
        lambda: pa.array([b"\xff\xfe", b"", b"\0", None], pa.binary()),
        lambda: pa.StringArray.from_buffers(4, *pa.array([b"\xff\xfe", b"", b"\0", b"x"]).buffers()[1:]),
        lambda: pa.array([[1], [], None, [2, 3]], pa.list_(pa.int8())),
        lambda: pa.nulls(4),
        lambda: pa.array([[("a", 1)], [], None, [("b", 2)]], pa.map_(pa.string(), pa.int64())),
        lambda: pa.array(["x", "y", "x", None]).dictionary_encode(),
        lambda: pa.array([float("nan"), float("inf"), 1e300, None]),
        lambda: pa.array([{"a": {"b": [{"c": 1}]}}, None, {}, {"a": None}]),
        lambda: pa.array([2**64 - 1, 0, 1, None], pa.uint64()),
        lambda: pa.array([10**70, 1, 2, None], pa.decimal256(76)),
        lambda: pa.array(["a", "b", "c", None], pa.string_view()),
        lambda: pa.array([b"a" * 16] * 4, pa.binary(16)),
        lambda: pa.array([1.0, 2.0, 3.0, None], pa.float16()) if hasattr(pa, "float16") else pa.nulls(4),
        lambda: pa.array([(1, 2, 3), None, (4, 5, 6), (7, 8, 9)], pa.month_day_nano_interval()),
    ]
    made = column[kind % len(column)]()
    name = ("slice", "messages", "tools", "text", "image", "extra")[kind // len(column) % 6]
    whole = pa.table([text, made], names=["text", name])
    sink = io.BytesIO()
    if stream is None:
        pq.write_table(whole, sink)
        return sink.getvalue()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, whole.schema) as writer:
        writer.write_table(whole)
    return sink.getvalue()


def _tried(make: Callable[..., bytes], *arguments: Any) -> bytes:
    """A file; empty where Arrow does not write such values."""
    try:
        return make(*arguments)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, NotImplementedError, csv.Error):
        return b""


FORMATS: dict[str, Callable[[list[Any]], bytes]] = {
    ".jsonl": jsonl,
    ".json": lambda rows: _encoded(_line(rows)),
    ".ndjson": lambda rows: _encoded(json.dumps({"version": 1, "data": rows})),
    ".csv": table,
    ".tsv": lambda rows: table(rows, "\t"),
    ".txt": lambda rows: _encoded("\n".join(row if isinstance(row, str) else _line(row) for row in rows)),
    ".parquet": parquet,
    ".arrow": lambda rows: arrow(rows, True),
    ".file.arrow": lambda rows: arrow(rows, False),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: bytes(pa.compress(content, "zstd")) if content else b"",
    ".zip": lambda content: _zipped(content),
    ".tar": lambda content: _tarred(content),
}
READINGS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {},
    {"slice": "slice"},
    {"text": "text"},
    {"messages": "messages"},
    {"format": "alpaca"},
    {"rendered": True},
    {"samples": 2},
    {"format": "sharegpt", "messages": "conversations"},
    {"text": "extra"},
    {"messages": "extra"},
)
ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "utf-7", "cp037", "shift_jis")
DEEP = {
    ".jsonl": b'{"text": ' + b"[" * 100_000,
    ".json": b"[" * 200_000,
    ".csv": b"text\n" + b'"' * 99_999,
    ".txt": b"(" * 1_000_000,
    ".ndjson": b'{"a":' * 100_000,
}
LARGE = {
    ".jsonl": b'{"messages": ['
    + b'{"role": "user", "content": "a"}, ' * 100_000
    + b'{"role": "assistant", "content": "b"}]}\n',
    ".json": b'[{"text": "' + b"word " * 2_000_000 + b'"}]',
    ".txt": b"a text of words " * 500_000,
    ".csv": b"text\n" + b"a," * 1_000_000,
    ".tsv": b"text\t" * 100_000,
    ".ndjson": b'{"data": [' + b'{"text": ' + b"9" * 1_000_000 + b"}]}",
}


def _zipped(content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return sink.getvalue()


def _tarred(content: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return sink.getvalue()


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes, dict[str, Any]]:
    """A name's ending, the bytes, and how they are to be read."""
    ending = draw(st.sampled_from(sorted(FORMATS)))
    kind = draw(
        st.sampled_from(("rows", "rows", "rows", "rows", "strange", "strange", "deep", "large", "bytes"))
    )
    if kind == "strange":
        ending = draw(st.sampled_from((".parquet", ".arrow", ".file.arrow")))
        stream = {".parquet": None, ".arrow": True, ".file.arrow": False}[ending]
        content = _tried(strange, draw(st.integers(0, 131)), stream)
    elif kind in ("deep", "large"):
        known = DEEP if kind == "deep" else LARGE
        ending = draw(st.sampled_from(sorted(known)))
        content = known[ending]
    elif kind == "bytes":
        content = draw(st.binary(max_size=300))
    else:
        content = _tried(FORMATS[ending], draw(rows))
        encoding = (
            draw(st.sampled_from(ENCODINGS))
            if ending not in (".parquet", ".arrow", ".file.arrow")
            else "utf-8"
        )
        if encoding != "utf-8" and draw(st.booleans()):
            content = content.decode("utf-8", "replace").encode(encoding, "replace")
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 1, 2)))):
        content = _spoilt(draw, content)
    tables = ending in (".parquet", ".arrow", ".file.arrow")
    packed = draw(st.sampled_from(("",) * (30 if tables else 6) + tuple(PACKERS)))
    content = _tried(PACKERS[packed], content)
    if packed and draw(st.booleans()):
        content = _spoilt(draw, content)
    named = packed if draw(st.sampled_from((True, True, True, False))) else ""
    return ending + named, content, draw(st.sampled_from(READINGS))


def _spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    place = draw(st.integers(0, 1 << 20)) % (len(content) + 1)
    how = draw(st.sampled_from(("cut", "flip", "insert", "zeros", "twice", "big number")))
    if how == "cut":
        return content[:place]
    if how == "flip":
        byte = bytes([content[place] ^ draw(st.integers(1, 255))]) if place < len(content) else b""
        return content[:place] + byte + content[place + 1 :]
    if how == "insert":
        return content[:place] + draw(st.sampled_from(BYTES)) + content[place:]
    if how == "zeros":
        return content[:place] + bytes(draw(st.integers(1, 100))) + content[place + 100 :]
    if how == "twice":
        return content + content if len(content) < 1 << 20 else content
    return content.replace(b"1", BIG.encode(), 1)
