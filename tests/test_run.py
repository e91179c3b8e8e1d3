from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.invariants import finished, leaf_codebooks, leaf_records, small_manifest
from tests.store.worlds import new_store, record_leaf
from tinyonn.errors import InputError, StoreDamagedError
from tinyonn.run import open_run
from tinyonn.store.manifest import Segment
from tinyonn.store.merge import merge_ready
from tinyonn.store.records import unpack

MANIFEST = small_manifest({"code": 20, "prose": 12})


def brute_mean(leaves: list[Segment], index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Weighted mean of the decoded leaves, one at a time."""
    parameter = MANIFEST.parameters[index]
    total = np.zeros((3, *parameter.shape))
    for leaf in leaves:
        codes = unpack(leaf_records(leaf, parameter))[:3]
        books = leaf_codebooks(leaf, parameter)
        total += finished(leaf).samples * np.stack(
            [book[code] for book, code in zip(books, codes, strict=True)]
        )
    return total / sum(finished(leaf).samples for leaf in leaves)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    store = new_store(tmp_path / "store", MANIFEST)
    for name in MANIFEST.slices:
        for leaf in MANIFEST.leaves(name):
            record_leaf(store, leaf)
    return tmp_path


@pytest.mark.parametrize("index", [0, 1, 2])
def test_means_are_weighted_by_samples(recorded: Path, index: int) -> None:
    run = open_run(recorded)
    name = run.parameters[index].name
    leaves = {slice_name: MANIFEST.leaves(slice_name) for slice_name in MANIFEST.slices}
    everything = [leaf for some in leaves.values() for leaf in some]
    assert run.mean(name).dtype == np.float32
    np.testing.assert_allclose(run.mean(name), brute_mean(everything, index), rtol=1e-6)
    np.testing.assert_allclose(run.mean(name, slice="prose"), brute_mean(leaves["prose"], index), rtol=1e-6)


def test_records_are_the_nearest_codes(recorded: Path) -> None:
    run = open_run(recorded)
    parameter = run.parameters[0]
    book = run.codebooks(parameter.name)
    codes = unpack(run.records(parameter.name))
    mean = brute_mean([leaf for name in MANIFEST.slices for leaf in MANIFEST.leaves(name)], 0)
    for s in range(3):
        off = np.abs(book[s][codes[s]] - mean[s])
        best = np.abs(book[s][:, None, None] - mean[s]).min(axis=0)
        assert np.all(off <= best + 2 * np.diff(book[s]).max() / 256)
        masses = np.bincount(codes[s].ravel(), minlength=16) / codes[s].size  # equal mass: each code as often
        assert np.abs(16 * masses - 1).max() < 0.6
    assert not codes[3].any()


def test_counts_and_lists(recorded: Path) -> None:
    run = open_run(recorded / "store")
    leaves = [finished(leaf) for name in MANIFEST.slices for leaf in MANIFEST.leaves(name)]
    assert run.samples == sum(leaf.samples for leaf in leaves)
    assert run.parameters == list(MANIFEST.parameters)
    assert len(run.set_aside) == 32 - run.samples
    assert {"index", "reason"} == run.set_aside[0].keys()


def test_a_run_opened_before_a_merge_reads_on(recorded: Path) -> None:
    run = open_run(recorded)
    before = run.mean("embed.weight")
    from tinyonn.store.repository import Store

    store = Store.open(recorded / "store", read_only=False)
    reader = run.store.reader()
    assert merge_ready(store) > 0
    with pytest.raises(StoreDamagedError):  # the snapshot itself is gone ...
        reader.read(reader.segments[0], "embed.weight", 0, 40)
    after = run.mean("embed.weight")  # ... and the run looks again
    assert [segment.name for segment in run.segments] == ["code/0-20", "prose/0-12"]
    parameter = MANIFEST.parameters[0]
    leaves = [leaf for name in MANIFEST.slices for leaf in MANIFEST.leaves(name)]
    steps = np.max([np.diff(leaf_codebooks(leaf, parameter)).max(axis=1) for leaf in leaves], axis=0)
    assert np.all(np.abs(after - before).max(axis=(1, 2)) < 2 * steps)


def test_what_does_not_exist_yet_is_said(recorded: Path, tmp_path: Path) -> None:
    run = open_run(recorded)
    for ask, remedy in ((run.rows, "score"), (run.affinity, "score"), (run.labels, "cluster")):
        with pytest.raises(InputError, match=f"run `tinyonn {remedy}` first"):
            ask("embed.weight")
    with pytest.raises(InputError, match=r"no parameter 'embed'.*embed\.weight"):
        run.mean("embed")
    with pytest.raises(InputError, match=r"no slice 'sql'.*code, prose"):
        run.mean("embed.weight", slice="sql")
    with pytest.raises(InputError, match="tinyonn record"):
        open_run(tmp_path / "nowhere")


def test_a_run_without_samples(tmp_path: Path) -> None:
    new_store(tmp_path / "store", MANIFEST)
    run = open_run(tmp_path)
    assert run.samples == 0
    with pytest.raises(InputError, match="tinyonn record"):
        run.mean("embed.weight")
    shutil.rmtree(tmp_path / "store" / "snapshots")
    with pytest.raises(StoreDamagedError):
        open_run(tmp_path)
