"""Exact cuts: the threshold that exactly so many weights of a tensor reach, found by histograms.

A weight's *order* is a 64-bit integer, ``key << 32 | hash``: the key orders like the score, the hash breaks ties. It is
a bijection of the weight's index in its tensor, seeded by the tensor's name, so no two weights of a tensor share an
order, whatever the bands, threads or engine. A weight reaches a cut if its order is not below it. The cut is found 16
bits at a time, and sorted out as soon as the weights that are left in doubt are few (`GATHERED`).

A tensor has two cuts: what reaches the first is kept, and what of it reaches the second, by the upper 16 bits of its
key and the hash, is its core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.score.scores import score_named
from tinyonn.score.source import DROPPED, Band, Float32, Source, check_labels
from tinyonn.select.selection import SelectOptions, TensorCuts
from tinyonn.show.sizes import MiB
from tinyonn.store.arrays import bands
from tinyonn.store.records import UInt8, dither_seed

UInt32 = np.ndarray[Any, np.dtype[np.uint32]]
Bool = np.ndarray[Any, np.dtype[np.bool_]]

NONE = np.uint64(2**64 - 1)  # a cut that no weight reaches: its key would be that of a NaN
DIGIT = 16
GATHERED = 1 << 22  # orders that are sorted out at once
HELD_BYTES = 192 * MiB  # of a tensor a task keeps, instead of reading it again for each pass
WEIGHT_BYTES = 4 + 1 + 1  # held of a weight: key, label, whether it is kept
CORE_KEY = np.uint32(0xFFFF0000)  # the bits of a key that say what is best for the core
ONE_CELL = np.zeros((1, 1), np.uint8)
EVERY = np.ones(1, np.bool_)

# Index of a block's first weight, keys, flat, and which of the weights count, or `EVERY`; each call goes through all
# once more.
Blocks = Callable[[], Iterator[tuple[int, UInt32, Bool]]]


def keys_of(scores: Float32) -> tuple[UInt32, int]:
    """Integers that order like float32 scores (−0 as 0), and how many scores are not numbers."""
    keys = np.empty(scores.shape, np.uint32)
    wrong = _keys(scores.reshape(-1).view(np.uint32), keys.reshape(-1))
    return keys, int(wrong)


def exact_cut(blocks: Blocks, count: int, seed: int, weights: int) -> np.uint64:
    """The cut that exactly so many weights reach.

    Parameters
    ----------
    blocks : callable
        Gives the weights anew at every call, in any cut into blocks.
    count : int
        At most as many as count in the blocks.
    seed : int
        Of the hash.
    weights : int
        How many there are in all blocks, at most; few are sorted out at once.

    Returns
    -------
    uint64
        `NONE` if `count` is 0.
    """
    if not count:
        return NONE
    prefix, shift, doubtful = 0, 64, weights
    while doubtful > GATHERED:
        shift -= DIGIT
        counts = np.zeros(1 << DIGIT, np.uint32)
        for first, keys, among in blocks():
            _count(
                keys, among, np.uint64(first), np.uint64(seed), np.uint64(shift), np.uint64(prefix), counts
            )
        reaching = np.cumsum(counts[::-1], dtype=np.int64)
        above = int(np.searchsorted(reaching, count))  # digits above the one that the cut lies in
        assert above < reaching.size, f"{count} weights wanted, {reaching[-1]} there"
        digit = (1 << DIGIT) - 1 - above
        prefix, doubtful = prefix << DIGIT | digit, int(counts[digit])
        count -= int(reaching[above]) - doubtful
        if count == doubtful:
            return np.uint64(prefix << shift)
    orders, filled = np.empty(doubtful, np.uint64), 0
    for first, keys, among in blocks():
        its = np.uint64(first), np.uint64(seed), np.uint64(shift), np.uint64(prefix)
        filled += _gather(keys, among, *its, orders[filled:])
    rank = filled - count
    assert rank >= 0, f"{count} weights wanted, {filled} there"
    return np.uint64(np.partition(orders[:filled], rank)[rank])


@dataclass(frozen=True)
class Part:
    """A band, ready to be cut.

    Attributes
    ----------
    first : int
        Number of its first row.
    keys : uint32 [rows, columns]
    labels : uint8 [rows, columns], or [1, 1] without cells: that of all
    """

    first: int
    keys: UInt32
    labels: UInt8


class TensorView:
    """A tensor as keys and labels, band by band; with a `worth`, as keys of that score alone."""

    def __init__(
        self, source: Source, parameter: Parameter, options: SelectOptions, worth: str | None = None
    ) -> None:
        self.parameter = parameter
        self.seed = dither_seed(options.seed, "select", parameter.name)
        self.experts = max(source.cells, 1)
        self._source = source
        self._name = worth or options.score
        score = score_named(self._name)
        self._score = score.prepare(source, parameter)
        self.needs = score.needs | ({"labels"} if source.cells and not worth else set())

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
        labels: UInt8 = ONE_CELL if band.labels is None else band.labels
        check_labels(labels, self.experts, self.parameter.name)
        return Part(band.first, self.keys(band), labels)

    def groups(self, band: Band, cuts: TensorCuts) -> UInt8:
        """The groups of a band's weights, from the cuts: uint8 [rows, columns]."""
        return self.assign(self.part(band), cuts)

    def assign(self, part: Part, cuts: TensorCuts) -> UInt8:
        """The same of a part."""
        out = np.empty(part.keys.shape, np.uint8)
        two = np.array([cuts.cut, cuts.core_cut], np.uint64)
        _assign(part.keys, part.labels, part.first, np.uint64(self.seed), two, self.experts, out)
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
        self.keep, self.core = keep, core
        self.shape, self.weights = parameter.shape, parameter.size
        self.held = list(self._read()) if WEIGHT_BYTES * parameter.size <= held_bytes else None

    def cuts(self) -> TensorCuts:
        """What is kept, then the core of it."""
        kept = np.zeros(self.view.experts + 1, np.int64)
        seed, weights = self.view.seed, self.weights
        cuts = TensorCuts(exact_cut(self._blocks, self.keep, seed, weights), NONE, kept)
        if self.core:
            core_cut = exact_cut(lambda: self._core_blocks(cuts.cut), self.core, seed, weights)
            cuts = TensorCuts(cuts.cut, core_cut, kept)
        counts = np.zeros(256, np.int64)
        for part in self._parts():
            _count_groups(self.view.assign(part, cuts).reshape(-1), counts)
        kept = counts[: self.view.experts + 1]
        assert kept.sum() == self.keep and kept[-1] == self.core
        return TensorCuts(cuts.cut, cuts.core_cut, kept)

    def _read(self) -> Iterator[Part]:
        for first, last in bands(self.shape):
            yield self.view.part(self.view.band(first, last))

    def _parts(self) -> Iterator[Part]:
        return self._read() if self.held is None else iter(self.held)

    def _blocks(self) -> Iterator[tuple[int, UInt32, Bool]]:
        for part in self._parts():
            yield part.first * self.shape[1], part.keys.reshape(-1), EVERY

    def _core_blocks(self, cut: np.uint64) -> Iterator[tuple[int, UInt32, Bool]]:
        """What the core is chosen by, of what is kept."""
        for part in self._parts():
            first, kept = part.first * self.shape[1], np.empty(part.keys.size, np.bool_)
            _mark(part.keys.reshape(-1), np.uint64(first), np.uint64(self.view.seed), cut, kept)
            yield first, (part.keys & CORE_KEY).reshape(-1), kept


