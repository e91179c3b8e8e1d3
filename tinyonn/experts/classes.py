"""Classes of weights: where the score is a table of codes, what becomes of a weight follows from its class, mostly.

A weight's *class* is ``12-bit code << 4 | selectivity``; its key and its rank for the core are functions of it. Only
where it ties with a cut does its hash decide: weights of a class reach a cut whatever their hash (the class is above
it), with the cut's own hash or a higher one (it ties), or never. So to a tensor's cut and its core's, a class is of one
of nine kinds.

The cuts (``tinyonn.experts.class_cuts``) and groups are those of ``tinyonn.experts.cutting``, which takes any score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyonn.dense.parameters import Parameter
from tinyonn.experts.class_passes import CORE, HASHED, KIND, ONE_LABEL, assign_classes, classify
from tinyonn.experts.cuts import UInt32, UInt64, keys_of
from tinyonn.experts.options import CORES, SelectOptions, TensorCuts
from tinyonn.experts.scores import core_ranks, score_named
from tinyonn.experts.source import Band, Source, check_labels
from tinyonn.store.records import UInt8, UInt16, dither_seed

CLASSES = 1 << 16
NO_KEY = np.uint32(0xFFFFFFFF)
NEVER = np.uint64(1 << 32)  # above all hashes


@dataclass(frozen=True)
class ClassPart:
    """A band as classes, flat.

    Attributes
    ----------
    first : int
        Index of its first weight in the tensor.
    classes : uint16 [weights]
    labels : uint8 [weights], or [1] without cells: that of all
    """

    first: int
    classes: UInt16
    labels: UInt8


@dataclass(frozen=True)
class Classes:
    """What classes of a tensor mean.

    Attributes
    ----------
    name : str
    keys : uint32 [65536]
        Of the score, by class.
    ranks : uint32 [65536], or None without a core
        Of standing high in every slice, as keys.
    experts : int
    seed : int
        Of the hash.
    needs : frozenset of str
        What a band must hold.
    """

    name: str
    keys: UInt32
    ranks: UInt32 | None
    experts: int
    seed: int
    needs: frozenset[str]

    @classmethod
    def of(cls, source: Source, parameter: Parameter, options: SelectOptions) -> Classes | None:
        """None if the score is not a table of codes, or not a number for every code, or rows compete."""
        table = score_named(options.score).table
        if table is None or options.within == "row":
            return None
        attributes = source.attributes(parameter.name)
        keys, wrong = keys_of(table(attributes, options.settings))
        if wrong:
            return None
        keys = np.repeat(keys, 16)
        by_score, even = (options.core > 0 and options.core_by == by for by in CORES)
        ranks = core_ranks(attributes).astype(np.uint32) << np.uint32(16) if even else None
        ranks = keys >> np.uint32(16) << np.uint32(16) if by_score else ranks
        seed = dither_seed(options.seed, "select", parameter.name)
        needs = frozenset({"records"} | {"labels"} if source.cells else {"records"})
        needs |= {"affinity"} if even else set()
        return cls(parameter.name, keys, ranks, max(source.cells, 1), seed, needs)

    def part(self, band: Band) -> ClassPart:
        """Classes of a band's weights."""
        assert band.records is not None
        records = band.records.reshape(-1)
        classes = np.empty(records.size, np.uint16)
        classify(records, self._affinity(band), classes)
        return ClassPart(band.first * band.records.shape[1], classes, self._labels(band))

    def _affinity(self, band: Band) -> UInt8:
        """Empty where it does not matter."""
        if "affinity" not in self.needs:
            return np.zeros(0, np.uint8)
        assert band.affinity is not None
        return band.affinity.reshape(-1)

    def _labels(self, band: Band) -> UInt8:
        labels: UInt8 = ONE_LABEL if band.labels is None else band.labels.reshape(-1)
        check_labels(labels, self.experts, self.name)
        return labels

    def groups(self, cuts: TensorCuts) -> Callable[[Band], UInt8]:
        """The groups of a band's weights, from the cuts: uint8 [rows, columns]."""
        kinds = self.kinds(cuts)
        levels, level = levels_of(self.keys, np.ones(CLASSES, np.bool_))
        what = np.where(kinds.hashed(), HASHED, np.where(kinds.cored(), CORE, level)).astype(np.uint16)
        both = kinds.withlevels_of(level)
        cell_cut = cuts.cell_cut if cuts.cell_cut.size else np.full(self.experts, cuts.cut[0])
        high = (cell_cut >> np.uint64(32)).astype(np.uint32)
        at, reached = np.zeros(256, np.uint16), np.zeros(256, np.uint64)
        at[: self.experts] = np.searchsorted(levels, high)
        tied = np.append(levels, NO_KEY)[at[: self.experts]] == high
        least = np.where(tied, cell_cut & np.uint64(0xFFFFFFFF), np.uint64(0))
        reached[: self.experts] = at[: self.experts].astype(np.uint64) << np.uint64(32) | least

        def of_band(band: Band) -> UInt8:
            assert band.records is not None
            records = band.records.reshape(-1)
            first = np.uint64(band.first * band.records.shape[1])
            out = np.empty(band.records.shape, np.uint8)
            assign_classes(
                *(records, self._affinity(band), self._labels(band), first, np.uint64(self.seed), what, at),
                *(both, reached, kinds.core, np.uint8(self.experts), out.reshape(-1)),
            )
            return out

        return of_band

    def kinds(self, cuts: TensorCuts) -> Kinds:
        """Which classes are marked and in the core."""
        marked, least = _sides(self.keys, cuts.cut[0])
        # Without a core, no rank reaches its cut.
        cored, core_least = _sides(self.keys if self.ranks is None else self.ranks, cuts.core_cut[0])
        pairs = np.repeat(least, 3), np.maximum(np.repeat(least, 3), np.tile(core_least, 3))
        return Kinds(marked * np.uint16(3) + cored, *pairs)


@dataclass(frozen=True)
class Kinds:
    """Where classes stand to the tensor's cut and to the core's.

    Attributes
    ----------
    kind : uint16 [65536]
        3 × marked + cored, each 0: below the cut, 1: tied with it, 2: above.
    marked, core : uint64 [9]
        The least hash with which a weight of the kind is marked, is in the core.
    """

    kind: UInt16
    marked: UInt64
    core: UInt64

    def withlevels_of(self, levels: np.ndarray) -> UInt16:
        """Both in one table, by class: ``kind << 12 | level``."""
        return self.kind << KIND | levels.astype(np.uint16)

    def cored(self) -> np.ndarray:
        """Classes that are in the core whatever the hash: bool [65536]."""
        return np.asarray(self.core[self.kind] == 0)

    def hashed(self) -> np.ndarray:
        """Classes of which the hash decides whether they are in the core: bool [65536]."""
        return np.asarray((self.core[self.kind] != 0) & (self.core[self.kind] != NEVER))


def levels_of(keys: UInt32, there: np.ndarray) -> tuple[UInt32, np.ndarray]:
    """The different keys of what is there, ascending, and for every class where its key is, or would be."""
    levels = np.unique(keys[there])
    return levels, np.minimum(np.searchsorted(levels, keys), levels.size - 1)


def _sides(keys: UInt32, cut: Any) -> tuple[UInt16, UInt64]:
    """Which keys are below (0), at (1) and above (2) a cut's, and the least hashes with which these reach it."""
    high = np.uint32(cut >> np.uint64(32))
    least = np.array([NEVER, cut & np.uint64(0xFFFFFFFF), 0], np.uint64)
    return (keys >= high).astype(np.uint16) + (keys > high), least
