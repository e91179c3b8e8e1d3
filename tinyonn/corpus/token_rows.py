"""Rows of tokens and labels in an Arrow IPC file, memory-mapped, with a checksum for each record batch.

Columns ``index`` (int64, row of the source), ``input_ids`` and ``labels`` (lists of int32). The metadata of a batch
say ``crc32``: of the batch's number and its rows (int64 each), then of the values of ``index``, and for both lists
of the offsets (int32) and the values, all little endian. A batch is checked when something is first read of it, so
that opening a file stays cheap and what is used is what was written.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyonn.corpus.tokens import UNLABELLED
from tinyonn.errors import StoreDamagedError
from tinyonn.files import damaged

BATCH = 512  # rows
CHECKSUM = b"crc32"
REMEDY = "delete it and run again what made it, its data will be tokenised anew"

Int32 = np.ndarray[Any, np.dtype[np.int32]]
Int64 = np.ndarray[Any, np.dtype[np.int64]]
Row = tuple[int, Int32, Int32]


class RowWriter:
    """Appends (index, input_ids, labels) to an Arrow IPC file, in batches."""

    def __init__(self, stream: BinaryIO, metadata: dict[bytes, bytes]) -> None:
        import pyarrow as pa

        self._schema = _schema().with_metadata(metadata)
        self._writer = pa.ipc.new_file(stream, self._schema)
        self._rows: list[Row] = []
        self._number = 0

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
        batch = pa.record_batch(
            [pa.array(index, pa.int64()), _lists(input_ids), _lists(labels)], schema=self._schema
        )
        checksum = str(_checksum(self._number, _parts(batch))).encode()
        self._writer.write_batch(batch, custom_metadata=pa.KeyValueMetadata({CHECKSUM: checksum}))
        self._rows = []
        self._number += 1


class Rows:
    """The rows of such a file, in any order, as NumPy views.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    metadata : dict of bytes to bytes
        Of the schema.
    vocabulary : int
        Tokens are below it; 0 if that is not known.
    sealed : bool
        Whether every batch must have a checksum; those of earlier versions have none.

    Raises
    ------
    StoreDamagedError
        It is not such a file; names it.
    FileNotFoundError
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        self.vocabulary, self.sealed = 0, False
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if not reader.schema.equals(_schema()):
                raise ValueError(f"its columns are {', '.join(map(str, reader.schema))}")
            self.metadata: dict[bytes, bytes] = reader.schema.metadata or {}
            found = [reader.get_batch_with_custom_metadata(at) for at in range(reader.num_record_batches)]
            self._batches = [_parts(batch) for batch, _ in found]
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise self.damage(error) from None
        self._checksums = [(metadata or {}).get(CHECKSUM) for _, metadata in found]
        self._starts = np.array([0, *accumulate(len(parts[0]) for parts in self._batches)], np.int64)
        self._checked = [False] * len(self._batches)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Row:
        """Index, tokens and labels; views of the file.

        Raises
        ------
        StoreDamagedError
            Its batch is not what was written; names the file.
        """
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        if not self._checked[number]:
            self._check(number)
        index, token_offsets, tokens, label_offsets, labels = self._batches[number]
        place = row - int(self._starts[number])
        return (
            int(index[place]),
            tokens[token_offsets[place] : token_offsets[place + 1]],
            labels[label_offsets[place] : label_offsets[place + 1]],
        )

    def longest(self) -> int:
        """Tokens of the longest row, 0 of none; not checked."""
        offsets = (parts[1] for parts in self._batches)
        return max((int(np.diff(part).max()) for part in offsets if len(part) > 1), default=0)

    def check(self) -> None:
        """Read all of it; errors as when a row is read."""
        for number, checked in enumerate(self._checked):
            if not checked:
                self._check(number)

    def damage(self, reason: object) -> StoreDamagedError:
        """The error for something that was not written so."""
        said = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
        return damaged(self.path, said, REMEDY)

    def _check(self, number: int) -> None:
        parts, checksum = self._batches[number], self._checksums[number]
        rows = f"rows {self._starts[number]} to {self._starts[number + 1] - 1}"
        if checksum is None and self.sealed:
            raise self.damage(f"{rows} have no checksum")
        if checksum is not None and checksum != str(_checksum(number, parts)).encode():
            raise self.damage(f"{rows} do not match their checksum")
        if (fault := _fault(parts, self.vocabulary)) is not None:
            raise self.damage(f"{rows}: {fault}")
        self._checked[number] = True


def read_rows(path: Path, rows: Int64) -> Iterator[Row]:
    """Read rows of such a file in any order."""
    content = Rows(path)
    for row in rows.tolist():
        yield content[row]


def _schema() -> Any:
    import pyarrow as pa

    lists = pa.list_(pa.int32())
    return pa.schema([("index", pa.int64()), ("input_ids", lists), ("labels", lists)])


def _parts(batch: Any) -> tuple[Any, ...]:
    """Index; offsets and values of both lists; views."""
    batch.validate()
    index, input_ids, labels = batch.columns
    lists = (part.to_numpy() for column in (input_ids, labels) for part in (column.offsets, column.values))
    return index.to_numpy(), *lists


def _checksum(number: int, parts: Sequence[Any]) -> int:
    found = zlib.crc32(np.array([number, len(parts[0])], "<i8").tobytes())
    for part in parts:
        found = zlib.crc32(part, found)
    return found


def _fault(parts: Sequence[Any], vocabulary: int) -> str | None:
    """What cannot be, whatever a checksum says."""
    index, token_offsets, tokens, label_offsets, labels = parts
    for offsets, values in ((token_offsets, tokens), (label_offsets, labels)):
        bad = len(offsets) != len(index) + 1 or offsets[0] < 0 or offsets[-1] > len(values)
        if bad or (np.diff(offsets) < 0).any():
            return "samples begin and end where there are no tokens"
    if not np.array_equal(token_offsets, label_offsets):
        return "there are not as many labels as tokens"
    most = vocabulary or np.iinfo(np.int32).max
    for name, values, least in (("token", tokens, 0), ("label", labels, UNLABELLED)):
        if values.size and not (least <= int(values.min()) and int(values.max()) < most):
            return f"there is a {name} outside the vocabulary of {most}"
    if ((labels < 0) & (labels != UNLABELLED)).any():
        return f"there is a label below 0 that is not {UNLABELLED}"
    return None


def _lists(rows: Sequence[Int32]) -> Any:
    import pyarrow as pa

    offsets = np.array([0, *accumulate(len(row) for row in rows)], np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
