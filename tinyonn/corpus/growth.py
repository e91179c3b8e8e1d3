"""A corpus that grows: what a run has recorded keeps its positions, and what is new comes after it.

The earlier samples are found again among the rows of the sources by their tokens and labels. So rows and sources may
be added, and more of a source be taken; what has been recorded can neither change nor go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyonn.corpus.file import Corpus, Int32, Int64

if TYPE_CHECKING:
    from tinyonn.corpus.slices import Slicer

UInt64 = np.ndarray[Any, np.dtype[np.uint64]]
Digests = UInt64  # [rows, 2]


@dataclass(frozen=True)
class Earlier:
    """The corpus that a run was begun with: the first samples of the slices of one on the disk.

    Attributes
    ----------
    corpus : Corpus
        That corpus, or one that has grown from it.
    fingerprint : str
    slices : dict of str to int
        Name to number of samples.
    """

    corpus: Corpus
    fingerprint: str
    slices: dict[str, int]

    @property
    def slicer(self) -> Slicer | None:
        """How rows were put into derived slices."""
        from tinyonn.corpus.slices import Slicer

        content = self.corpus.slicer
        return None if content is None else Slicer.from_bytes(content)

    @property
    def line(self) -> list[str]:
        """Fingerprints that a corpus grown from this one begins with."""
        known = [*self.corpus.header.grown_from, self.corpus.fingerprint]
        return known[: known.index(self.fingerprint) + 1]

    def indices(self) -> Int64:
        """Rows of the source that the samples were."""
        return np.concatenate([self._samples(name)[0] for name in self.slices])

    def find(self, slices: Mapping[str, Int64], indices: Int64, digests: Digests) -> dict[str, Int64]:
        """Find the samples among the rows of the same slice: of equal rows first the one with the same index.

        Parameters
        ----------
        slices : mapping of str to int64 [n]
            Places of each slice's rows.
        indices : int64 [rows]
            Row of the source at each place.
        digests : uint64 [rows, 2]
            `content_digest` of the row at each place.

        Returns
        -------
        dict of str to int64 [samples]
            Places in the stored order; -1 for a sample that is not there.
        """
        found = {}
        for name in self.slices:
            places = slices.get(name, np.empty(0, np.int64))
            mine, its = self._samples(name)
            same = match_keys(_keys(its, mine), _keys(digests[places], indices[places]))
            left = np.setdiff1d(np.arange(len(places)), same)
            lost = np.flatnonzero(same < 0)
            others = match_keys(_keys(its[lost]), _keys(digests[places[left]]))
            same[lost[others >= 0]] = left[others[others >= 0]]
            found[name] = np.where(same >= 0, places[same], -1) if len(places) else same
        return found

    def _samples(self, name: str) -> tuple[Int64, Digests]:
        count = self.slices[name]
        indices, digests = np.empty(count, np.int64), bytearray()
        for position in range(count):
            sample = self.corpus.sample(name, position)
            indices[position] = sample.index
            digests += content_digest(sample.input_ids, sample.labels)
        return indices, as_digests(digests)


def match_keys(wanted: UInt64, given: UInt64) -> Int64:
    """Give each wanted row an equal one of its own: the first the first, the second the second; -1 where none is left.

    Parameters
    ----------
    wanted : uint64 [n, k]
    given : uint64 [m, k]

    Returns
    -------
    int64 [n]
        Places in `given`.
    """
    keys = np.concatenate([wanted, given])
    out = np.full(len(wanted), -1, np.int64)
    if not len(keys):
        return out
    order = np.lexsort(keys.T[::-1])  # stable
    begins = np.ones(len(keys), bool)
    begins[1:] = (keys[order][1:] != keys[order][:-1]).any(axis=1)
    group = np.cumsum(begins) - 1
    is_given = order >= len(wanted)
    rank = np.empty(len(keys), np.int64)
    for mask in (is_given, ~is_given):
        _, first, count = np.unique(group[mask], return_index=True, return_counts=True)
        rank[mask] = np.arange(int(mask.sum())) - np.repeat(first, count)
    code = group * (len(keys) + 1) + rank  # ascending on either side
    have, want = code[is_given], code[~is_given]
    if len(have):
        place = np.minimum(np.searchsorted(have, want), len(have) - 1)
        hit = have[place] == want
        out[order[~is_given][hit]] = order[is_given][place[hit]] - len(wanted)
    return out


def as_digests(content: bytes | bytearray) -> Digests:
    """Digests one after another as uint64 [rows, 2]."""
    return np.frombuffer(bytes(content), np.uint64).reshape(-1, 2)


def _keys(digests: Digests, indices: Int64 | None = None) -> UInt64:
    return digests if indices is None else np.column_stack([indices.astype(np.uint64), digests])


def content_digest(input_ids: Int32, labels: Int32) -> bytes:
    """Sixteen bytes that stand for a row's tokens and labels."""
    return hashlib.blake2b(input_ids.tobytes() + labels.tobytes(), digest_size=16).digest()
