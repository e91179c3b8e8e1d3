"""Files of data: which of a folder's hold rows, and their rows one after another, whatever they are packed in.

JSON and JSONL, CSV and TSV, texts of a line a row (each also packed), Parquet, and the Arrow files of `datasets`'
``save_to_disk``; endings count in any case, and whether a file is packed or in UTF-16 is seen from its first bytes.
Hidden files and archives are skipped in a folder, and so are plain texts that lie beside other data.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from tinyonn.corpus.forms import MEDIA
from tinyonn.corpus.json_rows import Numbered, Record, json_rows
from tinyonn.corpus.text_rows import csv_rows, text_rows
from tinyonn.errors import InputError, first_line

KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".txt": "text",
}
PACKED = (".gz", ".zst", ".bz2", ".xz")
TABLES = (".parquet", ".arrow")
KNOWN = ".jsonl, .json, .csv, .tsv, .txt (each also .gz, .zst, .bz2 or .xz), .parquet or .arrow"
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
REMEDIES = {
    ARCHIVES: "unpack it, and give the file or folder that was in it",
    (".xls", ".xlsx", ".ods"): "save it as CSV",
    (".md", ".rst", ".html", ".tex"): "copy it to a .txt to read each of its lines as a text",
    (
        ".yaml",
        ".yml",
        ".toml",
        ".xml",
        ".pkl",
        ".pickle",
        ".pt",
        ".npy",
        ".db",
        ".sqlite",
    ): "write it as JSONL",
}
FOREIGN = {  # what a file begins with that is none of these, whatever it is called
    b"PK\x03\x04": "a zip archive (or a spreadsheet); unpack it, or save it as CSV",
    b"PAR1": "a Parquet file; give it the ending .parquet",
    b"ARROW1": "an Arrow file; give it the ending .arrow",
    b"version https://git-lfs": "a Git LFS pointer and not the data; fetch them with git lfs pull",
    b"<!DOCTYPE": "a web page and not the data; fetch the file itself",
    b"<!doctype": "a web page and not the data; fetch the file itself",
    b"<html": "a web page and not the data; fetch the file itself",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
}
TAR = slice(257, 262)  # where an archive says "ustar"
ABOUT = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)  # about data, and no data
BATCH = 256
UNPACKING = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what a packed file that is damaged raises
UNTOLD = (
    ValueError,
    OverflowError,
    LookupError,
    TypeError,
    RecursionError,
)  # what Arrow's values raise on their way
CHUNK = 1 << 16
PEEK = 1000  # rows of a JSON file that are searched for its columns
ENCODINGS = (  # by mark; then by where the zeros of the first two characters lie
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def content_of(path: Path) -> str | None:
    """What a file holds by its name: json, csv, text, parquet, arrow; None for something else."""
    if path.name.lower().endswith(TABLES):
        return path.name.lower().rpartition(".")[2]
    name = _unpacked(path).lower()
    return None if name.endswith(".tar") else KINDS.get(Path(name).suffix)


def stem_of(path: Path) -> str:
    """A file's name without the endings that say what it holds; of a folder or a data set the last part."""
    if content_of(path) is None:
        return path.name
    return Path(_unpacked(path)).stem


def _unpacked(path: Path) -> str:
    """A file's name without the endings of what it is packed in."""
    name = path.name
    for ending in PACKED:
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return name


def remedy_of(path: Path) -> str:
    """What to do with a file that `content_of` does not know."""
    name = _unpacked(path).lower()
    return next(
        (remedy for endings, remedy in REMEDIES.items() if name.endswith(endings)), "convert it to one"
    )


