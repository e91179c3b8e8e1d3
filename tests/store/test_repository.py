from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import icechunk
import numpy as np
import pytest

from tests.invariants import (
    PARAMETERS,
    calibrations,
    check_store,
    finished,
    leaf_records,
    small_manifest,
)
from tests.store.worlds import disk_bytes, new_store, record_leaf, write_leaf
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError, StoreDamagedError, StoreError
from tinyonn.store.arrays import MiB, SegmentWriter, band_rows, bands
from tinyonn.store.manifest import Manifest, Segment, parse_segment
from tinyonn.store.repository import Store

BOOKS = np.tile(np.arange(16) / 15, (3, 1))


@pytest.mark.parametrize(
    "shape", [(1,), (24,), (9_000_000,), (151_936, 2560), (6912, 2560), (3, 5_000_000), (40, 24), (1, 7)]
)
def test_bands_are_whole_rows_of_one_to_sixteen_mebibytes(shape: tuple[int, ...]) -> None:
    rows = band_rows(shape)
    row = 2 * int(np.prod(shape[1:], dtype=np.int64))
    assert rows * row <= max(16 * MiB, row)
    assert rows * row >= min(MiB, shape[0] * row)
    ranges = list(bands(shape))
    assert [first for first, _ in ranges] == list(range(0, shape[0], rows))
    assert ranges[-1][1] == shape[0]


def test_manifest_and_calibration_round_trip(tmp_path: Path) -> None:
    manifest = small_manifest({"code": 9, "prose": 4})
    assert not Store.exists(tmp_path / "store")
    store = Store.create(tmp_path / "store", manifest)
    assert Store.exists(tmp_path / "store")
    assert store.calibration is None
    store.commit_calibration(calibrations(manifest))
    store.commit_calibration(calibrations(manifest))
    opened = Store.open(tmp_path / "store")
    assert opened.manifest == manifest
    assert opened.calibration == calibrations(manifest)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    other = dict(calibrations(manifest))
    other["embed.weight"] = other["layers.0.up.weight"]
    with pytest.raises(StoreError, match="another calibration"):
        store.commit_calibration(other)


def test_differences_name_each_place() -> None:
    manifest = small_manifest({"code": 9, "prose": 4})
    assert manifest.differences(small_manifest({"code": 9, "prose": 4})) == []
    parameters = (*PARAMETERS[:2], Parameter("layers.0.norm.weight", (25,), 0, "norm"))
    other = Manifest({"weights": "x"}, {"corpus": "d"}, {"levels": 16}, {"code": 8}, 4, parameters, 7, 3)
    assert manifest.differences(other) == [
        "model.weights: 'm' in the run, 'x' now",
        "parameters: 1 of 3 differ, first 'layers.0.norm.weight'",
        "slices.code: 9 in the run, 8 now",
        "slices.prose: 4 in the run, None now",
    ]


def test_segments_become_visible_whole_and_only_by_commit(tmp_path: Path) -> None:
    manifest = small_manifest({"code": 18, "prose": 4})
    store = new_store(tmp_path, manifest)
    first, second = manifest.leaves("code")[:2]
    forks = {leaf.name: write_leaf(store.begin(leaf), manifest, leaf) for leaf in (first, second)}
    assert store.segments() == []
    # The later one comes back first, from a fork begun before either was committed.
    assert store.commit(forks[second.name], finished(second))
    assert Store.open(tmp_path).segments() == [finished(second)]
    assert store.commit(forks[first.name], finished(first))
    assert check_store(Store.open(tmp_path)) == {("code", first.range), ("code", second.range)}
    assert store.covered("code") == [(0, 8)]
    assert store.covered("prose") == []


def test_commit_is_idempotent(tmp_path: Path) -> None:
    manifest = small_manifest({"code": 18})
    store = new_store(tmp_path, manifest)
    leaf = manifest.leaves("code")[0]
    assert record_leaf(store, leaf) is True
    assert record_leaf(store, leaf) is False
    assert check_store(store) == {("code", leaf.range)}


def test_a_segment_without_good_samples_has_no_arrays(tmp_path: Path) -> None:
    manifest = small_manifest({"code": 40})
    leaf = next(leaf for leaf in manifest.leaves("code") if finished(leaf).samples == 0)
    store = new_store(tmp_path, manifest)
    assert record_leaf(store, leaf)
    (stored,) = Store.open(tmp_path).segments()
    assert (stored.samples, len(stored.set_aside)) == (0, 4)


def test_incomplete_overlapping_and_dropped_segments_are_refused(tmp_path: Path) -> None:
    manifest = small_manifest({"code": 18})
    store = new_store(tmp_path, manifest)
    leaf, other = manifest.leaves("code")[:2]
    fork = store.begin(leaf)
    book = calibrations(manifest)["embed.weight"]
    SegmentWriter(fork, "code", 0, 4).write(
        "embed.weight", (40, 24), book, BOOKS, [(0, leaf_records(leaf, PARAMETERS[0]))]
    )
    with pytest.raises(StoreError, match=r"1 tensors instead of 3.*layers\.0\.norm\.weight"):
        store.commit(fork, finished(leaf))
    assert record_leaf(store, leaf)
    wide = Segment("code", 2, 8, 6)
    with pytest.raises(StoreError, match="overlapping"):
        store.commit(write_leaf(store.begin(wide), manifest, wide), wide)
    fork = write_leaf(store.begin(other), manifest, other)
    store.drop(other)
    with pytest.raises(StoreError, match="dropped"):
        store.commit(fork, finished(other))
    assert check_store(Store.open(tmp_path)) == {("code", leaf.range)}


