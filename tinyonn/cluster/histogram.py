"""Distinct rows of a tensor, counted chunk by chunk; and labels written back through the same keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from tinyonn.cluster.features import KEYS, bucket_edges, bucket_number
from tinyonn.dense.parameters import Parameter
from tinyonn.store.arrays import BandWriter, band_rows, bands, read_chunks
from tinyonn.store.reader import Reader
from tinyonn.store.records import UInt8, UInt16

if TYPE_CHECKING:
    from icechunk import ForkSession

NO_CELL = 255  # label of a weight in no cell


@dataclass(frozen=True)
class Grid:
    """How many buckets of rows and of columns a tensor is cut into: 1 where the position does not matter."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Place:
    """Distinct rows of one place of a tensor.

    Attributes
    ----------
    row, column : int
        Features of its buckets, 0..15.
    keys : uint32 [n], increasing
    scores : uint8 [n]
    counts : uint32 [n]
    """

    row: int
    column: int
    keys: np.ndarray
    scores: UInt8
    counts: np.ndarray


def count_tensors(reader: Reader, parameters: tuple[Parameter, ...], grid: Grid) -> list[list[Place]]:
    """A task: the places of some tensors."""
    return [count_tensor(reader, parameter, grid) for parameter in parameters]


def count_tensor(reader: Reader, parameter: Parameter, grid: Grid) -> list[Place]:
    """Count the distinct rows of every place of a tensor; a bucket of rows is done when its last row is."""
    columns = _column_buckets(parameter, grid)
    counts = np.zeros((columns.max() + 1, KEYS), np.uint32)
    scores = np.zeros(KEYS >> 8, np.uint8)
    places: list[Place] = []
    for first, last, bucket, ends, rows, affinity in _spans(reader, parameter, grid):
        _count(rows, affinity, columns, counts, scores)
        if ends:
            for column in range(counts.shape[0]):
                keys = np.flatnonzero(counts[column]).astype(np.uint32)
                places.append(
                    Place(
                        bucket_number(bucket, min(grid.rows, parameter.shape[0])),
                        bucket_number(column, counts.shape[0]),
                        keys,
                        scores[keys >> 8],
                        counts[column][keys],
                    )
                )
            counts[:] = 0
        assert first < last
    return places


def _spans(
    reader: Reader, parameter: Parameter, grid: Grid
) -> Iterator[tuple[int, int, int, bool, UInt16, UInt8]]:
    """Rows and affinity [rows, columns], chunk by chunk and cut at the buckets' edges; bucket, and whether it ends."""
    name, shape = parameter.name, parameter.shape
    arrays = [(reader.output(group, name), reader.what(group, name)) for group in ("rows", "affinity")]
    edges = bucket_edges(shape[0], grid.rows)
    bucket = 0
    for first, last in bands(shape):
        rows, affinity = read_chunks(arrays, first, last)
        begin = first
        while begin < last:
            end = min(last, edges[bucket][1])
            part = slice(begin - first, end - first)
            ends = end == edges[bucket][1]
            flat = rows[part].reshape(end - begin, -1), affinity[part].reshape(end - begin, -1)
            yield begin, end, bucket, ends, flat[0], flat[1]
            bucket += ends
            begin = end


def _column_buckets(parameter: Parameter, grid: Grid) -> np.ndarray:
    """Bucket of every column: int64 [columns]."""
    width = prod(parameter.shape[1:])
    buckets = np.zeros(width, np.int64)
    for number, (first, last) in enumerate(bucket_edges(width, grid.columns)):
        buckets[first:last] = number
    return buckets


def count_bytes(shape: tuple[int, ...], grid: Grid) -> int:
    """Memory of a task that counts or labels: a band of rows and affinity, the same as stored, its keys and its labels;
    and the numbers of all keys, or their labels.
    """
    band = band_rows(shape) * prod(shape[1:])
    return min(grid.columns, prod(shape[1:])) * KEYS * 4 + band * (2 * 3 + 4 + 1) + (KEYS >> 8)


