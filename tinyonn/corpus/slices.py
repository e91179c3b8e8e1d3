"""Slices: the kinds of text in a corpus, from a column or found by k-means on hashed words.

The features of a text are its words and signs hashed into 4,096 places, ``log(1 + count) * idf``, scaled to
length 1. The centres are fitted on an even share of the rows and saved with the corpus, so that any later
text can be put into its slice. A derived slice is named by the words that tell it from the others.

A survey of a source says which of its rows can be used, and to which slice each belongs.
"""

from __future__ import annotations

import io
import random
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from tinyonn.config import DataConfig
from tinyonn.corpus.file import SetAside
from tinyonn.corpus.rows import Row, Source
from tinyonn.errors import InputError

MAX_SLICES = 16
FEATURES = 4096
FIT_ROWS = 8192
CHARACTERS = 2000  # of a text that count
NAME_WORDS = 2
NAME_LENGTH = 40
TOKEN = r"[^\W\d_]{2,}|\d|[^\w\s]"  # a word, a digit or a sign: signs tell code and data from prose
BATCH = 1024

Float32 = np.ndarray[Any, np.dtype[np.float32]]
BAD_SHARE = 0.05  # more rows than this that are malformed, or that the template garbles, are not bad luck


@dataclass(frozen=True)
class Slicer:
    """Fitted slices.

    Attributes
    ----------
    names : tuple of str
        Sorted; the position is the slice's number.
    idf : float32 [4096]
    centres : float32 [slices, 4096]
        In the order of `names`.
    """

    names: tuple[str, ...]
    idf: Float32
    centres: Float32

    def assign(self, texts: Iterable[str]) -> Iterator[int]:
        """Number of the nearest centre of each text, in order."""
        squares = (self.centres**2).sum(axis=1)
        stream = iter(texts)
        while group := list(islice(stream, BATCH)):
            products = _features(group, self.idf) @ self.centres.T
            yield from (int(number) for number in np.argmin(squares - 2 * products, axis=1))

    def to_bytes(self) -> bytes:
        """Serialise as compressed NumPy arrays, without pickle."""
        stream = io.BytesIO()
        np.savez_compressed(stream, names=np.array(self.names), idf=self.idf, centres=self.centres)
        return stream.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> Slicer:
        """Undo `to_bytes`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            names = tuple(str(name) for name in arrays["names"])
            return Slicer(names, arrays["idf"], arrays["centres"])


def fit_slices(texts: Sequence[str], count: int, seed: int) -> Slicer:
    """Find slices in a sample of the corpus."""
    from sklearn.cluster import MiniBatchKMeans  # a second and a half, and few stages derive slices

    raw = _counts(texts)
    documents = np.bincount(raw.indices, minlength=FEATURES)
    idf = (np.log((1 + len(texts)) / (1 + documents)) + 1).astype(np.float32)
    features = _weigh(raw, idf)
    distinct = len({text[:CHARACTERS] for text in texts})
    kmeans = MiniBatchKMeans(min(count, distinct), random_state=seed, n_init=5, batch_size=1024)
    found = kmeans.fit_predict(features)
    kept = sorted(set(found.tolist()))
    groups = [[text for text, number in zip(texts, found, strict=True) if number == one] for one in kept]
    names = distinct_names(telling_words(groups))
    order = sorted(range(len(kept)), key=lambda place: names[place])
    centres = kmeans.cluster_centers_[[kept[place] for place in order]].astype(np.float32)
    return Slicer(tuple(names[place] for place in order), idf, centres)


def telling_words(groups: Sequence[Sequence[str]]) -> list[str]:
    """Name each group by the words that are frequent in it and rare outside it, most telling first."""
    counts = [Counter(word for text in group for word in set(_words(text))) for group in groups]
    texts = sum(len(group) for group in groups)
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    names = []
    for group, count in zip(groups, counts, strict=True):

        def telling(word: str, inside: Counter[str] = count, size: int = len(group)) -> float:
            elsewhere = (total[word] - inside[word] + 0.5) / (texts - size + 1)
            return float(inside[word] / size * np.log((inside[word] + 0.5) / (size + 1) / elsewhere))

        best = sorted(count, key=lambda word: (-telling(word), word))
        names.append("_".join(best[:NAME_WORDS]))
    return names


def slice_names(values: Iterable[str]) -> dict[str, str]:
    """Map the values of a slice column to names that are safe in paths, distinct values to distinct names.

    Raises
    ------
    InputError
        More than 16 different values.
    """
    distinct = sorted(set(values))
    if len(distinct) > MAX_SLICES:
        some = ", ".join(repr(value) for value in distinct[:4])
        raise InputError(
            f"data.slice: the column has more than {MAX_SLICES} different values ({some}, ...), the most "
            "that are supported; name a coarser column, or none to have slices derived"
        )
    return dict(zip(distinct, distinct_names(distinct), strict=True))


def distinct_names(values: Sequence[str]) -> list[str]:
    """Turn any strings into distinct names of ``[a-z0-9_]``, at most 40 characters and never empty."""
    names: list[str] = []
    for value in values:
        plain = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode().lower()
        stem = re.sub(r"[^a-z0-9]+", "_", plain).strip("_")[:NAME_LENGTH].strip("_") or "slice"
        name, number = stem, 2
        while name in names:
            name = f"{stem[: NAME_LENGTH - 4]}_{number}"
            number += 1
        names.append(name)
    return names


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]{3,20}", text[:CHARACTERS].lower())


def _counts(texts: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=FEATURES, token_pattern=TOKEN, alternate_sign=False, norm=None, dtype=np.float32
    )
    return vectorizer.transform(text[:CHARACTERS] for text in texts)


def _features(texts: Sequence[str], idf: Float32) -> Any:
    return _weigh(_counts(texts), idf)


def _weigh(counts: Any, idf: Float32) -> Any:
    weighed = counts.copy()
    weighed.data = np.log1p(weighed.data) * idf[weighed.indices]
    lengths = np.sqrt(np.asarray(weighed.multiply(weighed).sum(axis=1)).ravel())
    weighed.data /= np.repeat(np.maximum(lengths, 1e-12), np.diff(weighed.indptr)).astype(np.float32)
    return weighed


@dataclass
class Survey:
    """What the second reading finds: for each usable row its index, its slice and its source.

    Attributes
    ----------
    names : list of str
        Slices.
    indices, numbers, parts : array of int
        Of each usable row: index, place of its slice in `names`, number of its source.
    set_aside : list of SetAside
    aside_of : list of int
        How many of them are of each source.
    end : int
        Index after the last row's.
    slicer : Slicer or None
        Where slices were derived.
    """

    names: list[str] = field(default_factory=list)
    indices: array[int] = field(default_factory=lambda: array("q"))
    numbers: array[int] = field(default_factory=lambda: array("B"))
    parts: array[int] = field(default_factory=lambda: array("H"))
    set_aside: list[SetAside] = field(default_factory=list)
    aside_of: list[int] = field(default_factory=list)
    end: int = 0
    slicer: Slicer | None = None


def survey_rows(
    source: Source, config: DataConfig, name: str | None = None, slicer: Slicer | None = None
) -> Survey:
    """Give every row of the source its slice, from the column or derived, or the reason why it is set aside.

    Parameters
    ----------
    source : Source
    config : DataConfig
        How slices are derived.
    name : str, optional
        The slice that all rows are.
    slicer : Slicer, optional
        Slices derived before, in the place of new ones.

    Raises
    ------
    InputError
        No usable row, over 5 % malformed rows, or over 16 slices.
    """
    survey = Survey()
    malformed: list[SetAside] = []
    total = 0

    def usable() -> Iterator[Row]:
        nonlocal total
        for row in source:
            total += 1
            survey.end = row.index + 1
            if row.fault is None:
                survey.indices.append(row.index)
                yield row
                continue
            item = SetAside(row.index, row.fault, row.slice)
            survey.set_aside.append(item)
            if row.malformed:
                malformed.append(item)

    if name is not None:
        survey.names = [name]
        survey.numbers = array("B", (0 for _ in usable()))
        survey.set_aside = [SetAside(item.index, item.reason, name) for item in survey.set_aside]
    elif source.columns.slice is not None:
        values: dict[str, int] = {}
        for row in usable():
            survey.numbers.append(values.setdefault("none" if row.slice is None else row.slice, len(values)))
            if len(values) > MAX_SLICES:
                slice_names(values)
        safe = slice_names(values)
        survey.names = [safe[value] for value in values]
        survey.set_aside = [
            SetAside(item.index, item.reason, safe.get(item.slice or "")) for item in survey.set_aside
        ]
    elif slicer is not None or (texts := even_sample(source, FIT_ROWS, config.seed)):
        survey.slicer = slicer or fit_slices(texts, config.slices, config.seed)
        survey.names = list(survey.slicer.names)
        survey.numbers = array("B", survey.slicer.assign(row.words for row in usable()))
    else:
        for _ in usable():  # none
            pass
    if len(malformed) > max(1, BAD_SHARE * total):
        first = malformed[0]
        raise InputError(
            f"{source.path}: {len(malformed)} of {total} rows are malformed, row {first.index} first "
            f"({first.reason}); at most {BAD_SHARE:.0%} are set aside, mend the file"
        )
    if not survey.indices:
        raise InputError(f"{source.path}: no usable row among {total}{common_reasons(survey.set_aside)}")
    survey.parts = array("H", bytes(2 * len(survey.indices)))
    survey.aside_of = [len(survey.set_aside)]
    return survey


def even_sample(rows: Iterable[Row], count: int, seed: int) -> list[str]:
    """Draw the beginnings of `count` usable rows' texts, each row as likely (Vitter 1985, algorithm R)."""
    generator = random.Random(seed)
    texts: list[str] = []
    usable = (row for row in rows if row.fault is None)
    for seen, row in enumerate(usable):
        if len(texts) < count:
            texts.append(row.words[:CHARACTERS])
        elif (place := generator.randrange(seen + 1)) < count:
            texts[place] = row.words[:CHARACTERS]
    return texts


def common_reasons(items: Sequence[SetAside]) -> str:
    """Tell the three most common reasons, to end an error message."""
    common = Counter(item.reason for item in items).most_common(3)
    told = ", ".join(f"{reason} ({count} times)" for reason, count in common)
    return f": {told}; check data.text and data.messages" if told else "; the source is empty"
