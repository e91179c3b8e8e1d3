"""One tensor's cuts from counts of its classes (``tinyonn.experts.classes``), with the bits of `exact_cuts`.

A pass counts the classes, from which the level follows that the cut lies in, and one over what ties there the hash; so
for the marked, for the core among them, and, counted by cell, for the cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tinyonn.dense.parameters import Parameter
from tinyonn.experts.allocation import Counts, cell_counts
from tinyonn.experts.class_passes import ONE_LABEL, count_cells, count_classes, count_tied, gather
from tinyonn.experts.classes import CLASSES, NEVER, Classes, ClassPart, Kinds, levels_of
from tinyonn.experts.cuts import DIGIT, GATHERED, NONE, UInt32, UInt64
from tinyonn.experts.options import SelectOptions, TensorCuts
from tinyonn.experts.source import Source
from tinyonn.sizes import MiB
from tinyonn.store.arrays import bands
from tinyonn.store.records import UInt16

HELD_BYTES = 192 * MiB  # of a tensor a task keeps, instead of reading it again for each pass
CLASS_BYTES = 2 + 1  # held of a weight: class and label
NOWHERE = 0xFFFF  # no level
TIED, SURE = 3, 6  # kinds from here on are tied with the cut, are above it
DEVIATIONS = 6.0  # from where a cut among hashes is expected, within which it is sought first


@dataclass(frozen=True)
class Among:
    """Which weights compete: of a class those whose hash lies in [least, below) of its kind.

    Attributes
    ----------
    kind : uint16 [65536]
    least, below : uint64 [9]
    """

    kind: UInt16
    least: UInt64
    below: UInt64


ALWAYS, BEYOND = np.zeros(9, np.uint64), np.full(9, NEVER)
EVERYTHING = Among(np.zeros(CLASSES, np.uint16), ALWAYS, BEYOND)


class ClassCutter:
    """Finds one tensor's cuts.

    Parameters
    ----------
    source : Source
    parameter : Parameter
    classes : Classes
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
        classes: Classes,
        keep: int,
        core: int,
        options: SelectOptions,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self.keep, self.core, self.options = keep, core, options
        self._source, self._parameter, self._classes = source, parameter, classes
        self._seed = np.uint64(classes.seed)
        self._held: list[ClassPart] | None = None
        if CLASS_BYTES * parameter.size <= held_bytes:
            self._held = list(self._read())

    def cuts(self) -> TensorCuts:
        """The marked, then the core among them, then the cells."""
        keys, ranks, k = self._classes.keys, self._classes.ranks, self._classes.experts
        nothing, no_cells, kept = np.full(1, NONE), np.zeros(0, np.uint64), np.zeros(k + 1, np.int64)
        there = self._count_classes()
        found = TensorCuts(self._one_cut(keys, there, self.keep, EVERYTHING), nothing, no_cells, kept)
        if self.core:
            assert ranks is not None
            kinds = self._classes.kinds(found)
            marked = Among(kinds.kind, kinds.marked, BEYOND)
            core_cut = self._one_cut(ranks, self._count_marked(kinds, there), self.core, marked)
            found = TensorCuts(found.cut, core_cut, no_cells, kept)
        kinds = self._classes.kinds(found)
        apart = self.options.within == "cell" and self.options.balance > 0
        # Within tensors levels do not matter: one for all, which has a column for what is marked and one for the rest.
        levels, level = levels_of(keys if apart else np.zeros_like(keys), there > 0)
        below = int(np.searchsorted(levels, found.cut[0] >> np.uint64(32), side="right")) if apart else 1
        counts = self._count_cells(kinds, level, levels.size)
        kept = np.append(counts[:, below:].sum(1), self.core)
        if not apart:
            assert kept.sum() == self.keep
            return TensorCuts(found.cut, found.core_cut, no_cells, kept)
        counts[:, max(below - 1, 0)] += counts[:, below]
        counts = np.delete(counts, below, axis=1)
        rest = self.keep - self.core
        kept[:k] = cell_counts(rest, self.options.balance, kept[:k], counts.sum(1))
        outside = Among(kinds.kind, ALWAYS, kinds.core)
        cell_cut = self._cuts(levels, level, counts, kept[:k], outside)
        return TensorCuts(found.cut, found.core_cut, cell_cut, kept)

    def _read(self) -> Iterator[ClassPart]:
        for first, last in bands(self._parameter.shape):
            band = self._source.band(self._parameter.name, first, last, self._classes.needs)
            yield self._classes.part(band)

    def _parts(self) -> Iterator[ClassPart]:
        return self._read() if self._held is None else iter(self._held)

    def _count_classes(self) -> Counts:
        counts = np.zeros((2, CLASSES), np.uint32)
        for part in self._parts():
            count_classes(part.classes, counts)
        return np.asarray(counts.sum(0, dtype=np.int64))

    def _count_marked(self, kinds: Kinds, there: Counts) -> Counts:
        """Marked weights of every class: int64 [65536]."""
        counts = np.where(kinds.kind >= SURE, there, 0)
        tied = (kinds.kind >= TIED) & (kinds.kind < SURE)
        for part in self._parts():
            count_tied(part.classes, np.uint64(part.first), self._seed, tied, kinds.marked[TIED], counts)
        return counts

    def _count_cells(self, kinds: Kinds, level: np.ndarray, levels: int) -> Counts:
        """Weights outside the core of every cell, by level, those that are marked one to the right.

        Returns
        -------
        int64 [experts, levels + 1]
        """
        counts = np.zeros((self._classes.experts, levels + 2), np.uint32)
        core, marked = kinds.cored(), kinds.kind >= SURE
        tied = kinds.hashed() | ((kinds.kind >= TIED) & ~marked & ~core)
        decided, both = tied.astype(np.uint16), kinds.withlevels_of(level)
        columns = np.where(core | tied, levels + 1, level + marked).astype(np.uint16)
        for part in self._parts():
            its = part.classes, part.labels, np.uint64(part.first), self._seed
            count_cells(*its, columns, decided, both, kinds.marked, kinds.core, counts)
        return counts[:, :-1].astype(np.int64)

    def _one_cut(self, keys: UInt32, counts: Counts, count: int, among: Among) -> UInt64:
        """The cut that so many of the weights reach, counted by class."""
        levels, level = levels_of(keys, counts > 0)
        counts = np.bincount(level, weights=counts, minlength=levels.size).astype(np.int64)
        return self._cuts(levels, level, counts[None], np.array([count]), among)

    def _cuts(
        self, levels: UInt32, level: np.ndarray, counts: Counts, wanted: Counts, among: Among
    ) -> UInt64:
        """`exact_cuts` from counts: the same bits, and so the same order of finding them.

        Parameters
        ----------
        levels : uint32 [levels]
            Keys, ascending.
        level : int64 [65536]
            Of every class.
        counts : int64 [groups, levels]
        wanted : int64 [groups]
        among : Among
        """
        cuts = np.full(wanted.size, NONE)
        undecided = wanted > 0
        drop, doubtful = 32, GATHERED if self._parameter.size <= GATHERED else GATHERED + 1
        while undecided.any() and doubtful > GATHERED and drop:
            drop -= DIGIT
            digits, its, need = _reached(levels >> np.uint32(drop), counts, wanted)
            done = undecided & (its == need)
            cuts[done] = digits[done].astype(np.uint64) << np.uint64(32 + drop)
            undecided &= ~done
            doubtful = int(its[undecided].sum())
        if not undecided.any():
            return cuts
        keys, its, need = _reached(levels, counts, wanted)
        at = np.searchsorted(levels, keys)
        hashes = self._hash_cuts(level, at, its, need, undecided, among, doubtful > GATHERED)
        cuts[undecided] = (keys.astype(np.uint64) << np.uint64(32) | hashes)[undecided]
        return cuts

    def _hash_cuts(
        self,
        level: np.ndarray,
        at: np.ndarray,
        its: Counts,
        need: Counts,
        undecided: np.ndarray,
        among: Among,
        rounded: bool,
    ) -> UInt64:
        """The hashes that so many of each group's weights at one level reach.

        Hashes are spread evenly, so a cut lies near its quantile: only what is near is sorted, the rest counted.
        """
        groups = at.size
        found = np.zeros(groups, np.uint64)
        spread = DEVIATIONS
        while undecided.any():
            low, high = _windows(its, need, spread)
            above = np.zeros(256, np.int64)
            near = self._near(level, np.where(undecided, at, NOWHERE - 1), among, low, high, above)
            for group in np.flatnonzero(undecided):
                first, last = np.searchsorted(
                    near, np.uint64(group) + np.arange(2, dtype=np.uint64) << np.uint64(32)
                )
                own = near[first:last] & np.uint64(0xFFFFFFFF)
                rank = own.size + above[group] - need[group]
                if 0 <= rank < own.size:
                    digit = own[rank] >> np.uint64(DIGIT) << np.uint64(DIGIT)
                    lowest = rounded and (rank == 0 or own[rank - 1] < digit)
                    found[group] = digit if lowest else own[rank]
                    undecided = undecided & (np.arange(groups) != group)
            assert spread < 1 << 40, f"{need[undecided]} weights wanted, fewer than {its[undecided]} there"
            spread *= 8  # in the end, that is all of them
        return found

    def _near(
        self, level: np.ndarray, at: np.ndarray, among: Among, low: UInt64, high: UInt64, above: Counts
    ) -> UInt64:
        """Hashes of each group's weights at its level, from `low` to `high`: ``label << 32 | hash``, sorted.

        `above` counts, by label, those that are above.
        """
        groups = at.size
        if groups == 1:
            level, at = level == at[0], np.ones(1, np.int64)
        possible = among.least[among.kind] < among.below[among.kind]
        what = np.where(possible, level, NOWHERE).astype(np.uint16)
        wanted = np.full(256, NOWHERE - 1, np.uint16)
        wanted[:groups] = at
        found = []
        for part in self._parts():
            out = np.empty(part.classes.size, np.uint64)
            labels = part.labels if groups > 1 else ONE_LABEL
            n = gather(
                *(part.classes, labels, np.uint64(part.first), self._seed, what, wanted),
                *(among.kind, among.least, among.below, low, high, above, out),
            )
            found.append(out[:n].copy())
        return np.sort(np.concatenate(found))


