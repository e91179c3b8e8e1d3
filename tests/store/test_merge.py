from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.invariants import check_live, check_ranges, check_store, finished, small_manifest
from tests.store.worlds import disk_bytes, new_store, record_leaf
from tinyonn.errors import StoreDamagedError
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.merge import merge_ready
from tinyonn.store.repository import Store
from tinyonn.store.tree import Node, merge_tree, next_segment, ready_merges


def merge_all(manifest: Manifest, live: list[Segment]) -> list[Segment]:
    """The live segments after all merges that are ready, names and samples only."""
    while ready := ready_merges(manifest, live):
        for merge in ready:
            live = [segment for segment in live if segment not in merge.children] + [merge.merged]
    return sorted(live)


@given(count=st.integers(1, 300), max_live=st.integers(1, 6))
def test_filled_in_order_a_tree_never_leaves_more_than_max_live(count: int, max_live: int) -> None:
    root = merge_tree(count, max_live)
    inner = list(root.inner())
    assert (root.first, root.last) == (0, count)
    assert all(1 < len(node.children) <= max_live + 1 for node in inner)
    live: list[tuple[int, int]] = []
    left = list(inner)
    for leaf in range(count):
        live.append((leaf, leaf + 1))
        while (
            left
            and [(child.first, child.last) for child in left[0].children] == live[-len(left[0].children) :]
        ):
            node = left.pop(0)
            live[-len(node.children) :] = [(node.first, node.last)]
        assert len(live) <= max_live
    assert live == [(0, count)]


def rounding(root: Node) -> float:
    """Variance of the result in units of one rounding's, beside that of the leaves."""
    return sum(((node.last - node.first) / (root.last - root.first)) ** 2 for node in root.inner())


def test_the_tree_rounds_less_than_a_chain() -> None:
    assert merge_tree(1, 3) == Node(0, 1)
    assert merge_tree(4, 3).depth == 1, "four leaves fit beside each other: one rounding"
    assert rounding(merge_tree(64, 3)) < 1.75
    assert rounding(merge_tree(64, 1)) > 20, "one place gives the chain"
    assert merge_tree(64, 3).depth <= 10


@pytest.mark.parametrize(("count", "max_live"), [(5, 2), (8, 3), (7, 3), (9, 2)])
def test_no_other_tree_is_better(count: int, max_live: int) -> None:
    def best(leaves: int, places: int) -> float:
        """Least cost over all trees, by plain enumeration."""
        return 0.0 if leaves == 1 else (leaves / count) ** 2 + 0.01 + siblings(leaves, places, first=True)

    def siblings(leaves: int, places: int, first: bool = False) -> float:
        options = [0.0] if leaves == 1 else []
        if places > 0:
            for size in range(1, leaves if first else leaves + 1):
                rest = siblings(leaves - size, places - 1) if size < leaves else 0.0
                options.append(best(size, places) + rest)
        return min(options, default=float("inf"))

    tree = merge_tree(count, max_live)
    assert rounding(tree) + 0.01 * len(list(tree.inner())) == pytest.approx(best(count, max_live))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(order=st.permutations(range(9)), pauses=st.sets(st.integers(0, 8)), max_live=st.integers(1, 3))
def test_any_order_of_commits_and_any_timing_of_merges_give_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], pauses: set[int], max_live: int
) -> None:
    manifest = small_manifest({"code": 23, "prose": 9}, max_live=max_live)
    leaves = [leaf for name in manifest.slices for leaf in manifest.leaves(name)]
    store = new_store(tmp_path_factory.mktemp("order") / "store", manifest)
    for step, index in enumerate(order):
        record_leaf(store, leaves[index])
        if step in pauses:
            merge_ready(store)
    merge_ready(store)
    assert [segment.name for segment in store.segments()] == ["code/0-23", "prose/0-9"]
    assert len(check_store(Store.open(store.location))) == len(leaves)  # the bits: against plain NumPy


def test_a_partial_run_depends_on_the_set_of_leaves_alone() -> None:
    manifest = small_manifest({"code": 200})
    leaves = [finished(leaf) for leaf in manifest.leaves("code")]
    chosen = random.Random(3).sample(leaves, 31)
    at_once = merge_all(manifest, chosen)
    live: list[Segment] = []
    for leaf in chosen:
        live = merge_all(manifest, [*live, leaf])
    assert live == at_once
    check_ranges(manifest, live)


def test_a_merge_that_is_stopped_leaves_everything_as_it_was(tmp_path: Path) -> None:
    manifest = small_manifest({"code": 16})
    store = new_store(tmp_path, manifest)
    for leaf in manifest.leaves("code"):
        record_leaf(store, leaf)
    before = store.segments()
    asked = iter([False, False, True])
    assert merge_ready(store, stop=lambda: next(asked)) == 0
    assert store.segments() == before
    check_store(Store.open(tmp_path))
    assert merge_ready(store) == 1
    check_store(Store.open(tmp_path))


