"""One tensor's cuts: what it keeps, what of that is the core, and what the cells keep of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numba import njit

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.experts.allocation import cell_counts
from tinyonn.experts.assign import assign
from tinyonn.experts.cuts import (
    ALL,
    NONE,
    ONE_GROUP,
    UInt32,
    UInt64,
    count_groups,
    exact_cuts,
    keys_of,
    row_cuts,
)
from tinyonn.experts.options import SelectOptions, TensorCuts
from tinyonn.experts.scores import core_ranks, score_named
from tinyonn.experts.source import Band, Source, check_labels
from tinyonn.sizes import MiB
from tinyonn.store.arrays import bands
from tinyonn.store.records import UInt8, UInt16, dither_bits, dither_seed

HELD_BYTES = 192 * MiB  # of a tensor a task keeps, instead of reading it again for each pass
WEIGHT_BYTES = 4 + 2 + 1  # held of a weight
ONE_CELL = np.zeros((1, 1), np.uint8)
NO_RANKS = np.zeros((1, 1), np.uint16)


def cut_tensors(
    source: Source, tensors: tuple[tuple[Parameter, int, int], ...], options: SelectOptions
) -> list[TensorCuts]:
    """A task: the cuts of tensors of which so many weights are kept, so many of these in the core."""
    return [Cutter(source, *tensor, options).cuts() for tensor in tensors]


@dataclass(frozen=True)
class Part:
    """A band, ready to be cut.

    Attributes
    ----------
    first : int
        Number of its first row.
    keys : uint32 [rows, columns]
    ranks : uint16 [rows, columns], or [1, 1] without a core
    labels : uint8 [rows, columns], or [1, 1] without cells: that of all
    """

    first: int
    keys: UInt32
    ranks: UInt16
    labels: UInt8


Grouped = Callable[[], Iterator[tuple[Part, UInt8]]]


class TensorView:
    """A tensor as scores, core ranks and labels, band by band."""

    def __init__(
        self, source: Source, parameter: Parameter, options: SelectOptions, worth: str | None = None
    ) -> None:
        self.parameter = parameter
        self.seed = dither_seed(options.seed, "select", parameter.name)
        self.experts = max(source.cells, 1)
        transposed = parameter.name in source.transposed
        self.by_row = int(options.within == "row" and not transposed)
        self.by_column = int(options.within == "row" and transposed)
        self._source = source
        self._name = worth or options.score
        score = score_named(self._name)
        self._score = score.prepare(source, parameter, options.settings)
        self._core = options.core_by if options.core > 0 and not worth else None
        self._ranks = core_ranks(source.attributes(parameter.name)) if self._core == "even" else None
        self.needs = score.needs
        if not worth:
            self.needs |= {"labels"} if source.cells else set()
            self.needs |= {"records", "affinity"} if self._core == "even" else set()

    def band(self, first: int, last: int) -> Band:
        """What the view needs of rows [first, last)."""
        return self._source.band(self.parameter.name, first, last, self.needs)

    def keys(self, band: Band) -> UInt32:
        """Of the score; refuses what is not a number."""
        keys, wrong = keys_of(self._score(band))
        if wrong:
            raise InputError(
                f"{self._name} of {wrong:,} weights of {self.parameter.name} is not a number (rows from {band.first} "
                "on); check the base model's weights, or choose another score"
            )
        return keys

    def part(self, band: Band) -> Part:
        """A band, ready to be cut."""
        keys = self.keys(band)
        ranks: UInt16 = NO_RANKS
        if self._core == "score":
            ranks = (keys >> np.uint32(16)).astype(np.uint16)
        elif self._ranks is not None:
            assert band.records is not None and band.affinity is not None
            ranks = np.empty(band.records.shape, np.uint16)
            _rank(band.records, band.affinity, self._ranks, ranks)
        labels: UInt8 = ONE_CELL if band.labels is None else band.labels
        check_labels(labels, self.experts, self.parameter.name)
        return Part(band.first, keys, ranks, labels)

    def groups(self, cuts: TensorCuts) -> Callable[[Band], UInt8]:
        """The groups of a band's weights, from the cuts: uint8 [rows, columns]."""
        return lambda band: self.assign(self.part(band), cuts)

    def assign(self, part: Part, cuts: TensorCuts) -> UInt8:
        """Groups of its weights: uint8 [rows, columns]."""
        out = np.empty(part.keys.shape, np.uint8)
        assign(
            *(part.keys, part.ranks, part.labels, part.first, np.uint64(self.seed)),
            *(cuts.cut, cuts.core_cut, cuts.cell_cut, self.by_row, self.by_column, self.experts, out),
        )
        return out


