from __future__ import annotations

import random
import re

import pytest

from tinyonn.corpus.slices import Slicer, distinct_names, fit_slices, slice_names, telling_words
from tinyonn.errors import InputError

CODE = "def {a}(self, {b}):\n    return self.{b} + {n}  # {a}\n"
SUMS = "Problem {n}: multiply {n} by {m}. The product is {m}{n}.\n"
TALK = "The garden was quiet and the {a} walked to the river with an old {b}.\n"
WORDS = ("apple", "window", "letter", "engine", "harbour", "candle", "valley", "thread")


def corpus(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Texts of three kinds, mixed, and the kind of each."""
    generator = random.Random(seed)
    kinds = [generator.randrange(3) for _ in range(count)]
    texts = [
        "".join(
            (CODE, SUMS, TALK)[kind].format(
                a=generator.choice(WORDS),
                b=generator.choice(WORDS),
                n=generator.randrange(1000),
                m=generator.randrange(1000),
            )
            for _ in range(4)
        )
        for kind in kinds
    ]
    return texts, kinds


def test_derived_slices_are_the_kinds_of_text() -> None:
    texts, kinds = corpus(300)
    slicer = fit_slices(texts, 3, seed=0)
    fresh, fresh_kinds = corpus(200, seed=1)
    for some, truth in ((texts, kinds), (fresh, fresh_kinds)):
        pairs = set(zip(slicer.assign(some), truth, strict=True))
        assert len(pairs) == 3  # one slice for each kind, one kind for each slice
    assert list(slicer.names) == sorted(slicer.names)
    assert all(re.fullmatch(r"[a-z0-9_]{1,40}", name) for name in slicer.names)
    assert any("problem" in name or "multiply" in name or "product" in name for name in slicer.names)


def test_a_saved_slicer_assigns_alike() -> None:
    texts, _ = corpus(100)
    slicer = fit_slices(texts, 4, seed=3)
    again = Slicer.from_bytes(slicer.to_bytes())
    assert again.names == slicer.names
    assert list(again.assign(texts)) == list(slicer.assign(texts))
    assert fit_slices(texts, 4, seed=3).to_bytes() == slicer.to_bytes()


def test_no_more_slices_than_different_texts() -> None:
    assert len(fit_slices(["one text"] * 20, 8, seed=0).names) == 1
    assert len(fit_slices(["one text", "另一段文字"], 8, seed=0).names) == 2


def test_assignment_does_not_depend_on_the_batch() -> None:
    texts, _ = corpus(60)
    slicer = fit_slices(texts, 3, seed=0)
    assert [next(slicer.assign([text])) for text in texts] == list(slicer.assign(texts))


def test_telling_words_tell_groups_apart() -> None:
    groups = [["common select table", "common select join"], ["common river walk", "common river stone"]]
    select, river = telling_words(groups)
    assert select.startswith("select")
    assert river.startswith("river")


def test_names_are_safe_and_distinct() -> None:
    values = ["C++", "c", "C#", "../../etc/passwd", "été", "数学", "", "x" * 90, "x" * 91]
    names = distinct_names(values)
    assert len(set(names)) == len(values)
    assert all(re.fullmatch(r"[a-z0-9_]{1,40}", name) for name in names)
    assert names[4] == "ete"
    assert slice_names(["b", "a", "b"]) == {"a": "a", "b": "b"}


def test_too_many_values_of_a_slice_column() -> None:
    with pytest.raises(InputError, match=r"more than 16 different values.*coarser"):
        slice_names([f"kind {number}" for number in range(17)])
