"""A store whose corpus grows: what is recorded stays, and no moment of merging or growing decides a bit."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tests.invariants import check_live, check_store, small_manifest
from tests.store.worlds import disk_bytes, new_store, record_leaf
from tinyonn.run import Run
from tinyonn.store.manifest import Manifest
from tinyonn.store.merge import execute, merge_ready, ready_merges
from tinyonn.store.repository import Store
from tinyonn.store.tree import next_segment

SIZES = [{"code": 21, "prose": 6}, {"code": 33, "prose": 6, "art": 5}, {"code": 34, "prose": 20, "art": 5}]


def manifest_of(step: int, **options: int) -> Manifest:
    """The manifest after `step` growths."""
    manifest = small_manifest(SIZES[0], segment_size=4, **options)
    for number, sizes in enumerate(SIZES[1 : step + 1]):
        manifest = manifest.grow({"corpus": str(number)}, sizes)
    return manifest


def record_some(store: Store, chance: random.Random, most: int) -> None:
    """Record segments in any order, merging now and then."""
    for _ in range(most):
        held = store.segments()
        missing = [
            leaf
            for name in store.manifest.slices
            for leaf in store.manifest.leaves(name)
            if not any(segment.contains(leaf) for segment in held)
        ]
        if not missing:
            return
        record_leaf(store, chance.choice(missing))
        if (ready := ready_merges(store.manifest, store.segments())) and chance.random() < 0.5:
            execute(store, chance.choice(ready))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_live", [1, 3])
def test_any_moment_of_growing_gives_the_same_bits(tmp_path: Path, seed: int, max_live: int) -> None:
    chance = random.Random(seed)
    store = new_store(tmp_path / "store", manifest_of(0, max_live=max_live))
    for step in (1, 2):
        record_some(store, chance, chance.choice([0, 2, 100]))
        if chance.random() < 0.5:
            merge_ready(store)
        store.grow(manifest_of(step, max_live=max_live))
        check_store(store)
    record_some(store, chance, 100)
    merge_ready(store)
    check_store(store)  # against what follows from manifest and leaves alone
    last = Store.open(tmp_path / "store")
    assert last.manifest == manifest_of(2, max_live=max_live)
    assert {segment.slice: segment.range for segment in last.segments()} == {
        name: (0, count) for name, count in SIZES[2].items()
    }
    assert list(last.manifest.slices) == ["code", "prose", "art"]  # those that were there keep their numbers


def test_dealt_in_order_live_segments_stay_bounded(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store", manifest_of(0))
    for step in (1, 2, 3):
        while (leaf := next_segment(store.manifest, store.segments(), [], workers=1)) is not None:
            record_leaf(store, leaf)
            merge_ready(store)
            check_live(store.manifest, store.segments(), workers=1)
        if step < 3:
            store.grow(manifest_of(step))


def test_what_was_recorded_is_read_as_before_and_replaced_segments_leave_the_disk(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store", manifest_of(0))
    record_some(store, random.Random(1), 100)
    merge_ready(store)
    name = store.manifest.parameters[0].name
    run = tmp_path / "store"
    before = Run(store).records(name, "prose")
    store.grow(manifest_of(1))
    np.testing.assert_array_equal(Run(Store.open(run)).records(name, "prose"), before)
    record_some(store, random.Random(2), 100)
    merge_ready(store)
    store.clean()
    grown = disk_bytes(run)
    fresh = new_store(tmp_path / "fresh", small_manifest(SIZES[1], segment_size=4))
    record_some(fresh, random.Random(3), 100)
    merge_ready(fresh)
    fresh.clean()
    assert grown < 1.1 * disk_bytes(tmp_path / "fresh")


def test_killed_between_the_branches_it_grows_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path / "store", manifest_of(0))
    record_some(store, random.Random(1), 3)
    real = type(store._repository).writable_session

    def killed(self: object, branch: str) -> object:
        if branch == "main":
            raise KeyboardInterrupt
        return real(self, branch)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(store._repository), "writable_session", killed)
        with pytest.raises(KeyboardInterrupt):
            store.grow(manifest_of(1))
    again = Store.open(tmp_path / "store", read_only=False)
    assert again.manifest == manifest_of(0)
    record_some(again, random.Random(2), 2)  # as before
    again.grow(manifest_of(1))
    record_some(again, random.Random(2), 100)
    merge_ready(again)
    check_store(again)


def test_a_corpus_only_grows(tmp_path: Path) -> None:
    manifest = manifest_of(1)
    with pytest.raises(ValueError, match="does not grow"):
        manifest.grow({}, {**SIZES[1], "code": 20})
    with pytest.raises(ValueError, match="does not grow"):
        manifest.grow({}, SIZES[0])
    store = new_store(tmp_path / "store", manifest_of(0))
    with pytest.raises(ValueError, match="not the manifest"):
        store.grow(small_manifest(SIZES[1], segment_size=5))


def test_a_manifest_that_has_not_grown_is_stored_as_before() -> None:
    plain, grown = manifest_of(0).to_json(), manifest_of(2).to_json()
    assert plain["version"] == 2
    assert "grown" not in plain
    assert grown["version"] == 3  # which older versions refuse
    assert grown["grown"] == {"code": (21, 33), "prose": (6,)}
    assert Manifest.from_json(grown) == manifest_of(2)


def test_a_reader_that_was_there_before_reads_on(tmp_path: Path) -> None:
    """It keeps to its slices; what has been added to them since is there."""
    store = new_store(tmp_path / "store", manifest_of(0))
    record_some(store, random.Random(0), 100)
    reader = Store.open(tmp_path / "store")
    before = reader.segments()
    store.grow(manifest_of(1))
    record_some(store, random.Random(0), 100)
    merge_ready(store)
    after = reader.segments()
    assert before and {segment.slice for segment in after} == {"code", "prose"}
    assert max(segment.last for segment in after) == 33
    assert reader.reader() is not None
