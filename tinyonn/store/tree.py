"""The order of merging and dealing: pure functions of the manifest and of the set of live segments.

The segments of a slice are the leaves of a tree that is drawn before the first of them exists (where the corpus
grew later: of a chain of such trees). A node can be
merged when all its children are live; its dithering is seeded by its own name. So whatever the order of
commits and the moments of merging, the records of a node are a function of its leaves.

Among all trees that, filled from left to right, never leave more than ``max_live`` nodes, the one with the
smallest rounding error is taken: every merge rounds once, an error of variance ``v`` in a node that holds a
share ``s`` of the samples adds ``v s^2`` to the result, so the tree minimises the sum of
``s^2 + MERGE_COST`` over its inner nodes (docs/decisions/002-merge-tree.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tinyonn.store.manifest import Manifest, Segment

# A merge rewrites whole tensors however few samples they stand for: worth 1 % of one rounding of the result.
MERGE_COST = 0.01


@dataclass(frozen=True)
class Node:
    """A range [first, last) of leaves; a leaf has no children."""

    first: int
    last: int
    children: tuple[Node, ...] = ()

    @property
    def depth(self) -> int:
        """Merges between a leaf and this node, at most."""
        return 1 + max(child.depth for child in self.children) if self.children else 0

    def inner(self) -> Iterator[Node]:
        """All nodes with children, children before their parent."""
        for child in self.children:
            yield from child.inner()
        if self.children:
            yield self


@dataclass(frozen=True)
class Merge:
    """Children of one slice, in order, and the segment that takes their place.

    `final` marks a slice's last merge, whose result is not averaged again within the slice unless that grows.
    """

    children: tuple[Segment, ...]
    merged: Segment
    final: bool


def merge_tree(count: int, max_live: int) -> Node:
    """The tree over `count` leaves with the least rounding error, given the bound on live nodes.

    Filled in order, with every node merged as soon as its children are there, at most `max_live` nodes are
    left after each leaf; while a merge runs its children are live beside.

    Parameters
    ----------
    count : int
        Leaves, at least 1.
    max_live : int
        At least 1; 1 gives a chain.
    """
    if count < 1 or max_live < 1:
        raise ValueError(
            f"a merge tree needs at least one leaf and one live node, got {count} and {max_live}"
        )
    return _build(0, count, max_live, _heads(count, max_live))


@lru_cache(maxsize=32)
def _heads(count: int, max_live: int) -> tuple[tuple[int, ...], ...]:
    """First child's size of the best sequence of siblings, for each number of free places and of leaves.

    A tree over n leaves with m places costs its own rounding and merge, and its children, of which child j
    has m - j places. Siblings over n leaves are a tree over the first k and siblings over the rest with one
    place less.
    """
    own = (np.arange(count + 1) / count) ** 2 + MERGE_COST
    # With no place left only a single leaf fits: it completes its parent at once.
    siblings = np.where(np.arange(count + 1) <= 1, 0.0, np.inf)
    heads = [tuple(range(count + 1))]
    for _ in range(max_live):
        tree, rest = np.zeros(count + 1), siblings
        siblings = np.zeros(count + 1)
        head = np.zeros(count + 1, dtype=np.int64)
        for n in range(2, count + 1):
            split = tree[1:n] + rest[n - 1 : 0 : -1]
            best = int(np.argmin(split))
            head[n] = best + 1
            siblings[n] = split[best]
            tree[n] = own[n] + split[best]
        heads.append(tuple(int(item) for item in head))
    return tuple(heads)


def _build(first: int, count: int, places: int, heads: tuple[tuple[int, ...], ...]) -> Node:
    if count == 1:
        return Node(first, first + 1)
    children: list[Node] = []
    last, left = first + count, places
    while first < last:
        size = heads[left][last - first] if last - first > 1 else 1
        children.append(_build(first, size, left, heads))
        first += size
        left -= 1
    return Node(last - count, last, tuple(children))


def merges(manifest: Manifest, slice: str) -> Iterator[tuple[tuple[int, int], tuple[tuple[int, int], ...]]]:
    """Sample ranges of every inner node of the slice's tree and of its children, children's merges first.

    What came when the corpus grew has a tree of its own, with one live node less for what stands before it; its root
    is merged with all that. So a tree that was merged before stays a part of the new one.
    """
    for place, part in enumerate(manifest.parts(slice)):
        leaves = manifest.leaves_of(slice, part)
        room = max(1, manifest.max_live - (place > 0))
        for node in merge_tree(len(leaves), room).inner():
            yield _span(leaves, node), tuple(_span(leaves, child) for child in node.children)
        if place > 0:
            yield (0, part[1]), ((0, part[0]), part)


def is_final(manifest: Manifest, slice: str, span: tuple[int, int]) -> bool:
    """Whether a range is all that the slice has, had before it grew, or got in growing: rounded to the nearest."""
    parts = manifest.parts(slice)
    return span in parts or span in [(0, last) for _, last in parts]


def _span(leaves: list[Segment], node: Node) -> tuple[int, int]:
    return leaves[node.first].first, leaves[node.last - 1].last


def ready_merges(manifest: Manifest, live: list[Segment]) -> list[Merge]:
    """Merges whose children are all live; a function of the set of live segments alone."""
    ready: list[Merge] = []
    places = {(segment.slice, segment.range): segment for segment in live}
    for name in manifest.slices:
        for span, parts in merges(manifest, name):
            children = tuple(places[name, part] for part in parts if (name, part) in places)
            if len(children) == len(parts):
                ready.append(Merge(children, _union(name, span, children), is_final(manifest, name, span)))
    return ready


def _union(slice: str, span: tuple[int, int], children: tuple[Segment, ...]) -> Segment:
    samples = sum(child.samples for child in children)
    return Segment(slice, *span, samples, tuple(item for child in children for item in child.set_aside))


def next_segment(
    manifest: Manifest, live: list[Segment], in_flight: list[Segment], workers: int
) -> Segment | None:
    """The segment to deal next, so that at most ``max_live + workers`` of a slice are ever live.

    Slices advance together, each in order and at most `workers` leaves beyond its first gap. When all slices
    wait for a gap, the segment that is missing is dealt a second time: whoever finishes first commits it, the
    other's copy has the same bits and is dropped. So a slow worker holds up nobody.

    Parameters
    ----------
    manifest : Manifest
    live : list of Segment
        Committed and live.
    in_flight : list of Segment
        Dealt and not yet committed, duplicates included.
    workers : int

    Returns
    -------
    Segment or None
        None when all is committed, or all that is missing is dealt twice already.
    """
    fresh: list[tuple[float, Segment]] = []
    gaps: list[tuple[int, float, Segment]] = []
    dealt = [segment.name for segment in in_flight]
    for name in manifest.slices:
        held = [segment for segment in live if segment.slice == name]
        leaves = manifest.leaves(name)
        missing = [leaf for leaf in leaves if not any(segment.contains(leaf) for segment in held)]
        if not missing:
            continue
        window = leaves[leaves.index(missing[0]) :][: workers + 1]
        open_leaves = [leaf for leaf in missing if leaf.name not in dealt]
        progress = 1 - len(open_leaves) / len(leaves)
        if open_leaves and open_leaves[0] in window:
            fresh.append((progress, open_leaves[0]))
        elif open_leaves:
            gaps.append((dealt.count(missing[0].name), progress, missing[0]))
    if fresh:
        return min(fresh, key=lambda item: item[0])[1]
    spare = [item for item in gaps if item[0] < 2]
    return min(spare, key=lambda item: item[:2])[2] if spare else None