def test_a_damaged_child_is_not_averaged(tmp_path: Path) -> None:
    manifest = small_manifest({"code": 16})
    store = new_store(tmp_path, manifest)
    for leaf in manifest.leaves("code"):
        record_leaf(store, leaf)
    newest = max((tmp_path / "chunks").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    data = bytearray(newest.read_bytes())
    data[60] ^= 1
    newest.write_bytes(data)
    store = Store.open(tmp_path, read_only=False)
    with pytest.raises(StoreDamagedError, match=r"\.weight of segment code/\d+-\d+, chunk 0/0"):
        merge_ready(store)
    assert len(store.segments()) == 4


@pytest.mark.parametrize("slices", [{"code": 64}, {"code": 31, "prose": 17, "sql": 16}])
def test_live_segments_and_disk_stay_bounded_over_64_segments(tmp_path: Path, slices: dict[str, int]) -> None:
    """Two workers; one holds its first segment until nothing else is left to do."""
    manifest = small_manifest(slices, segment_size=1)
    store = new_store(tmp_path, manifest)
    straggler = next_segment(manifest, [], [], 2)
    assert straggler is not None
    flying, sizes, most = [straggler], [], 0
    while (leaf := next_segment(manifest, store.segments(), flying, 2)) is not None:
        assert record_leaf(store, leaf)
        check_live(manifest, store.segments(), workers=2)
        merge_ready(store)
        store.clean()
        sizes.append(disk_bytes(tmp_path))
        most = max(most, len(store.segments()))
    assert sum(last - first for name in slices for first, last in store.covered(name)) == 64
    merge_ready(store)
    store.clean()
    assert [segment.name for segment in store.segments()] == [f"{name}/0-{n}" for name, n in slices.items()]
    check_store(store)
    assert most <= len(slices) * (manifest.max_live + 2)
    one = 6500  # bytes of one segment with its metadata
    assert max(sizes) <= (most + 2) * one
    assert disk_bytes(tmp_path) <= (len(slices) + 2) * one


@settings(max_examples=30, deadline=None)
@given(
    slices=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    speeds=st.lists(st.floats(0.05, 1), min_size=1, max_size=5),
    max_live=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_dealing_to_workers_of_any_speed_keeps_the_bound_and_ends(
    slices: list[int], speeds: list[float], max_live: int, seed: int
) -> None:
    manifest = small_manifest({f"s{i}": count for i, count in enumerate(slices)}, 1, max_live)
    chance = random.Random(seed)
    clock = 0.0
    live: list[Segment] = []
    work: dict[int, tuple[float, Segment]] = {}
    covered = 0
    while covered < sum(slices):
        for worker, speed in enumerate(speeds):
            if worker not in work:
                flying = [segment for _, segment in work.values()]
                leaf = next_segment(manifest, live, flying, len(speeds))
                if leaf is not None:
                    work[worker] = (clock + chance.uniform(0.5, 1.5) / speed, leaf)
        worker = min(work, key=lambda item: work[item][0])
        clock, leaf = work.pop(worker)
        if not any(segment.contains(leaf) for segment in live):
            live = merge_all(manifest, [*live, finished(leaf)])
            covered += 1
        check_live(manifest, live, len(speeds))
    assert next_segment(manifest, live, [], len(speeds)) is None
    assert len(live) == len(slices)


def test_averaging_is_right_to_within_a_rounding(tmp_path: Path) -> None:
    """Against float64 means of the leaves, not against the same steps again."""
    manifest = small_manifest({"code": 16})
    store = new_store(tmp_path, manifest)
    leaves = manifest.leaves("code")
    for leaf in leaves:
        record_leaf(store, leaf)
    reader = store.reader()
    name, shape = manifest.parameters[0].name, manifest.parameters[0].shape
    done = [segment for segment in reader.segments if segment.samples]
    weights = np.array([segment.samples for segment in done], float)
    decoded = [
        reader.codebooks(segment, name)[0][reader.read(segment, name, 0, shape[0]) >> 12] for segment in done
    ]
    mean = np.tensordot(weights / weights.sum(), np.stack(decoded), 1)
    merge_ready(store)
    (root,) = store.segments()
    codebook = store.reader().codebooks(root, name)[0]
    merged = codebook[store.reader().read(root, name, 0, shape[0]) >> 12]
    nearest = np.abs(codebook[:, None, None] - mean).min(axis=0)
    fixed_point = 2 * ((codebook[-1] - codebook[0]) / 4096 + np.diff(codebook).max() / 256)
    assert np.all(np.abs(merged - mean) <= nearest + fixed_point)
