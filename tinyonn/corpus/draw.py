"""Which rows of a corpus are taken, and in which order: by shares and seeds alone."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyonn.config import DataConfig, MixedSource
from tinyonn.corpus.file import Int64


@dataclass(frozen=True)
class Group:
    """The part of a slice that comes from one source.

    Attributes
    ----------
    slice, source : int
        Numbers.
    rows : int64 [n]
        Places of its rows, ascending.
    """

    slice: int
    source: int
    rows: Int64


def find_groups(slices: Sequence[int], sources: Sequence[int]) -> list[Group]:
    """Group rows, given the numbers of each one's slice and source; by slice, then by source."""
    of_source = np.array(sources, np.int64)
    width = int(of_source.max(initial=0)) + 1
    keys = np.array(slices, np.int64) * width + of_source
    return [
        Group(int(key) // width, int(key) % width, np.flatnonzero(keys == key)) for key in np.unique(keys)
    ]


def stored_order(counts: Sequence[int], names: Sequence[str], seed: int) -> list[Int64]:
    """Shuffled positions 0..count-1 of each slice, by its name, its size and the seed alone."""
    return [
        np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(count).astype(np.int64)
        for count, name in zip(counts, names, strict=True)
    ]


def even_shares(sizes: Sequence[int], total: int | None) -> list[int]:
    """Split `total` over slices as evenly as their sizes allow; None takes all."""
    if total is None:
        return list(sizes)
    shares = [0] * len(sizes)
    left = min(total, sum(sizes))
    while left:
        open_places = [place for place, size in enumerate(sizes) if shares[place] < size]
        step = max(1, left // len(open_places))
        for place in open_places:
            given = min(step, sizes[place] - shares[place], left)
            shares[place] += given
            left -= given
    return shares


def group_shares(groups: Sequence[Group], sizes: Sequence[int], config: DataConfig) -> list[int]:
    """Rows to take of each group: at most what its source gives, of all together ``data.samples``.

    Parameters
    ----------
    groups : sequence of Group
    sizes : sequence of int
        Rows of each that can be taken.
    config : DataConfig
    """
    caps = list(sizes)
    for number, origin in enumerate(config.origins()):
        if isinstance(origin, MixedSource):
            rows = sum(size for size, group in zip(sizes, groups, strict=True) if group.source == number)
            ours = [place for place, group in enumerate(groups) if group.source == number]
            _split(caps, ours, origin.most(rows))
    slices = sorted({group.slice for group in groups})
    members = [[place for place, group in enumerate(groups) if group.slice == one] for one in slices]
    totals = even_shares([sum(caps[place] for place in places) for places in members], config.samples)
    for places, total in zip(members, totals, strict=True):
        _split(caps, places, total)
    return caps


def _split(caps: list[int], places: list[int], most: int | None) -> None:
    """Cut the numbers at some places to `most` together, in place."""
    shares = even_shares([caps[place] for place in places], most)
    for place, share in zip(places, shares, strict=True):
        caps[place] = share