def _windows(its: Counts, need: Counts, spread: float) -> tuple[UInt64, UInt64]:
    """Hashes between which that which `need` of `its` weights reach lies, within so many standard deviations."""
    share = 1 - need / np.maximum(its, 1)
    width = spread * (np.sqrt(share * (1 - share) / np.maximum(its, 1)) + 4 / np.maximum(its, 1))
    # From the start of a digit on: where cuts are rounded to one, all that is in it is looked at.
    low = np.floor((share - width).clip(0, 1) * (1 << DIGIT)).clip(0, (1 << DIGIT) - 1) * (1 << DIGIT)
    high = np.floor((share + width).clip(0, 1) * float(NEVER)).clip(0, float(NEVER) - 1)
    return low.astype(np.uint64), high.astype(np.uint64)


def _reached(digits: UInt32, counts: Counts, wanted: Counts) -> tuple[UInt32, Counts, Counts]:
    """Of each group, the digit that its cut lies in, the weights with this digit, and how many of these reach it.

    Parameters
    ----------
    digits : uint32 [n]
        Ascending; neighbours may be equal.
    counts : int64 [groups, n]
    wanted : int64 [groups]
    """
    starts = np.flatnonzero(np.append(True, digits[1:] != digits[:-1]))
    sums = np.add.reduceat(counts, starts, axis=1)[:, ::-1]
    reaching = np.cumsum(sums, axis=1)
    above = (reaching < wanted[:, None]).sum(1)
    assert (above < starts.size).all(), f"{wanted} weights wanted, {reaching[:, -1]} there"
    rows = np.arange(wanted.size)
    its = sums[rows, above]
    return digits[starts[::-1][above]], its, wanted - (reaching[rows, above] - its)
