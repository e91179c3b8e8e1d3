"""What a run's snapshots say besides chunks: names, counts, codebooks. Turned bits are errors, never other numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
from numcodecs.zstd import Zstd
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync

from tests.hardening.flips import flipped, outcome
from tests.invariants import small_manifest
from tests.store.worlds import new_store, record_leaf
from tinyonn.errors import StoreDamagedError, TinyONNError
from tinyonn.run import open_run
from tinyonn.store.merge import merge_ready
from tinyonn.store.repository import Store

Edit = Callable[[dict[str, Any]], None]
GROUP, NO_KIND = 2, 7  # of nodes, in Icechunk's snapshots


@pytest.fixture
def store(tmp_path: Path) -> Store:
    manifest = small_manifest({"code": 12, "prose": 12})
    found = new_store(tmp_path / "store", manifest)
    for name in manifest.slices:
        for leaf in manifest.leaves(name):
            record_leaf(found, leaf)
    found.clean()
    return found


def rewrite(store: Store, path: str, edit: Edit, message: str = "an edit") -> None:
    """Change the metadata of a node without changing its digest, and keep what the commit says of the content."""
    session = store._repository.writable_session("main")
    kept = store._repository.lookup_snapshot(session.snapshot_id).metadata
    key = f"{path}/zarr.json"
    data = sync(session.store.get(key, default_buffer_prototype()))
    assert data is not None
    tree = json.loads(data.to_bytes())
    edit(tree)
    sync(session.store.set(key, cpu.Buffer.from_bytes(json.dumps(tree).encode())))
    session.commit(message, kept)


def damaged_codebook(tree: dict[str, Any]) -> None:
    tree["attributes"]["fields"]["act"]["codebook"][3] += 1e-9


def entries_too_many(tree: dict[str, Any]) -> None:
    tree["attributes"]["fields"]["freq"]["codebook"].append(1.5)


def other_base(tree: dict[str, Any]) -> None:
    tree["attributes"]["fields"]["grad"]["base"] += 1


def other_shape(tree: dict[str, Any]) -> None:
    tree["shape"][0] -= 1


def other_count(tree: dict[str, Any]) -> None:
    tree["attributes"]["samples"] -= 1


@pytest.mark.parametrize("edit", [damaged_codebook, entries_too_many, other_base, other_shape])
def test_an_array_that_says_something_else_is_named(store: Store, edit: Edit) -> None:
    segment, name = store.segments()[0], store.manifest.parameters[0].name
    rewrite(store, f"{segment.path}/{name}", edit)
    for read in (
        lambda: open_run(store.location).mean(name),
        lambda: Store.open(store.location).reader().codebooks(segment, name),
        lambda: merge_ready(Store.open(store.location, read_only=False)),
    ):
        with pytest.raises(StoreDamagedError) as caught:
            read()
        assert store.location in str(caught.value) and f"{segment.path}/{name}" in str(caught.value)


def test_a_segment_that_says_another_count_is_named(store: Store) -> None:
    segment = store.segments()[0]
    rewrite(store, segment.path, other_count)
    with pytest.raises(StoreDamagedError, match=f"{store.location}: {segment.path} is damaged"):
        Store.open(store.location).segments()


def test_metadata_without_a_digest_are_read(store: Store) -> None:
    """Of a store that an earlier version wrote."""
    segment, name = store.segments()[0], store.manifest.parameters[0].name

    def unseal(tree: dict[str, Any]) -> None:
        del tree["attributes"]["digest"]

    before = open_run(store.location).mean(name)
    rewrite(store, f"{segment.path}/{name}", unseal)
    rewrite(store, segment.path, unseal)
    np.testing.assert_array_equal(open_run(store.location).mean(name), before)


def test_impossible_codebooks_and_counts_of_an_older_store_are_refused(store: Store) -> None:
    segment, name = store.segments()[0], store.manifest.parameters[0].name

    def swapped(tree: dict[str, Any]) -> None:
        del tree["attributes"]["digest"]
        book = tree["attributes"]["fields"]["act"]["codebook"]
        book[3], book[4] = book[4], book[3]

    def too_many(tree: dict[str, Any]) -> None:
        del tree["attributes"]["digest"]
        tree["attributes"]["samples"] = 1 + segment.last - segment.first

    rewrite(store, f"{segment.path}/{name}", swapped)
    with pytest.raises(StoreDamagedError, match=f"codebooks of .*{name}.* 16 finite, increasing"):
        Store.open(store.location).reader().codebooks(segment, name)
    rewrite(store, segment.path, too_many)
    with pytest.raises(StoreDamagedError, match=f"{segment.name} says that it holds"):
        Store.open(store.location).segments()


def test_a_segment_that_is_gone_is_missed(store: Store) -> None:
    segment = store.segments()[0]
    session = store._repository.writable_session("main")
    kept = store._repository.lookup_snapshot(session.snapshot_id).metadata
    sync(session.store.delete_dir(segment.path))
    session.commit("lost", kept)
    with pytest.raises(StoreDamagedError, match=f"{store.location}.*segment {segment.name} is missing"):
        Store.open(store.location).segments()


def test_a_chunk_that_is_gone_is_an_error_and_no_zeros(store: Store) -> None:
    segment, name = store.segments()[0], store.manifest.parameters[0].name
    session = store._repository.writable_session("main")
    kept = store._repository.lookup_snapshot(session.snapshot_id).metadata
    sync(session.store.delete_dir(f"{segment.path}/{name}/c"))
    session.commit("lost", kept)
    with pytest.raises(StoreDamagedError, match=f"{name} of segment {segment.name}, chunk 0"):
        open_run(store.location).mean(name)


def everything(location: Path) -> list[Any]:
    """All that a reader takes from a store's snapshots."""
    run = open_run(location)
    reader = run.store.reader()
    found: list[Any] = [run.manifest.to_json(), run.calibration, run.samples, run.set_aside]
    for segment in reader.segments:
        for parameter in run.parameters if segment.samples else ():
            found += [segment.name, reader.codebooks(segment, parameter.name).tolist()]
            found.append(reader.read(segment, parameter.name, 0, parameter.shape[0]).tobytes())
    return found


