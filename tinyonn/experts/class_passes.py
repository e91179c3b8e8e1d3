"""Passes over a tensor's weights by class (``tinyonn.experts.classes``): counting, gathering, assigning.

What happens to all weights goes without a branch, which would be guessed wrong for many of them: numbers below 2^63
are compared by the sign of their difference, as a mask. Where the hash decides, a block's weights are noted first and
looked at afterwards. Blocks are slices, so that no index can be negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from tinyonn.experts.cuts import tie_hash

KIND = np.uint16(12)  # bits of a level, below those of the kind
LEVEL = np.uint16(0xFFF)
CORE, HASHED = np.uint16(0xFFFE), np.uint16(0xFFFF)  # no levels: in the core; where the hash decides
BLOCK = 4096  # weights among which those that tie are noted at once
ONE_LABEL = np.zeros(1, np.uint8)


@njit(nogil=True, cache=True)
def classify(records: Any, affinity: Any, classes: Any) -> None:
    """Classes of a band's weights.

    Parameters
    ----------
    records : uint16 [weights]
    affinity : uint8 [weights], or [0] where it does not matter
    classes : uint16 [weights], written
    """
    if affinity.size == 0:
        for i in range(records.size):
            classes[i] = records[i] & np.uint16(0xFFF0)
        return
    for i in range(records.size):
        classes[i] = (records[i] & np.uint16(0xFFF0)) | np.uint16(affinity[i] & np.uint8(15))


@njit(nogil=True, cache=True)
def count_classes(classes: Any, counts: Any) -> None:
    """Count weights by class: the sum of two tables, so that an increment need not wait for the one before.

    Parameters
    ----------
    classes : uint16 [weights]
    counts : uint32 [2, 65536], added to
    """
    whole = classes.size // 2 * 2
    for i in range(0, whole, 2):
        counts[0, classes[i]] += np.uint32(1)
        counts[1, classes[i + 1]] += np.uint32(1)
    if whole < classes.size:
        counts[0, classes[whole]] += np.uint32(1)


@njit(inline="always")
def _below(value: Any, limit: Any) -> Any:
    """All bits set if it is, or none: int64 from two uint64."""
    return np.int64(value - limit) >> 63


@njit(inline="always")
def _choose(classes: Any, labels: Any, what: Any, at: Any, chosen: Any) -> Any:
    """Note where `what` of the class is what it must be `at` the label, and give how many."""
    n = np.uint64(0)
    if labels.size > 1:
        for i in range(classes.size):
            chosen[n] = i
            n += np.uint64(what[classes[i]] == at[labels[i]])
        return int(n)
    wanted = at[labels[0]]
    for i in range(classes.size):
        chosen[n] = i
        n += np.uint64(what[classes[i]] == wanted)
    return int(n)


@njit(inline="always")
def _hash(chosen: Any, count: Any, first: Any, seed: Any, hashes: Any) -> None:
    for j in range(count):  # a loop of its own, which can go in vectors
        hashes[j] = np.uint32(tie_hash(first + np.uint64(chosen[j]), seed))


@njit(nogil=True, cache=True)
def count_tied(classes: Any, first: Any, seed: Any, tied: Any, least: Any, counts: Any) -> None:
    """Count those weights of some classes whose hash is not below `least`.

    Parameters
    ----------
    classes : uint16 [weights]
    first : uint64
        Index of the first.
    seed : uint64
    tied : bool [65536]
    least : uint64
    counts : int64 [65536], added to
    """
    chosen, hashes = np.empty(BLOCK, np.uint16), np.empty(BLOCK, np.uint32)
    at = np.ones(1, np.bool_)
    for begin in range(0, classes.size, BLOCK):
        its = classes[begin : begin + BLOCK]
        count = _choose(its, ONE_LABEL, tied, at, chosen)
        _hash(chosen, count, first + np.uint64(begin), seed, hashes)
        for j in range(count):
            counts[its[chosen[j]]] += 1 + _below(np.uint64(hashes[j]), least)


@njit(nogil=True, cache=True)
def gather(
    classes: Any,
    labels: Any,
    first: Any,
    seed: Any,
    what: Any,
    at: Any,
    kinds: Any,
    least: Any,
    below: Any,
    low: Any,
    high: Any,
    above: Any,
    out: Any,
) -> Any:
    """Find the hashes of each cell's weights at a level that lie in a range.

    Parameters
    ----------
    classes : uint16 [weights]
    labels : uint8 [weights], or [1]: that of all
    first : uint64
        Index of the first.
    seed : uint64
    what : uint16 [65536]
        Level of each class.
    at : uint16 [256]
        The level that is sought, by cell.
    kinds : uint16 [65536]
    least, below : uint64 [9]
        By kind: weights whose hash is outside [least, below) do not compete.
    low, high : uint64 [cells]
        The range, both ends in it.
    above : int64 [256], added to
        Those above the range.
    out : uint64 [weights], written
        ``label << 32 | hash``.

    Returns
    -------
    uint64, how many were written
    """
    chosen, hashes = np.empty(BLOCK, np.uint16), np.empty(BLOCK, np.uint32)
    same = np.full(BLOCK, labels[0], np.uint8)
    n = np.uint64(0)
    for begin in range(0, classes.size, BLOCK):
        its = classes[begin : begin + BLOCK]
        cells = labels[begin : begin + BLOCK] if labels.size > 1 else same
        count = _choose(its, cells if labels.size > 1 else labels, what, at, chosen)
        _hash(chosen, count, first + np.uint64(begin), seed, hashes)
        for j in range(count):
            h = np.uint64(hashes[j])
            label = cells[chosen[j]]
            kind = kinds[its[chosen[j]]]
            competes = _below(h, below[kind]) & ~_below(h, least[kind])
            above[label] -= competes & _below(high[label], h)
            out[n] = np.uint64(label) << np.uint64(32) | h
            n += np.uint64(competes & ~_below(h, low[label]) & ~_below(high[label], h) & 1)
    return n


@njit(nogil=True, cache=True)
def count_cells(
    classes: Any,
    labels: Any,
    first: Any,
    seed: Any,
    columns: Any,
    tied: Any,
    both: Any,
    marked: Any,
    core: Any,
    counts: Any,
) -> None:
    """Count weights outside the core by cell and level, those that are marked one column to the right.

    Parameters
    ----------
    classes, labels, first, seed : as of `gather`
    columns : uint16 [65536]
        Column of each class; the last where it is in the core or the hash decides.
    tied : uint16 [65536]
        1 where the hash decides.
    both : uint16 [65536]
        Kind and level of each class.
    marked, core : uint64 [9]
        Least hash of either, by kind.
    counts : uint32 [cells, columns], added to
        The last column is of no use.
    """
    chosen, hashes = np.empty(BLOCK, np.uint16), np.empty(BLOCK, np.uint32)
    same = np.full(BLOCK, labels[0], np.uint8)
    at = np.ones(1, np.uint16)
    last = np.uint64(counts.shape[1] - 1)
    for begin in range(0, classes.size, BLOCK):
        its = classes[begin : begin + BLOCK]
        cells = labels[begin : begin + BLOCK] if labels.size > 1 else same
        for i in range(its.size):
            counts[cells[i], columns[its[i]]] += np.uint32(1)
        count = _choose(its, ONE_LABEL, tied, at, chosen)
        _hash(chosen, count, first + np.uint64(begin), seed, hashes)
        for j in range(count):
            h = np.uint64(hashes[j])
            what = both[its[chosen[j]]]
            kind = what >> KIND
            column = np.uint64(np.int64(what & LEVEL) + 1 + _below(h, marked[kind]))
            outside = np.uint64(_below(h, core[kind]))
            column = column & outside | last & ~outside
            counts[cells[chosen[j]], column] += np.uint32(1)


@njit(nogil=True, cache=True)
def assign_classes(
    records: Any,
    affinity: Any,
    labels: Any,
    first: Any,
    seed: Any,
    what: Any,
    at: Any,
    both: Any,
    reached: Any,
    core: Any,
    number: Any,
    out: Any,
) -> None:
    """Put a band's weights into groups.

    Parameters
    ----------
    records : uint16 [weights]
    affinity : uint8 [weights], or [0] where it does not matter
    labels, first, seed : as of `gather`
    what : uint16 [65536]
        Level of each class, or `CORE`, or `HASHED`.
    at : uint16 [256]
        By cell, the lowest level of which any weights are kept.
    both : uint16 [65536]
        Kind and level of each class.
    reached : uint64 [256]
        By cell, ``level << 32 | hash`` that is to be reached.
    core : uint64 [9]
        Least hash in the core, by kind.
    number : uint8
        Of the core.
    out : uint8 [weights], written
    """
    chosen, hashes = np.empty(BLOCK, np.uint16), np.empty(BLOCK, np.uint32)
    room, level, wanted = np.empty(BLOCK, np.uint16), np.empty(BLOCK, np.uint16), np.empty(BLOCK, np.uint16)
    same = np.full(BLOCK, labels[0], np.uint8)
    for begin in range(0, records.size, BLOCK):
        groups = out[begin : begin + BLOCK]
        its = room[: groups.size]
        classify(records[begin : begin + BLOCK], affinity[begin : begin + BLOCK], its)
        cells = labels[begin : begin + BLOCK] if labels.size > 1 else same
        for i in range(its.size):
            level[i] = what[its[i]]
        for i in range(its.size):
            wanted[i] = at[cells[i]]
        for i in range(its.size):  # without a table, so that it can go in vectors
            dropped = np.uint8((np.int32(level[i]) - np.int32(wanted[i])) >> 31)  # all bits, or none
            outside = np.uint8((np.int32(level[i]) - np.int32(CORE)) >> 31)
            groups[i] = (cells[i] | dropped) & outside | number & ~outside
        n = np.uint64(0)
        for i in range(its.size):
            chosen[n] = i
            n += np.uint64((level[i] == wanted[i]) | (level[i] == HASHED))
        _hash(chosen, int(n), first + np.uint64(begin), seed, hashes)
        for j in range(int(n)):
            h = np.uint64(hashes[j])
            label = cells[chosen[j]]
            its_both = both[its[chosen[j]]]
            place = np.uint64(its_both & LEVEL) << np.uint64(32) | h
            dropped = np.uint8(_below(place, reached[label]))
            outside = np.uint8(_below(h, core[its_both >> KIND]))
            groups[chosen[j]] = (label | dropped) & outside | number & ~outside
