"""The survey of a corpus: which rows can be used, and to which slice each belongs."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tinyonn.config import DataConfig
from tinyonn.corpus.file import SetAside
from tinyonn.corpus.rows import Row, Source
from tinyonn.corpus.slices import CHARACTERS, FIT_ROWS, MAX_SLICES, Slicer, fit_slices, slice_names
from tinyonn.errors import InputError

BAD_SHARE = 0.05  # more rows than this that are malformed, or that the template garbles, are not bad luck


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
