"""A corpus that grows: what a run has recorded keeps its positions, and what is new comes after it.

The earlier samples are found again among the rows of the sources by their tokens and labels. So rows and sources may
be added, and more of a source be taken; what has been recorded can neither change nor go.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinyonn.base.corpus_file import Corpus, Int32, Int64
from tinyonn.base.slices import Slicer


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
        content = self.corpus.slicer
        return None if content is None else Slicer.from_bytes(content)

    @property
    def line(self) -> list[str]:
        """Fingerprints that a corpus grown from this one begins with."""
        known = [*self.corpus.header.grown_from, self.corpus.fingerprint]
        return known[: known.index(self.fingerprint) + 1]

    def indices(self) -> Int64:
        """Rows of the source that the samples were."""
        return np.array([index for name in self.slices for index, _ in self._samples(name)], np.int64)

    def find(self, slices: Mapping[str, Sequence[int]], digests: Sequence[bytes]) -> dict[str, list[int]]:
        """Find the samples among the rows of the same slice.

        Parameters
        ----------
        slices : mapping of str to sequence of int
            Places of each slice's rows.
        digests : sequence of bytes
            `content_digest` of the row at each place.

        Returns
        -------
        dict of str to list of int
            Places in the stored order; -1 for a sample that is not there.
        """
        return {name: self._found(name, slices.get(name, ()), digests) for name in self.slices}

    def _found(self, name: str, places: Sequence[int], digests: Sequence[bytes]) -> list[int]:
        left: dict[bytes, deque[int]] = defaultdict(deque)
        for place in places:
            left[digests[place]].append(place)
        return [left[digest].popleft() if left[digest] else -1 for _, digest in self._samples(name)]

    def _samples(self, name: str) -> Iterator[tuple[int, bytes]]:
        for sample in self.corpus.range(name, 0, self.slices[name]):
            yield sample.index, content_digest(sample.input_ids, sample.labels)


def content_digest(input_ids: Int32, labels: Int32) -> bytes:
    """Sixteen bytes that stand for a row's tokens and labels."""
    return hashlib.blake2b(input_ids.tobytes() + labels.tobytes(), digest_size=16).digest()