def label_tensors(
    reader: Reader,
    fork: ForkSession,
    tensors: tuple[tuple[Parameter, list[LabelTable]], ...],
    grid: Grid,
    old: bool,
) -> tuple[ForkSession, list[Moved]]:
    """A task: write the labels of some tensors.

    Parameters
    ----------
    reader : Reader
    fork : icechunk.ForkSession
    tensors : tuple of (Parameter, list of LabelTable)
        The tables of a tensor's places in the order of `count_tensor`; none for a tensor of the trunk.
    grid : Grid
    old : bool
        Whether there are labels from before, to compare with.

    Returns
    -------
    fork : icechunk.ForkSession
    moves : list of Moved
        For each tensor; empty where there were none before.
    """
    return fork, [label_tensor(reader, fork, parameter, tables, grid, old) for parameter, tables in tensors]


@dataclass(frozen=True)
class Moved:
    """Weights of a tensor by old and new label, of the pairs that there are: a table of 512 KiB in a few numbers.

    Attributes
    ----------
    pairs : uint16 [n]
        Old label << 8 | new label.
    counts : int64 [n]
    """

    pairs: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, table: np.ndarray) -> Moved:
        """From the table, int64 [256, 256]."""
        pairs = np.flatnonzero(table)
        return cls(pairs.astype(np.uint16), table.reshape(-1)[pairs])

    def table(self) -> np.ndarray:
        """Int64 [256, 256]."""
        out = np.zeros(1 << 16, np.int64)
        out[self.pairs] = self.counts
        return out.reshape(256, 256)


@dataclass(frozen=True)
class LabelTable:
    """Labels of a place's distinct rows."""

    keys: np.ndarray
    labels: UInt8


def label_tensor(
    reader: Reader, fork: ForkSession, parameter: Parameter, tables: list[LabelTable], grid: Grid, old: bool
) -> Moved:
    """Write one tensor's labels; weights by old and new label."""
    writer = BandWriter(fork, f"labels/{parameter.name}", parameter.shape, "uint8", {})
    name = parameter.name
    before = (reader.output("labels", name), reader.what("labels", name)) if old else None
    moves = np.zeros((256, 256), np.int64)
    if not tables:
        for first, last in bands(parameter.shape):
            out = np.full((last - first, *parameter.shape[1:]), NO_CELL, np.uint8)
            _compare(before, parameter, first, out, moves)
            writer.write(first, out)
        return Moved.of(moves)
    columns = _column_buckets(parameter, grid)
    width = int(columns.max()) + 1
    lookup = np.full((width, KEYS), NO_CELL, np.uint8)
    rows_done = 0
    buffer: list[UInt8] = []
    filled = -1
    chunk = band_rows(parameter.shape)
    for _, last, bucket, _, rows, affinity in _spans(reader, parameter, grid):
        if bucket != filled:
            lookup[:] = NO_CELL
            for column in range(width):
                table = tables[bucket * width + column]
                lookup[column][table.keys] = table.labels
            filled = bucket
        out = np.empty(rows.shape, np.uint8)
        _label(rows, affinity, columns, lookup, out)
        buffer.append(out)
        if last == parameter.shape[0] or last % chunk == 0:  # a whole chunk
            whole = np.concatenate(buffer) if len(buffer) > 1 else buffer[0]
            shaped = whole.reshape(last - rows_done, *parameter.shape[1:])
            _compare(before, parameter, rows_done, shaped, moves)
            writer.write(rows_done, shaped)
            rows_done, buffer = last, []
    return Moved.of(moves)


def _compare(before: Any, parameter: Parameter, first: int, labels: UInt8, moves: np.ndarray) -> None:
    if before is None:
        return
    (old,) = read_chunks([before], first, first + labels.shape[0])
    _count_moves(old.reshape(-1), labels.reshape(-1), moves)


@njit(nogil=True, cache=True)
def _count(rows: Any, affinity: Any, columns: Any, counts: Any, scores: Any) -> None:
    one = counts.shape[0] == 1
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            record = rows[i, j]
            code = record >> 4
            scores[code] = record & 15
            counts[0 if one else columns[j], np.uint32(code) << 8 | affinity[i, j]] += np.uint32(1)


@njit(nogil=True, cache=True)
def _label(rows: Any, affinity: Any, columns: Any, lookup: Any, out: Any) -> None:
    one = lookup.shape[0] == 1
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            out[i, j] = lookup[0 if one else columns[j], np.uint32(rows[i, j] >> 4) << 8 | affinity[i, j]]


@njit(nogil=True, cache=True)
def _count_moves(old: Any, new: Any, moves: Any) -> None:
    for i in range(old.size):
        moves[old[i], new[i]] += 1
