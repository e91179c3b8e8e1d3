"""Slices: the kinds of text in a corpus, from a column or found by k-means on hashed words.

The features of a text are its words and signs hashed into 4,096 places, ``log(1 + count) * idf``, scaled to
length 1. The centres are fitted on an even share of the rows and saved with the corpus, so that any later
text can be put into its slice. A derived slice is named by the words that tell it from the others.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.feature_extraction.text import HashingVectorizer

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
Int16 = np.ndarray[Any, np.dtype[np.int16]]


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
    """Find slices in a sample of the corpus.

    Parameters
    ----------
    texts : sequence of str
        At most a few thousand; at least one.
    count : int
        Slices wanted, 1 to 16; fewer come back if the texts are fewer or alike.
    seed : int
    """
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