def flips(store: Store, count: int, seed: int) -> tuple[int, int]:
    """Turn bits of the newest snapshot; how many gave an error, and how many another result."""
    location = Path(store.location)
    newest = icechunk.Repository.open(icechunk.local_filesystem_storage(str(location))).lookup_branch("main")
    path = location / "snapshots" / newest
    whole, before, chance = path.read_bytes(), everything(location), random.Random(seed)
    errors = silent = 0
    try:
        for _ in range(count):
            path.write_bytes(flipped(whole, chance.randrange(8 * len(whole))))
            found = outcome(everything, location)
            if isinstance(found, TinyONNError):
                errors += 1
                assert store.location in str(found), found
            else:
                silent += found != before
    finally:
        path.write_bytes(whole)
    return errors, silent


def test_no_turned_bit_of_a_snapshot_is_silent(store: Store) -> None:
    errors, silent = flips(store, 60, 7)
    assert silent == 0 and errors > 30


def test_a_node_of_a_kind_that_there_is_not_is_damage(store: Store) -> None:
    """Icechunk's Rust gives up on it, with what is no `Exception`."""
    location = Path(store.location)
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(location)))
    path = location / "snapshots" / repository.lookup_branch("main")
    whole, codec = path.read_bytes(), Zstd()
    start = whole.index(b"\x28\xb5\x2f\xfd")
    content = codec.decode(whole[start:])
    told = []
    try:
        for place in [place for place, byte in enumerate(content) if byte == GROUP][:200]:
            changed = bytearray(content)
            changed[place] = NO_KIND
            path.write_bytes(whole[:start] + codec.encode(bytes(changed)))
            found = outcome(everything, location)
            if isinstance(found, TinyONNError):
                told.append(str(found))
                assert store.location in told[-1]
    finally:
        path.write_bytes(whole)
    assert any("cannot make sense of" in line for line in told), told


@pytest.mark.slow
def test_no_turned_bit_of_many_is_silent(store: Store) -> None:
    errors, silent = flips(store, 1000, 8)
    assert silent == 0 and errors > 500
