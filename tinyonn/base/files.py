"""Files of data: which of a folder's hold rows, and their rows one after another, whatever they are packed in.

JSON and JSONL (also .gz and .zst), Parquet, and the Arrow files of `datasets`' ``save_to_disk``; endings count in
any case, and whether JSON is packed or in UTF-16 is seen from its first bytes. Hidden files are skipped.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from tinyonn.base.json_rows import Numbered, Record, json_rows
from tinyonn.errors import InputError

JSON = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
KNOWN = ".jsonl, .json (also .gz or .zst), .parquet or .arrow"
ABOUT = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)  # about data, and no data
BATCH = 256
CHUNK = 1 << 16
PEEK = 1000  # rows of a JSON file that are searched for its columns
ENCODINGS = (  # by mark; then by where the zeros of the first two characters lie
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def kind_of(path: Path) -> str | None:
    """What a file holds by its name: json, parquet, arrow; None for something else."""
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    if name.endswith(JSON):
        return "json"
    return next((ending[1:] for ending in TABLES if path.name.lower().endswith(ending)), None)


def find_files(folder: Path, split: str) -> tuple[list[Path], list[str]]:
    """List a folder's files of data in the order of their names, and what is skipped as hidden or a copy.

    Parameters
    ----------
    folder : Path
    split : str
        Which part of a saved ``DatasetDict`` is taken.

    Raises
    ------
    InputError
        No such split.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if split not in splits:
            raise InputError(f"data.split = {split!r} is not in {folder}; it has {splits}")
        folder = folder / split
    files, skipped = [], []
    for path in sorted(folder.rglob("*")):
        if kind_of(path) is None or path.name in ABOUT or not path.is_file():
            continue
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in inside.parts)
        if hidden or path.with_suffix("") in files or not _is_saved(path):
            skipped.append(str(inside))
        else:
            files.append(path)
    return files, skipped


def _is_saved(path: Path) -> bool:
    """Whether an Arrow file belongs to its folder's data set and is no cache beside it."""
    state = path.with_name("state.json")
    if path.suffix.lower() != ".arrow" or not state.is_file():
        return True
    try:
        return path.name in [file["filename"] for file in json.loads(state.read_text("utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{state}: not what save_to_disk writes ({error}); save the data set again"
        ) from None


def file_columns(path: Path) -> list[str]:
    """Name the columns of a file: of a table all, of JSON those of its first 1,000 rows."""
    if kind_of(path) != "json":
        with _table(path) as (names, _):
            return names
    found: dict[str, None] = {}
    for _, record in islice(file_rows(path), PEEK):
        found.update(dict.fromkeys(record if isinstance(record, dict) else ()))
    return list(found)


def file_rows(path: Path, columns: list[str] | None = None) -> Iterator[Numbered]:
    """Read a file's rows.

    Parameters
    ----------
    path : Path
    columns : list of str, optional
        Of a table, those to read; names that it does not have are left out.

    Yields
    ------
    number : int
        Line of a JSONL file, else place in the file.
    record : dict or str
        The row, or why it cannot be read.

    Raises
    ------
    InputError
        Not a readable file.
    """
    if kind_of(path) != "json":
        yield from _table_rows(path, columns)
        return
    number = 0
    try:
        with _open(path) as stream:
            for number, record in json_rows(stream, str(path)):
                yield number, record
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: unreadable from row {number} on ({_reason(error)}); fetch it again, or save it as UTF-8"
        ) from None


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a JSON file, unpacked, in UTF-8."""
    with path.open("rb") as packed:
        magic = packed.read(4)
    stream: Any
    if magic[:2] == b"\x1f\x8b":
        stream = gzip.GzipFile(path)
    elif magic == b"\x28\xb5\x2f\xfd":
        stream = io.BufferedReader(_Zstd(path))
    else:
        stream = path.open("rb")
    with stream:
        begin = stream.read(4)
        stream.seek(0)
        encoding = next((name for mark, name in ENCODINGS if begin.startswith(mark)), None)
        zeros = bytes(byte != 0 for byte in begin)
        encoding = encoding or {b"\1\0\1\0": "utf-16-le", b"\0\1\0\1": "utf-16-be"}.get(zeros)
        yield stream if encoding is None else cast(BinaryIO, io.BufferedReader(_Utf8(stream, encoding)))


class _Rewound(io.RawIOBase):
    """A stream of bytes that are made in order, and anew after ``seek(0)``."""

    def __init__(self) -> None:
        self._pieces = self._begin()
        self._piece = b""

    def _begin(self) -> Iterator[bytes]:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        assert (place, whence) == (0, 0)
        self._pieces, self._piece = self._begin(), b""
        return 0

    def readinto(self, buffer: Any) -> int:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = piece
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count


class _Zstd(_Rewound):
    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__()

    def _begin(self) -> Iterator[bytes]:
        import pyarrow as pa

        with pa.OSFile(str(self._path)) as packed, pa.CompressedInputStream(packed, "zstd") as stream:
            while piece := stream.read(CHUNK):
                yield piece


class _Utf8(_Rewound):
    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream, self._encoding = stream, encoding
        super().__init__()

    def _begin(self) -> Iterator[bytes]:
        self._stream.seek(0)
        decoder = codecs.getincrementaldecoder(self._encoding)("surrogatepass")
        while chunk := self._stream.read(CHUNK):
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")


@contextmanager
def _table(path: Path) -> Iterator[tuple[list[str], Any]]:
    """A table's columns, and a function from columns to batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = kind_of(path)
    try:
        if kind == "parquet":
            table = pq.ParquetFile(path)
            names = list(table.schema_arrow.names)
        else:
            table, names = _arrow(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a readable {'Parquet' if kind == 'parquet' else 'Arrow'} file, perhaps truncated "
            f"({_reason(error)}); fetch it again"
        ) from None
    with table:

        def batches(columns: list[str]) -> Iterator[Any]:
            if kind == "parquet":
                yield from table.iter_batches(BATCH, columns=columns)
                return
            whole = hasattr(table, "num_record_batches")
            for batch in map(table.get_batch, range(table.num_record_batches)) if whole else table:
                for first in range(0, batch.num_rows, BATCH):
                    yield batch.select(columns).slice(first, BATCH)

        yield names, batches


def _arrow(path: Path) -> tuple[Any, list[str]]:
    """Open a file of the streaming format, as `datasets` writes, or of the file format."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        table = pa.ipc.open_file(source)
    return table, list(table.schema.names)


def _table_rows(path: Path, columns: list[str] | None) -> Iterator[Numbered]:
    import pyarrow as pa

    number = 0
    with _table(path) as (names, batches):
        wanted = names if columns is None else [name for name in columns if name in names]
        try:
            for batch in batches(wanted):
                for record in _records(batch) if wanted else [{}] * batch.num_rows:
                    yield number, record
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{path}: unreadable from row {number} on ({_reason(error)}); fetch it again"
            ) from None


def _records(batch: Any) -> Iterator[Record | str]:
    try:
        yield from map(bare, batch.to_pylist())
    except UnicodeDecodeError:
        for row in range(batch.num_rows):  # Arrow does not check its strings: find out which one it is
            try:
                yield bare(batch.slice(row, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield f"not UTF-8 ({error.reason})"


def bare(value: Any) -> Any:
    """Leave out, in every dict, the keys that are null: Arrow gives all rows the keys of any of them."""
    if isinstance(value, dict):
        return {key: bare(part) for key, part in value.items() if part is not None}
    return [bare(part) for part in value] if isinstance(value, list) else value


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