def find_files(folder: Path, split: str) -> tuple[list[Path], list[str]]:
    """List a folder's files of data in the order of their names, and what is skipped: hidden, a copy, an archive.

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
        archive = path.name.lower().endswith(ARCHIVES) or ".tar." in path.name.lower()
        if (content_of(path) is None and not archive) or path.name in ABOUT or not path.is_file():
            continue
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in inside.parts)
        if archive or hidden or path.with_suffix("") in files or not _is_saved(path):
            skipped.append(str(inside))
        else:
            files.append(path)
    data = [path for path in files if content_of(path) != "text"]  # a text beside data is about them
    return data or files, skipped


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
    """Name the columns of a file: of a table all, else those of its first 1,000 rows."""
    if content_of(path) in ("parquet", "arrow"):
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
        Line of a JSONL file or a plain text, else place in the file.
    record : dict or str
        The row, or why it cannot be read. Of a table's images, audio and video only whether there are some.

    Raises
    ------
    InputError
        Not a readable file.
    """
    kind = content_of(path)
    if kind in ("parquet", "arrow"):
        yield from _table_rows(path, columns)
        return
    number = 0
    try:
        with opened(path) as stream:
            if kind == "csv":
                rows = csv_rows(stream, ".tsv" in path.name.lower())
            else:
                rows = text_rows(stream) if kind == "text" else json_rows(stream, str(path))
            for number, record in rows:
                yield number, record
    except (*UNPACKING, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: unreadable from row {number} on ({first_line(error)}); fetch it again, or save it as UTF-8"
        ) from None


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked, in UTF-8.

    Raises
    ------
    InputError
        It is something else by what it begins with, such as an archive.
    """
    with path.open("rb") as packed:
        magic = packed.read(6)
    openers: dict[bytes, Callable[[Path], Any]] = {
        b"\x1f\x8b": gzip.GzipFile,
        b"\x28\xb5\x2f\xfd": lambda path: io.BufferedReader(_Zstd(path)),
        b"BZh": bz2.BZ2File,
        b"\xfd7zXZ\x00": lzma.LZMAFile,
    }
    opener = next(
        (opener for mark, opener in openers.items() if magic.startswith(mark)), lambda path: path.open("rb")
    )
    stream: Any = opener(path)
    with stream:
        begin = stream.read(512)
        stream.seek(0)
        marks = (
            FOREIGN if content_of(path) not in ("parquet", "arrow") else FOREIGN.keys() - {b"PAR1", b"ARROW1"}
        )
        foreign = next((FOREIGN[mark] for mark in marks if begin.startswith(mark)), None)
        if foreign or begin[TAR] == b"ustar":
            raise InputError(f"{path} is {foreign or 'a tar archive; unpack it'}")
        encoding = next((name for mark, name in ENCODINGS if begin.startswith(mark)), None)
        zeros = bytes(byte != 0 for byte in begin[:4])
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

    kind = content_of(path)
    try:
        if kind == "parquet":
            table = pq.ParquetFile(path)
            names = list(table.schema_arrow.names)
        else:
            table, names = _arrow(path)
    except (pa.ArrowException, OSError) as error:
        if path.is_file():
            with suppress(*UNPACKING), opened(path):  # tells what else it is
                pass
        raise InputError(
            f"{path}: not a readable {'Parquet' if kind == 'parquet' else 'Arrow'} file, perhaps truncated "
            f"({first_line(error)}); fetch it again"
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
        if twice := [name for name in wanted if names.count(name) > 1]:
            raise InputError(
                f"{path}: it has {names.count(twice[0])} columns called {twice[0]!r}; rename all but one"
            )
        try:
            for batch in batches(wanted):
                for record in table_records(batch) if wanted else [{}] * batch.num_rows:
                    yield number, record
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{path}: unreadable from row {number} on ({first_line(error)}); fetch it again"
            ) from None


def table_records(batch: Any) -> Iterator[Record | str]:
    """Make records of a batch or table of Arrow's; a row with a value that Python has not is the reason.

    Such as strings that are not UTF-8, and times beyond the year 9999 or in a zone that is not known.
    """
    for place, name in enumerate(batch.schema.names):
        if name.lower() in MEDIA:
            batch = batch.set_column(place, name, _filled(batch.column(place)))
    try:
        yield from map(bare, batch.to_pylist())
    except UNTOLD:
        for row in range(batch.num_rows):  # Arrow does not check its values: find out which one it is
            try:
                yield bare(batch.slice(row, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield f"not UTF-8 ({error.reason})"
            except UNTOLD as error:
                yield f"a value that cannot be read ({type(error).__name__}: {first_line(error)})"


def _filled(column: Any) -> Any:
    """True where a column of images and the like holds some, null elsewhere; names of files stay."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    filled = pc.greater(pc.list_value_length(column), 0) if lists else pc.is_valid(column)
    return pc.if_else(filled, True, None)


def bare(value: Any) -> Any:
    """Leave out, in every dict, the keys that are null: Arrow gives all rows the keys of any of them."""
    if isinstance(value, dict):
        return {key: bare(part) for key, part in value.items() if part is not None}
    return [bare(part) for part in value] if isinstance(value, list) else value
