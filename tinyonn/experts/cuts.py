"""Exact cuts: the threshold that exactly so many weights of a group reach, found by histograms.

A weight's *place* is a 64-bit integer, ``key << 32 | hash``: the key orders like the score, the hash breaks ties. It is
a bijection of the weight's index in its tensor, seeded by the tensor's name, so no two weights of a tensor share a
place, whatever the bands, threads or engine. A weight reaches a cut if its place is not below it. The cut is found 16
bits at a time, and sorted out as soon as the weights that are left in doubt are few (`GATHERED`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numba import njit

from tinyonn.experts.source import Float32
from tinyonn.store.records import UInt8

UInt32 = np.ndarray[Any, np.dtype[np.uint32]]
UInt64 = np.ndarray[Any, np.dtype[np.uint64]]

NONE = np.uint64(2**64 - 1)  # a cut that no weight reaches: its key would be that of a NaN
ALL = np.uint64(0)
DIGIT = 16
GATHERED = 1 << 22  # places that are sorted out at once
OUT = 255  # in no group
ONE_GROUP = np.zeros(1, np.uint8)

# Flat index of the first weight, keys and groups, flat; each call goes through all once more. Weights in groups beyond
# those that are cut do not count. A single group is that of all the block's weights.
Blocks = Callable[[], Iterator[tuple[int, UInt32, UInt8]]]


def keys_of(scores: Float32) -> tuple[UInt32, int]:
    """Integers that order like float32 scores (−0 as 0), and how many scores are not numbers."""
    keys = np.empty(scores.shape, np.uint32)
    wrong = _keys(scores.reshape(-1).view(np.uint32), keys.reshape(-1))
    return keys, int(wrong)


def exact_cuts(blocks: Blocks, wanted: np.ndarray, seed: int, weights: int) -> UInt64:
    """For every group, the cut that exactly so many of its weights reach.

    Parameters
    ----------
    blocks : callable
        Gives the weights anew at every call, in any cut into blocks.
    wanted : int64 [groups]
        At most as many as the group has; up to 255 groups.
    seed : int
        Of the hash.
    weights : int
        How many there are in all blocks, at most; few are sorted out at once.

    Returns
    -------
    uint64 [groups]
        `NONE` where no weight is wanted.
    """
    search = _Search(wanted, seed)
    shift = 64
    if weights <= GATHERED:
        for _, keys, its in blocks():
            if its.size == 1:
                search.doubtful[its[0]] += keys.size
            else:
                count_groups(its, search.doubtful)
        search.sort_out(blocks, shift)
    while search.open.any():
        shift -= DIGIT
        search.narrow(blocks, shift)
        if search.doubtful[search.open].sum() <= GATHERED:
            search.sort_out(blocks, shift)
    return search.cuts


class _Search:
    """The groups' cuts as far as they are known.

    Attributes
    ----------
    cuts : uint64 [groups]
    open : bool [256]
        Groups whose cut is not known yet.
    prefix : uint64 [256]
        Its upper bits, as far as they are known.
    need : int64 [256]
        How many weights reach it of those that share these bits.
    doubtful : int64 [256]
        How many share them.
    """

    def __init__(self, wanted: np.ndarray, seed: int) -> None:
        self.cuts = np.full(wanted.size, NONE, np.uint64)
        self.open = np.zeros(256, np.bool_)
        self.open[: wanted.size] = wanted > 0
        self.prefix = np.zeros(256, np.uint64)
        self.need = np.zeros(256, np.int64)
        self.need[: wanted.size] = wanted
        self.doubtful = np.zeros(256, np.int64)
        self._seed = np.uint64(seed)

    def narrow(self, blocks: Blocks, shift: int) -> None:
        """Find the bits from `shift` up."""
        counts = np.zeros((self.cuts.size + 1, 1 << DIGIT), np.uint32)
        for first, keys, its in blocks():
            _count(keys, its, np.uint64(first), self._seed, np.uint64(shift), self.prefix, self.open, counts)
        for group in np.flatnonzero(self.open):
            reaching = np.cumsum(counts[group, ::-1], dtype=np.int64)
            need = self.need[group]
            above = int(np.searchsorted(reaching, need))  # digits above the one that the cut lies in
            assert above < reaching.size, f"{need} weights wanted, {reaching[-1]} there"
            digit = np.uint64((1 << DIGIT) - 1 - above)
            self.prefix[group] = self.prefix[group] << np.uint64(DIGIT) | digit
            self.doubtful[group] = counts[group, digit]
            self.need[group] = need - (reaching[above] - self.doubtful[group])
            if self.need[group] == self.doubtful[group]:
                self.cuts[group] = self.prefix[group] << np.uint64(shift)
                self.open[group] = False

    def sort_out(self, blocks: Blocks, shift: int) -> None:
        """Gather what shares the bits from `shift` up, and sort it."""
        ends = np.cumsum(np.where(self.open, self.doubtful, 0))
        filled = np.concatenate([[0], ends[:-1]])
        places = np.empty(int(ends[-1]), np.uint64)
        for first, keys, its in blocks():
            _gather(
                *(keys, its, np.uint64(first), self._seed, np.uint64(shift), self.prefix, self.open),
                *(filled, places),
            )
        for group in np.flatnonzero(self.open):
            its_places = places[ends[group] - self.doubtful[group] : ends[group]]
            rank = its_places.size - int(self.need[group])
            assert rank >= 0, f"{self.need[group]} weights wanted, {its_places.size} there"
            its_places.partition(rank)
            self.cuts[group] = its_places[rank]
        self.open[:] = False


@njit(inline="always")
def tie_hash(index: Any, seed: Any) -> Any:
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
def _count(
    keys: Any, groups: Any, first: Any, seed: Any, shift: Any, prefix: Any, undecided: Any, counts: Any
) -> None:
    """Count the 16 bits from `shift` up, for each group; the last row of `counts` takes what is in none."""
    low = np.uint64(0xFFFF)
    grouped = int(groups.size > 1)
    if shift == np.uint64(48):
        rows = np.full(256, counts.shape[0] - 1, np.uint16)
        for group in range(256):
            if undecided[group]:
                rows[group] = group
        for i in range(keys.size):  # without a branch, which would be guessed wrong for every third weight
            counts[rows[groups[i * grouped]], keys[i] >> np.uint32(16)] += np.uint32(1)
        return
    known = np.uint64(48) - shift
    whole = _known_keys(prefix, undecided, known)
    drop = np.uint64(32) - min(known, np.uint64(32))
    for i in range(keys.size):
        group = groups[i * grouped]
        if np.uint64(keys[i]) >> drop != whole[group]:
            continue
        place = np.uint64(keys[i]) << np.uint64(32)
        if shift < np.uint64(32):
            place |= tie_hash(first + np.uint64(i), seed)
            if place >> (shift + np.uint64(16)) != prefix[group]:
                continue
        counts[group, (place >> shift) & low] += np.uint32(1)


@njit(nogil=True, cache=True)
def _known_keys(prefix: Any, undecided: Any, known: Any) -> Any:
    """Of each group, what the upper bits of a key must be, as far as they are known; no key's for a decided group."""
    whole = np.full(256, np.uint64(1) << np.uint64(63), np.uint64)
    beyond = known - min(known, np.uint64(32))
    for group in range(256):
        if undecided[group]:
            whole[group] = prefix[group] >> beyond
    return whole