class Cutter:
    """Finds one tensor's cuts.

    Parameters
    ----------
    source : Source
    parameter : Parameter
    keep, core : int
        Weights that the tensor keeps, and how many of them in the core.
    options : SelectOptions
    held_bytes : int
        What may be kept in memory of the tensor.
    """

    def __init__(
        self,
        source: Source,
        parameter: Parameter,
        keep: int,
        core: int,
        options: SelectOptions,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self.view = TensorView(source, parameter, options)
        self.keep, self.core, self.options = keep, core, options
        self.shape, self.weights = parameter.shape, parameter.size
        self.held: list[Part] | None = None
        # Without quantization a Conv1D's outputs lie across all bands.
        if self.view.by_column or WEIGHT_BYTES * parameter.size <= held_bytes:
            self.held = list(self._read())

    def cuts(self) -> TensorCuts:
        """The marked, then the core among them, then the cells."""
        outputs = {0: 1, 1: self.shape[0], 2: self.shape[1]}[self.view.by_row + 2 * self.view.by_column]
        k = self.view.experts
        nothing, no_cells = np.full(outputs, NONE), np.zeros(0, np.uint64)
        kept = np.zeros(k + 1, np.int64)
        found = TensorCuts(self._cut(None, self.keep, _keys), nothing, no_cells, kept)
        if self.core:
            marked = self._grouped(found)
            found = TensorCuts(found.cut, self._cut(marked, self.core, _ranks), no_cells, kept)
        if self.options.within != "cell" or self.options.balance < 1:
            kept = self._count(self._grouped(found))
        if self.options.within == "cell" and self.options.balance:
            everything = TensorCuts(found.cut, found.core_cut, np.full(k, ALL), kept)
            outside = self._grouped(everything)
            rest, there = self.keep - self.core, self._count(outside)[:k]
            kept = np.append(cell_counts(rest, self.options.balance, kept[:k], there), self.core)
            cell_cut = exact_cuts(
                partial(self._blocks, outside, _keys), kept[:k], self.view.seed, self.weights
            )
            found = TensorCuts(found.cut, found.core_cut, cell_cut, kept)
        assert kept.sum() == self.keep and kept[k] == self.core
        return TensorCuts(found.cut, found.core_cut, found.cell_cut, kept)

    def _read(self) -> Iterator[Part]:
        for first, last in bands(self.shape):
            yield self.view.part(self.view.band(first, last))

    def _grouped(self, cuts: TensorCuts) -> Grouped:
        """All bands with their groups, as often as asked for; assigned once if the tensor is held."""
        if self.held is None:
            return lambda: ((part, self.view.assign(part, cuts)) for part in self._read())
        kept = [(part, self.view.assign(part, cuts)) for part in self.held]
        return lambda: iter(kept)

    def _all(self) -> Iterator[tuple[Part, UInt8]]:
        """All bands, every weight in group 0."""
        for part in self._read() if self.held is None else self.held:
            yield part, ONE_GROUP

    def _blocks(
        self, grouped: Grouped, values: Callable[[Part], UInt32]
    ) -> Iterator[tuple[int, UInt32, UInt8]]:
        for part, groups in grouped():
            yield part.first * self.shape[1], values(part).reshape(-1), groups.reshape(-1)

    def _count(self, grouped: Grouped) -> np.ndarray:
        """Weights of every group: int64 [experts + 1]."""
        counts = np.zeros(256, np.int64)
        for _, groups in grouped():
            count_groups(groups.reshape(-1), counts)
        return counts[: self.view.experts + 1]

    def _cut(self, marked: Grouped | None, count: int, values: Callable[[Part], UInt32]) -> UInt64:
        """The cut, or the rows' cuts, that so many of the marked weights reach."""
        grouped = self._all if marked is None else marked
        if not (self.view.by_row or self.view.by_column):
            if marked is not None:
                grouped = partial(_as_one, marked)
            wanted = np.array([count])
            return exact_cuts(partial(self._blocks, grouped, values), wanted, self.view.seed, self.weights)
        return self._row_cuts(grouped, count, values)

    def _row_cuts(self, grouped: Grouped, count: int, values: Callable[[Part], UInt32]) -> UInt64:
        height, width = self.shape
        wanted = row_counts(count, height if self.view.by_row else width, self.view.seed)
        cuts = np.full(wanted.size, NONE)
        seed, zero, one = np.uint64(self.view.seed), np.uint64(0), np.uint64(1)
        across = np.uint64(width)
        if self.view.by_column:
            parts = [(values(part), _whole(groups, part)) for part, groups in grouped()]
            keys, groups = (
                np.ascontiguousarray(np.concatenate(arrays).T) for arrays in zip(*parts, strict=True)
            )
            row_cuts(keys, groups, zero, one, across, seed, wanted, cuts)
            return cuts
        for part, its in grouped():
            rows = slice(part.first, part.first + part.keys.shape[0])
            first = np.uint64(part.first * width)
            row_cuts(values(part), _whole(its, part), first, across, one, seed, wanted[rows], cuts[rows])
        return cuts


def row_counts(count: int, rows: int, seed: int) -> np.ndarray:
    """Weights of every row: the same, but one more in as many rows as the division leaves over, drawn by a hash."""
    counts = np.full(rows, count // rows, np.int64)
    hashes = np.empty(rows, np.uint64)
    _hash_rows(np.uint64(seed), hashes)
    counts[np.argsort(hashes, kind="stable")[: count % rows]] += 1
    return counts


@njit(nogil=True, cache=True)
def _hash_rows(seed: Any, out: Any) -> None:
    for row in range(out.size):
        out[row] = dither_bits(seed, np.uint64(row))


def _as_one(grouped: Grouped) -> Iterator[tuple[Part, UInt8]]:
    """The same with one group of all that are in any."""
    for part, groups in grouped():
        out = np.empty_like(groups)
        _merge_groups(groups.reshape(-1), out.reshape(-1))
        yield part, out


def _whole(groups: UInt8, part: Part) -> UInt8:
    return groups if groups.size > 1 else np.full(part.keys.shape, groups.reshape(-1)[0])


def _keys(part: Part) -> UInt32:
    return part.keys


def _ranks(part: Part) -> UInt32:
    return part.ranks.astype(np.uint32) << np.uint32(16)  # as `assign` reads them


@njit(nogil=True, cache=True)
def _merge_groups(groups: Any, out: Any) -> None:
    for i in range(groups.size):
        out[i] = np.uint8(255) if groups[i] == 255 else np.uint8(0)


@njit(nogil=True, cache=True)
def _rank(records: Any, affinity: Any, ranks: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = ranks[(records[i, j] & np.uint16(0xFFF0)) | np.uint16(affinity[i, j] & 15)]
