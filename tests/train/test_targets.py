"""The profile's samples are found in what is trained on by what they are, never by the number of a row alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.corpus.test_mixture import Room
from tests.dense.architectures import make_model
from tinyonn.corpus.corpus import Corpus
from tinyonn.errors import InputError
from tinyonn.profile.dataset import Manifest
from tinyonn.profile.groups import Identity
from tinyonn.profile.profile import Profile
from tinyonn.train.routing import find_profiled


@pytest.fixture
def room(tmp_path: Path) -> Room:
    make_model("qwen2", tmp_path / "model")
    return Room(tmp_path, tmp_path / "model")


def profile_of(corpus: Corpus, groups: Identity) -> Profile:
    """Of all samples of a corpus; nothing was measured."""
    places = [(name, place) for name, count in corpus.slices.items() for place in range(count)]
    manifest = Manifest(groups, {}, corpus.fingerprint, 1, 1, 1, dict(corpus.slices))
    count = len(places)
    numbers, sums = np.zeros(count, np.int64), np.zeros((count, 1), np.int64)
    floats = np.zeros((count, 1), np.float32)
    rows = np.array([corpus.sample(*place).index for place in places], np.int64)
    positions = np.array([place for _, place in places], np.int64)
    return Profile(
        *(
            manifest,
            rows,
            positions,
            [name for name, _ in places],
            np.zeros(count),
            numbers,
            numbers,
            numbers,
        ),
        *([""] * count, sums, sums, floats, floats, {}),
    )


def test_profiled_samples_are_found_by_what_they_are(room: Room) -> None:
    groups = Identity("labels", "x", 1)
    a, b = {"path": room.texts("a", 9)}, {"path": room.texts("b", 6)}
    begun = room.prepare([a, b])
    profile = profile_of(begun, groups)
    texts = {
        sample.index: room.tokenizer.decode(sample.input_ids.tolist())
        for name, count in begun.slices.items()
        for sample in begun.range(name, 0, count)
    }
    np.testing.assert_array_equal(find_profiled(profile, begun.path, begun), profile.samples)
    turned = room.prepare([{"path": room.texts("c", 4)}, b], "train.arrow")  # row 0 is another text here
    found = find_profiled(profile, begun.path, turned)
    there = {
        sample.index: sample
        for name in turned.slices
        for sample in turned.range(name, 0, turned.slices[name])
    }
    for row, index in zip(profile.samples.tolist(), found.tolist(), strict=True):
        assert (index >= 0) == texts[row].startswith("b")
        if index >= 0:
            assert room.tokenizer.decode(there[index].input_ids.tolist()) == texts[row]
    other = room.prepare([{"path": room.texts("c", 4)}], "other.arrow")
    with pytest.raises(InputError, match=r"none of the 15 profiled samples is in other\.arrow"):
        find_profiled(profile, begun.path, other)
    with pytest.raises(InputError, match="profile of another corpus"):
        find_profiled(profile, other.path, turned)


def test_a_corpus_that_has_grown_keeps_its_profile(room: Room) -> None:
    begun = room.prepare([{"path": room.texts("a", 9)}])
    profile = profile_of(begun, Identity("labels", "x", 1))
    grown = room.grow([{"path": room.texts("z", 3)}, {"path": room.texts("a", 9)}], begun)
    found = find_profiled(profile, grown.path, grown)
    assert found.tolist() == (profile.samples + 3).tolist()  # the new source stands before it