@njit(nogil=True, cache=True)
def _gather(
    keys: Any,
    groups: Any,
    first: Any,
    seed: Any,
    shift: Any,
    prefix: Any,
    undecided: Any,
    filled: Any,
    places: Any,
) -> None:
    """Put the places that share their group's prefix where `filled` says."""
    grouped = int(groups.size > 1)
    known = np.uint64(64) - shift
    whole = _known_keys(prefix, undecided, known)
    drop = np.uint64(32) - min(known, np.uint64(32))
    for i in range(keys.size):
        group = groups[i * grouped]
        if np.uint64(keys[i]) >> drop != whole[group]:
            continue
        place = np.uint64(keys[i]) << np.uint64(32) | tie_hash(first + np.uint64(i), seed)
        if shift < np.uint64(32) and place >> shift != prefix[group]:
            continue
        places[filled[group]] = place
        filled[group] += 1


@njit(nogil=True, cache=True)
def row_cuts(
    keys: Any, groups: Any, first: Any, across: Any, along: Any, seed: Any, wanted: Any, cuts: Any
) -> None:
    """`exact_cuts` of every row by itself.

    Parameters
    ----------
    keys : uint32 [rows, columns]
    groups : uint8 [rows, columns]
        `OUT`: not counted.
    first, across, along : uint64
        Index in the tensor of the first weight; what a row and what a column adds.
    seed : uint64
    wanted : int64 [rows]
    cuts : uint64 [rows], written
    """
    places = np.empty(keys.shape[1], np.uint64)
    for i in range(keys.shape[0]):
        n = 0
        for j in range(keys.shape[1]):
            if groups[i, j] != OUT:
                index = first + np.uint64(i) * across + np.uint64(j) * along
                places[n] = np.uint64(keys[i, j]) << np.uint64(32) | tie_hash(index, seed)
                n += 1
        if wanted[i] == 0:
            cuts[i] = NONE
        elif wanted[i] == n:
            cuts[i] = ALL
        else:
            rank = n - wanted[i]
            cuts[i] = np.partition(places[:n], rank)[rank]


@njit(nogil=True, cache=True)
def count_groups(groups: Any, counts: Any) -> None:
    """Count weights by group: uint8 [n], int64 [256]."""
    for i in range(groups.size):
        counts[groups[i]] += 1
