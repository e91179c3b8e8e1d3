"""The tokenised corpus as one Arrow IPC file, memory-mapped: any sample is read without the rest.

Rows stand slice by slice in their stored order, see `tinyonn.corpus.token_rows`. The schema's metadata holds the rest:
``tinyonn`` (JSON with a digest, see `Header`) and, where slices were derived, ``slicer`` (compressed NumPy arrays).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

from tinyonn.corpus.token_rows import Int32, Int64, Row, Rows, RowWriter, read_rows
from tinyonn.errors import InputError
from tinyonn.files import KEY, opened_text, sealed, write_whole

__all__ = [
    "Corpus",
    "Header",
    "Int32",
    "Int64",
    "RowWriter",
    "Sample",
    "SetAside",
    "read_rows",
    "write_corpus",
]

VERSION = 1


@dataclass(frozen=True)
class Sample:
    """One sample, ready for the model.

    Attributes
    ----------
    index : int
        Row of the source.
    slice : str
    input_ids : int32 [T]
    labels : int32 [T]
        -100 where a token is not labelled. Not shifted: the model does that.
    """

    index: int
    slice: str
    input_ids: Int32
    labels: Int32


@dataclass(frozen=True)
class SetAside:
    """A row of the source that is not used, and why."""

    index: int
    reason: str
    slice: str | None = None


@dataclass(frozen=True)
class Header:
    """What the file's metadata says.

    Attributes
    ----------
    key : str
        Hash of the source, the tokenizer and the options: the file is reused while it matches.
    fingerprint : str
        Hash of the tokens, labels, slices and order themselves.
    slices : dict
        Name to number of samples, sorted by name; in a corpus that has grown, new ones come last.
    set_aside : list of SetAside
    truncated, tokens, max_tokens : int
        Samples cut to `max_tokens`; tokens of all samples together; the longest that a sample may be.
    described : list of str
        One line for each source: what was read of it, and as what.
    making : str
        Hash of what decides the tokens of a row and where they lie, but for the source: a corpus grows only where
        it is the same.
    grown_from : list of str
        Fingerprints of the corpora that this one begins with, slice by slice, the oldest first.
    vocabulary : int
        Tokens are below it; 0 where the model does not say.
    slicer : str
        Digest of how slices were derived, empty where they were not.
    """

    key: str
    fingerprint: str
    slices: dict[str, int]
    set_aside: list[SetAside]
    truncated: int
    tokens: int
    max_tokens: int
    version: int = VERSION
    described: list[str] = field(default_factory=list)
    making: str = ""
    grown_from: list[str] = field(default_factory=list)
    vocabulary: int = 0
    slicer: str = ""


class Corpus:
    """A tokenised corpus, opened memory-mapped. Cheap to pickle: it travels as its path.

    Parameters
    ----------
    path : Path
        A file that `prepare_corpus` wrote.

    Raises
    ------
    InputError
        No such file, or one of another version.
    StoreDamagedError
        It is not what was written; names the file. What is wrong with samples shows when they are read, or `check`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        remedy = "delete it and record again, the corpus will be tokenised anew"
        try:
            self._rows = Rows(self.path)
        except FileNotFoundError:
            raise InputError(f"{path}: there is no corpus; run `tinyonn record` again") from None
        metadata = self._rows.metadata
        self.slicer: bytes | None = metadata.get(b"slicer")
        try:
            content = metadata[b"tinyonn"]
            tree = opened_text(content, self.path)
            if tree["version"] != VERSION:
                raise InputError(f"{path}: format {tree['version']}, this version reads {VERSION}; {remedy}")
            tree["set_aside"] = [SetAside(**item) for item in tree["set_aside"]]
            self.header = Header(**tree)
            if sum(self.slices.values()) != len(self._rows):
                raise ValueError(f"it has {len(self._rows)} rows and says {sum(self.slices.values())}")
            self._rows.sealed = KEY in json.loads(content)
            if self._rows.sealed and self.header.slicer != _slicer_digest(self.slicer):
                raise ValueError("how slices were derived does not match its digest")
        except (KeyError, TypeError, ValueError) as error:
            raise self._rows.damage(error) from None
        self._rows.vocabulary = self.header.vocabulary
        starts = accumulate(self.slices.values(), initial=0)
        self._starts = dict(zip(self.slices, starts, strict=False))

    def __reduce__(self) -> tuple[type[Corpus], tuple[Path]]:
        return Corpus, (self.path,)

    def __len__(self) -> int:
        return sum(self.slices.values())

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, labels, slices and order."""
        return self.header.fingerprint

    def begins_with(self, fingerprint: str) -> bool:
        """Whether this is the corpus of that fingerprint, or has grown from it."""
        return fingerprint in (self.fingerprint, *self.header.grown_from)

    @property
    def slices(self) -> dict[str, int]:
        """Name of each slice to its number of samples; see `Header`."""
        return self.header.slices

    @property
    def set_aside(self) -> list[SetAside]:
        """Rows of the source that are not used."""
        return self.header.set_aside

    @property
    def truncated(self) -> int:
        """Number of samples that were cut to `max_tokens`."""
        return self.header.truncated

    @property
    def tokens(self) -> int:
        """Tokens of all samples together."""
        return self.header.tokens

    @property
    def mean_tokens(self) -> float:
        """Tokens of a sample, on average."""
        return self.tokens / len(self)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return self._rows.longest()

    @property
    def max_tokens(self) -> int:
        """Most tokens that a sample may have."""
        return self.header.max_tokens

    def check(self) -> Corpus:
        """Read all of it; itself.

        Raises
        ------
        StoreDamagedError
            It is not what was written.
        """
        self._rows.check()
        return self

    def sample(self, slice: str, position: int) -> Sample:
        """Read the sample at a position of a slice's stored order.

        Raises
        ------
        InputError
            No such slice or position.
        StoreDamagedError
            The sample, or one that lies near it, is not what was written.
        """
        count = self.slices.get(slice)
        if count is None:
            raise InputError(f"slice {slice!r} is not in {self.path}; it has {list(self.slices)}")
        if not 0 <= position < count:
            raise InputError(
                f"position {position} of slice {slice!r} in {self.path}: it has 0 to {count - 1}"
            )
        index, input_ids, labels = self._rows[self._starts[slice] + position]
        return Sample(index, slice, input_ids.copy(), labels.copy())

    def tokens_of(self, slice: str, first: int, last: int) -> int:
        """Tokens of the samples at positions ``first <= position < last``."""
        start = self._starts[slice]
        return sum(self._rows[row][1].size for row in range(start + first, start + last))

    def range(self, slice: str, first: int, last: int) -> list[Sample]:
        """Read the samples at positions ``first <= position < last``."""
        return [self.sample(slice, position) for position in range(first, last)]

    def calibration(self, count: int, slices: dict[str, int] | None = None) -> list[Sample]:
        """Read the first `count` samples, taken in turns from the slices in their stored order.

        Parameters
        ----------
        count : int
        slices : dict of str to int, optional
            Only so many samples of each slice: of the corpus that this one has grown from.
        """
        places = [
            (position, slice)
            for slice, samples in (slices or self.slices).items()
            for position in range(min(samples, count))
        ]
        turns = sorted(places, key=lambda place: place[0])[:count]  # stable: slices stay sorted within a turn
        return [self.sample(slice, position) for position, slice in turns]


def write_corpus(path: Path, header: Header, slicer: bytes | None, rows: Iterator[Row]) -> Corpus:
    """Write a corpus, whole or not at all."""
    header = replace(header, slicer=_slicer_digest(slicer))
    metadata = {b"tinyonn": json.dumps(sealed(asdict(header))).encode()}
    if slicer is not None:
        metadata[b"slicer"] = slicer

    def write(side: Path) -> None:
        with side.open("wb") as stream:
            writer = RowWriter(stream, metadata)
            for row in rows:
                writer.append(*row)
            writer.close()

    write_whole(path, write)
    return Corpus(path)


def _slicer_digest(slicer: bytes | None) -> str:
    return "" if slicer is None else blake2b(slicer, digest_size=16).hexdigest()
