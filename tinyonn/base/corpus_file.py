"""The tokenised corpus as one Arrow IPC file, memory-mapped: any sample is read without the rest.

Columns ``index`` (int64, row of the source), ``input_ids`` and ``labels`` (lists of int32); rows stand slice
by slice in their stored order. The schema's metadata holds the rest: ``tinyonn`` (JSON, see `Header`) and,
where slices were derived, ``slicer`` (compressed NumPy arrays).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyonn.errors import InputError

VERSION = 1
BATCH = 512

Int32 = np.ndarray[Any, np.dtype[np.int32]]
Int64 = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Sample:
    """One sample, ready for the model.

    Attributes
    ----------
    index : int
        Row of the source.
    slice : str
    input_ids : int32 [T]
    labels : int32 [T]
        -100 where a token is not labelled. Not shifted: the model does that.
    """

    index: int
    slice: str
    input_ids: Int32
    labels: Int32


@dataclass(frozen=True)
class SetAside:
    """A row of the source that is not used, and why."""

    index: int
    reason: str
    slice: str | None = None


@dataclass(frozen=True)
class Header:
    """What the file's metadata says.

    Attributes
    ----------
    key : str
        Hash of the source, the tokenizer and the options: the file is reused while it matches.
    fingerprint : str
        Hash of the tokens, labels, slices and order themselves.
    slices : dict
        Name to number of samples, sorted by name; in a corpus that has grown, new ones come last.
    set_aside : list of SetAside
    truncated, tokens, max_tokens : int
        Samples cut to `max_tokens`; tokens of all samples together; the longest that a sample may be.
    described : list of str
        One line for each source: what was read of it, and as what.
    making : str
        Hash of what decides the tokens of a row and where they lie, but for the source: a corpus grows only where
        it is the same.
    grown_from : list of str
        Fingerprints of the corpora that this one begins with, slice by slice, the oldest first.
    """

    key: str
    fingerprint: str
    slices: dict[str, int]
    set_aside: list[SetAside]
    truncated: int
    tokens: int
    max_tokens: int
    version: int = VERSION
    described: list[str] = field(default_factory=list)
    making: str = ""
    grown_from: list[str] = field(default_factory=list)


class Corpus:
    """A tokenised corpus, opened memory-mapped. Cheap to pickle: it travels as its path.

    Parameters
    ----------
    path : Path
        A file that `prepare_corpus` wrote.

    Raises
    ------
    InputError
        No such file, or not a readable one.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = Path(path)
        remedy = "delete it and record again, the corpus will be tokenised anew"
        try:
            table = _table(self.path)
            metadata = table.schema.metadata or {}
            tree = json.loads(metadata[b"tinyonn"])
            if tree["version"] != VERSION:
                raise InputError(f"{path}: format {tree['version']}, this version reads {VERSION}; {remedy}")
            tree["set_aside"] = [SetAside(**item) for item in tree["set_aside"]]
            self.header = Header(**tree)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: not a readable corpus ({type(error).__name__}: {error}); {remedy}"
            ) from None
        self.slicer: bytes | None = metadata.get(b"slicer")
        self._index = table.column("index")
        self._input_ids = Lists(table.column("input_ids"))
        self._labels = Lists(table.column("labels"))
        starts = accumulate(self.slices.values(), initial=0)
        self._starts = dict(zip(self.slices, starts, strict=False))

    def __reduce__(self) -> tuple[type[Corpus], tuple[Path]]:
        return Corpus, (self.path,)

    def __len__(self) -> int:
        return sum(self.slices.values())

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, labels, slices and order."""
        return self.header.fingerprint

    def begins_with(self, fingerprint: str) -> bool:
        """Whether this is the corpus of that fingerprint, or has grown from it."""
        return fingerprint in (self.fingerprint, *self.header.grown_from)

    @property
    def slices(self) -> dict[str, int]:
        """Name of each slice to its number of samples; see `Header`."""
        return self.header.slices

    @property
    def set_aside(self) -> list[SetAside]:
        """Rows of the source that are not used."""
        return self.header.set_aside

    @property
    def truncated(self) -> int:
        """Number of samples that were cut to `max_tokens`."""
        return self.header.truncated

    @property
    def tokens(self) -> int:
        """Tokens of all samples together."""
        return self.header.tokens

    @property
    def mean_tokens(self) -> float:
        """Tokens of a sample, on average."""
        return self.tokens / len(self)

    @property
    def max_tokens(self) -> int:
        """Most tokens that a sample may have."""
        return self.header.max_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return self._input_ids.longest()

    def sample(self, slice: str, position: int) -> Sample:
        """Read the sample at a position of a slice's stored order.

        Raises
        ------
        InputError
            No such slice or position.
        """
        count = self.slices.get(slice)
        if count is None:
            raise InputError(f"slice {slice!r} is not in {self.path}; it has {list(self.slices)}")
        if not 0 <= position < count:
            raise InputError(
                f"position {position} of slice {slice!r} in {self.path}: it has 0 to {count - 1}"
            )
        row = self._starts[slice] + position
        return Sample(self._index[row].as_py(), slice, self._input_ids[row].copy(), self._labels[row].copy())

    def tokens_of(self, slice: str, first: int, last: int) -> int:
        """Tokens of the samples at positions ``first <= position < last``."""
        start = self._starts[slice]
        return sum(self._input_ids[row].size for row in range(start + first, start + last))

    def range(self, slice: str, first: int, last: int) -> list[Sample]:
        """Read the samples at positions ``first <= position < last``."""
        return [self.sample(slice, position) for position in range(first, last)]

    def calibration(self, count: int, slices: dict[str, int] | None = None) -> list[Sample]:
        """Read the first `count` samples, taken in turns from the slices in their stored order.

        Parameters
        ----------
        count : int
        slices : dict of str to int, optional
            Only so many samples of each slice: of the corpus that this one has grown from.
        """
        places = [
            (position, slice)
            for slice, samples in (slices or self.slices).items()
            for position in range(min(samples, count))
        ]
        turns = sorted(places, key=lambda place: place[0])[:count]  # stable: slices stay sorted within a turn
        return [self.sample(slice, position) for position, slice in turns]


class Lists:
    """Rows of a chunked Arrow column of int32 lists, as NumPy views."""

    def __init__(self, column: Any) -> None:
        self._chunks = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in column.chunks]
        self._starts = np.array([0, *accumulate(len(chunk) for chunk in column.chunks)], np.int64)

    def __getitem__(self, row: int) -> Int32:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        offsets, values = self._chunks[number]
        place = row - int(self._starts[number])
        view: Int32 = values[offsets[place] : offsets[place + 1]]
        return view

    def longest(self) -> int:
        """Elements of the longest row; 0 of none."""
        return max(
            (int(np.diff(offsets).max()) for offsets, _ in self._chunks if len(offsets) > 1), default=0
        )


class RowWriter:
    """Appends (index, input_ids, labels) to an Arrow IPC file, in batches."""

    def __init__(self, stream: BinaryIO, metadata: dict[bytes, bytes]) -> None:
        import pyarrow as pa

        lists = pa.list_(pa.int32())
        self._schema = pa.schema([("index", pa.int64()), ("input_ids", lists), ("labels", lists)], metadata)
        self._writer = pa.ipc.new_file(stream, self._schema)
        self._rows: list[tuple[int, Int32, Int32]] = []

    def append(self, index: int, input_ids: Int32, labels: Int32) -> None:
        """Add a row."""
        self._rows.append((index, input_ids, labels))
        if len(self._rows) == BATCH:
            self._flush()

    def close(self) -> None:
        """Write what is left and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        import pyarrow as pa

        index, input_ids, labels = zip(*self._rows, strict=True)
        arrays = [pa.array(index, pa.int64()), _lists(input_ids), _lists(labels)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._rows = []


def read_rows(path: Path, rows: Int64) -> Iterator[tuple[int, Int32, Int32]]:
    """Read rows of an Arrow IPC file in any order."""
    table = _table(path)
    index, input_ids, labels = (
        table.column("index"),
        Lists(table.column("input_ids")),
        Lists(table.column("labels")),
    )
    for row in rows.tolist():
        yield index[row].as_py(), input_ids[row], labels[row]


def write_corpus(
    path: Path, header: Header, slicer: bytes | None, rows: Iterator[tuple[int, Int32, Int32]]
) -> Corpus:
    """Write a corpus whole: under another name first, renamed when it is on the disk."""
    metadata = {b"tinyonn": json.dumps(asdict(header)).encode()}
    if slicer is not None:
        metadata[b"slicer"] = slicer
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            writer = RowWriter(stream, metadata)
            for row in rows:
                writer.append(*row)
            writer.close()
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return Corpus(path)


def _table(path: Path) -> Any:
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _lists(rows: Sequence[Int32]) -> Any:
    import pyarrow as pa

    offsets = np.array([0, *accumulate(len(row) for row in rows)], np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