def cut_tensors(
    source: Source, tensors: tuple[tuple[Parameter, int, int], ...], options: SelectOptions
) -> list[TensorCuts]:
    """A task: the cuts of tensors of which so many weights are kept, so many of these in the core."""
    return [Cutter(source, *tensor, options).cuts() for tensor in tensors]


@njit(inline="always")
def _tie_hash(index: Any, seed: Any) -> Any:
    """A bijection of 32-bit integers: two rounds of a multiply–xorshift hash, each after a half of the seed.

    The constants are Wellons' ``lowbias32`` (https://nullprogram.com/blog/2018/07/31/).
    """
    z = np.uint32(index) ^ np.uint32(seed & np.uint64(0xFFFFFFFF))
    for turn in range(2):
        z = np.uint32((z ^ (z >> np.uint32(16))) * np.uint32(0x21F0AAAD))
        z = np.uint32((z ^ (z >> np.uint32(15))) * np.uint32(0xD35A2D97))
        z = np.uint32(z ^ (z >> np.uint32(15)))
        if turn == 0:
            z = np.uint32(z ^ np.uint32(seed >> np.uint64(32)))
    return np.uint64(z)


@njit(nogil=True, cache=True)
def _keys(bits: Any, keys: Any) -> Any:
    wrong = 0
    for i in range(bits.size):
        positive = bits[i] & np.uint32(0x7FFFFFFF)
        wrong += positive > np.uint32(0x7F800000)
        negative = bits[i] != positive and positive != 0
        keys[i] = ~bits[i] if negative else positive | np.uint32(0x80000000)
    return wrong


