"""A corpus of one or several sources: their rows one after another, each with its slice.

Rows are numbered through all sources, so that a source that is appended leaves the numbers before it as they are.
Which rows are taken, and in which order, is drawn by shares and seeds alone.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyonn.config import DataConfig, MixedSource, SourceConfig
from tinyonn.corpus.file import Int64, SetAside
from tinyonn.corpus.files import stem_of
from tinyonn.corpus.rows import Row, Source
from tinyonn.corpus.slices import MAX_SLICES, Slicer, Survey, distinct_names, slice_names, survey_rows
from tinyonn.errors import InputError


class Mixture:
    """The sources of a corpus, read several times over and always in the same order.

    Parameters
    ----------
    config : DataConfig

    Attributes
    ----------
    origins : tuple of SourceConfig
    sources : list of Source
        In the same order.

    Raises
    ------
    InputError
        As `Source`; names the source where there are several.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.origins = config.origins()
        self.sources = [_opened(origin, self._mark(number)) for number, origin in enumerate(self.origins)]

    def _mark(self, number: int) -> str:
        """What tells a source from the others in messages."""
        return f"source {number + 1} of data: " if len(self.origins) > 1 else ""

    @property
    def derived(self) -> bool:
        """Whether slices are derived from the texts."""
        return any(
            not isinstance(origin, MixedSource) and source.columns.slice is None
            for origin, source in zip(self.origins, self.sources, strict=True)
        )

    def fingerprint(self) -> str:
        """Hash of what is read, and of how much of it; of a single source as `Source.fingerprint`."""
        prints = [source.fingerprint() for source in self.sources]
        if not self.config.sources:
            return prints[0]
        digest = hashlib.sha256()
        for number, (origin, source) in enumerate(zip(self.origins, prints, strict=True)):
            took = (origin.samples, origin.share) if isinstance(origin, MixedSource) else None
            digest.update(repr((source, self._slice_name(number), took)).encode())
        return digest.hexdigest()

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Every row with the number of its source; its index counts through all sources."""
        first = end = 0
        for number, source in enumerate(self.sources):
            for row in source:
                end = first + row.index + 1
                yield number, row if first == 0 else replace(row, index=end - 1)
            first = end

    def survey(self, slicer: Slicer | None = None) -> Survey:
        """Give every usable row its slice; see `survey_rows`.

        Parameters
        ----------
        slicer : Slicer, optional
            Slices derived before, in the place of new ones.

        Raises
        ------
        InputError
            Of a source: no usable row, over 5 % malformed ones. Of all together: over 16 slices.
        """
        if not self.config.sources:
            return survey_rows(self.sources[0], self.config, slicer=slicer)
        joined = Survey()
        first = 0
        for number, source in enumerate(self.sources):
            try:
                found = survey_rows(source, self.config, self._slice_name(number), slicer)
            except InputError as error:
                raise InputError(f"{self._mark(number)}{error}") from None
            _append(joined, found, number, first)
            first += found.end
        if len(joined.names) > MAX_SLICES:
            slice_names(joined.names)
        return joined

    def described(self, survey: Survey) -> list[str]:
        """One line for each source about what was read of it."""
        parts = np.array(survey.parts, np.int64)
        lines = []
        for number, source in enumerate(self.sources):
            several = len(self.sources) > 1
            rows = int((parts == number).sum()) if several else len(survey.indices)
            aside = survey.aside_of[number] if several else len(survey.set_aside)
            lines.append((f"{source.path}: " if several else "") + source.described(rows, aside))
        return lines

    def _slice_name(self, number: int) -> str | None:
        """Name of the slice that a whole source is; None where a column or its texts tell."""
        origin = self.origins[number]
        if not isinstance(origin, MixedSource):
            return None
        if origin.slice_name is None and self.sources[number].columns.slice is not None:
            return None
        return distinct_names([origin.slice_name or stem_of(Path(origin.path))])[0]


def _opened(origin: SourceConfig, mark: str) -> Source:
    try:
        return Source(origin)
    except InputError as error:
        raise InputError(f"{mark}{error}") from None


def _append(joined: Survey, found: Survey, part: int, first: int) -> None:
    numbers = []
    for name in found.names:
        if name not in joined.names:
            joined.names.append(name)
        numbers.append(joined.names.index(name))
    joined.indices.extend(first + index for index in found.indices)
    joined.numbers.extend(numbers[number] for number in found.numbers)
    joined.parts += array("H", [part]) * len(found.indices)
    joined.set_aside += [SetAside(first + item.index, item.reason, item.slice) for item in found.set_aside]
    joined.aside_of.append(len(found.set_aside))
    joined.slicer = joined.slicer or found.slicer


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