def test_cleaning_spares_what_forks_in_flight_have_written(tmp_path: Path) -> None:
    manifest = small_manifest({"code": 18})
    store = new_store(tmp_path, manifest)
    early, late, lost = manifest.leaves("code")[:3]
    fork = write_leaf(store.begin(early), manifest, early)
    write_leaf(store.begin(lost), manifest, lost)
    store.drop(lost)
    assert record_leaf(store, late)
    store.clean()
    assert store.commit(fork, finished(early))
    before = disk_bytes(tmp_path)
    freed = store.clean()
    assert freed > 2000, "the lost fork's chunks stay"
    assert disk_bytes(tmp_path) < before - 0.9 * freed
    assert len(check_store(Store.open(tmp_path))) == 2


def test_a_reader_keeps_its_snapshot_within_the_grace(tmp_path: Path) -> None:
    manifest = small_manifest({"code": 18})
    store = new_store(tmp_path, manifest)
    leaf = manifest.leaves("code")[0]
    record_leaf(store, leaf)
    reader = Store.open(tmp_path).reader()
    record_leaf(store, manifest.leaves("code")[1])
    store.clean(grace=timedelta(minutes=5))
    assert reader.segments == [finished(leaf)]
    assert np.array_equal(reader.read(leaf, "embed.weight", 0, 40), leaf_records(leaf, PARAMETERS[0]))


def test_chunks_of_zeros_are_stored(tmp_path: Path) -> None:
    shape = (600, 300)
    manifest = Manifest({}, {}, {}, {"code": 4}, 4, (Parameter("w", shape, 0, "linear"),))
    store = Store.create(tmp_path, manifest)
    leaf = manifest.leaves("code")[0]
    fork = store.begin(leaf)
    book = calibrations(small_manifest({"code": 4}))["embed.weight"]
    SegmentWriter(fork, "code", 0, 4).write("w", shape, book, BOOKS, [(0, np.zeros(shape, np.uint16))])
    store.commit(fork, Segment("code", 0, 4, 4))
    assert store.records(leaf, "w").nchunks_initialized == 1


def test_a_flipped_byte_is_an_error_that_names_tensor_and_chunk(tmp_path: Path) -> None:
    shape = (5000, 1000)  # two chunks
    manifest = Manifest({}, {}, {}, {"code": 4}, 4, (Parameter("w", shape, 0, "linear"),))
    store = Store.create(tmp_path, manifest)
    leaf = manifest.leaves("code")[0]
    records = (np.random.default_rng(0).integers(0, 4096, shape) << 4).astype(np.uint16)
    rows = band_rows(shape)
    assert rows == 2500
    fork = store.begin(leaf)
    book = calibrations(small_manifest({"code": 4}))["embed.weight"]
    SegmentWriter(fork, "code", 0, 4).write(
        "w", shape, book, BOOKS, ((first, records[first:last]) for first, last in bands(shape))
    )
    store.commit(fork, Segment("code", 0, 4, 4))
    reader = Store.open(tmp_path).reader()
    assert np.array_equal(reader.read(leaf, "w", 0, 5000), records)
    assert np.array_equal(reader.read(leaf, "w", 2400, 2600), records[2400:2600])
    newest = max((tmp_path / "chunks").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 16
    newest.write_bytes(data)
    reader = Store.open(tmp_path).reader()
    with pytest.raises(StoreDamagedError, match=r"w of segment code/0-4, chunk 1/0.*checksum"):
        reader.read(leaf, "w", 0, 5000)
    assert np.array_equal(reader.read(leaf, "w", 0, rows), records[:rows])
    for damage in (data[:100], None):
        newest.unlink()
        if damage is not None:
            newest.write_bytes(damage)
        with pytest.raises(StoreDamagedError, match="chunk 1/0"):
            Store.open(tmp_path).reader().read(leaf, "w", 0, 5000)


def test_opening_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tinyonn record"):
        Store.open(tmp_path / "nothing")
    store = new_store(tmp_path / "store", small_manifest({"code": 4}))
    with pytest.raises(InputError, match="already"):
        Store.create(store.location, store.manifest)
    with pytest.raises(StoreError, match="reading only"):
        Store.open(store.location).begin(store.manifest.leaves("code")[0])
    for path in (tmp_path / "store" / "snapshots").iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(StoreDamagedError):
        Store.open(store.location)


def test_a_store_of_a_newer_icechunk_is_refused_by_its_name(tmp_path: Path) -> None:
    """Of Icechunk 2's own layout, and of a layout of this Icechunk with a format to come."""
    two = tmp_path / "two"
    (two / "snapshots").mkdir(parents=True)
    (two / "repo").write_bytes(b"ICE")
    if not hasattr(icechunk, "SpecVersion"):
        with pytest.raises(InputError, match=r"written by a newer Icechunk .* record again"):
            Store.exists(two)
    new_store(tmp_path / "later", small_manifest({"code": 9}))
    for path in (tmp_path / "later" / "snapshots").iterdir():
        head = bytearray(path.read_bytes())
        assert head[:12] == "ICE\U0001f9caCHUNK".encode()
        head[36] = 9  # the format's version
        path.write_bytes(head)
    with pytest.raises(InputError, match=r"written by a newer Icechunk .* record again"):
        Store.open(tmp_path / "later")


@pytest.mark.parametrize("name", ["code", "code/1", "code/4-2", "/1-2", "code/a-b"])
def test_names_of_segments(name: str) -> None:
    assert parse_segment("a/b/0-16") == Segment("a/b", 0, 16)
    with pytest.raises(StoreDamagedError):
        parse_segment(name)