@njit(nogil=True, cache=True)
def _count(keys: Any, among: Any, first: Any, seed: Any, shift: Any, prefix: Any, counts: Any) -> None:
    """Count the 16 bits from `shift` up of orders whose bits above are `prefix`."""
    step = int(among.size > 1)
    if shift == np.uint64(48):
        for i in range(keys.size):  # without a branch, which would be guessed wrong for every third weight
            counts[keys[i] >> np.uint32(16)] += np.uint32(among[i * step])
        return
    known = np.uint64(48) - shift
    drop = np.uint64(32) - min(known, np.uint64(32))
    key_prefix = prefix >> (known - min(known, np.uint64(32)))
    for i in range(keys.size):
        if np.uint64(keys[i]) >> drop != key_prefix or not among[i * step]:
            continue
        order = np.uint64(keys[i]) << np.uint64(32)
        if shift < np.uint64(32):
            order |= _tie_hash(first + np.uint64(i), seed)
            if order >> (shift + np.uint64(16)) != prefix:
                continue
        counts[(order >> shift) & np.uint64(0xFFFF)] += np.uint32(1)


@njit(nogil=True, cache=True)
def _gather(keys: Any, among: Any, first: Any, seed: Any, shift: Any, prefix: Any, orders: Any) -> Any:
    """Write the orders whose bits from `shift` up are `prefix`, and say how many."""
    step = int(among.size > 1)
    known = np.uint64(64) - shift
    drop = np.uint64(32) - min(known, np.uint64(32))
    key_prefix = prefix >> (known - min(known, np.uint64(32)))
    filled = 0
    for i in range(keys.size):
        if np.uint64(keys[i]) >> drop != key_prefix or not among[i * step]:
            continue
        order = np.uint64(keys[i]) << np.uint64(32) | _tie_hash(first + np.uint64(i), seed)
        if shift < np.uint64(32) and order >> shift != prefix:
            continue
        orders[filled] = order
        filled += 1
    return filled


@njit(inline="always")
def _reaches(key: Any, cut: Any, index: Any, seed: Any) -> Any:
    high = np.uint32(cut >> np.uint64(32))
    above = key > high
    if key == high:  # seldom; the rest goes without a branch
        above = _tie_hash(index, seed) >= (cut & np.uint64(0xFFFFFFFF))
    return above


@njit(nogil=True, cache=True)
def _mark(keys: Any, first: Any, seed: Any, cut: Any, out: Any) -> None:
    for i in range(keys.size):
        out[i] = _reaches(keys[i], cut, first + np.uint64(i), seed)


@njit(nogil=True, cache=True)
def _assign(keys: Any, labels: Any, first: Any, seed: Any, cuts: Any, core: Any, out: Any) -> None:
    """Put a band's weights into groups.

    Parameters
    ----------
    keys : uint32 [rows, columns]
    labels : uint8 [rows, columns], or [1, 1]: that of all
    first : int
        Number of the band's first row.
    seed : uint64
    cuts : uint64 [2]
        What is kept reaches the first, the core the second too.
    core : int
        Number of its group.
    out : uint8 [rows, columns], written
    """
    width = keys.shape[1]
    cut, core_cut = cuts[0], cuts[1]
    labelled = int(labels.size > 1)
    kept = np.empty(width, np.bool_)
    for i in range(keys.shape[0]):
        base = np.uint64((first + i) * width)
        its = labels[i * labelled]
        for j in range(width):
            kept[j] = _reaches(keys[i, j], cut, base + np.uint64(j), seed)
        for j in range(width):
            out[i, j] = its[j * labelled] if kept[j] else DROPPED
        if core_cut == NONE:
            continue
        for j in range(width):
            kept[j] &= _reaches(keys[i, j] & CORE_KEY, core_cut, base + np.uint64(j), seed)
        for j in range(width):
            out[i, j] = core if kept[j] else out[i, j]


@njit(nogil=True, cache=True)
def _count_groups(groups: Any, counts: Any) -> None:
    for i in range(groups.size):
        counts[groups[i]] += 1
