"""What must hold of a store at any moment, and what its records must be.

Used by unit, state-machine and crash tests alike. `expected_records` computes a merged segment's bits in
plain NumPy, straight from the leaves, without the code under test except the order of merging.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

import numpy as np

from tinyonn.dense.parameters import Parameter
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.records import (
    VALUE_STEPS,
    Float64,
    TensorCalibration,
    UInt16,
    dither_seed,
    value_tables,
)
from tinyonn.store.repository import Store
from tinyonn.store.tree import merges

PARAMETERS = (
    Parameter("embed.weight", (40, 24), None, "embedding"),  # 1.4 KB on disk: a chunk file of its own
    Parameter("layers.0.up.weight", (24, 33), 0, "linear"),
    Parameter("layers.0.norm.weight", (24,), 0, "norm"),  # 40 bytes on disk: inlined in Icechunk's manifest
)


def small_manifest(
    slices: dict[str, int], segment_size: int = 4, max_live: int = 3, seed: int = 7
) -> Manifest:
    """A run of three small tensors."""
    return Manifest(
        {"weights": "m"}, {"corpus": "d"}, {"levels": 16}, slices, segment_size, PARAMETERS, seed, max_live
    )


def calibrations(manifest: Manifest) -> dict[str, TensorCalibration]:
    """Different for each tensor."""
    return {p.name: TensorCalibration(200 + index, 190, -3) for index, p in enumerate(manifest.parameters)}


def leaf_codebooks(leaf: Segment, parameter: Parameter) -> Float64:
    """Uneven, strictly increasing codebooks [3, 16]: a function of the leaf's and of the tensor's name alone."""
    rng = np.random.default_rng(dither_seed(2, leaf.name, parameter.name))
    books = np.cumsum(rng.uniform(0.3, 1.0, (3, 16)), axis=1)
    books[2] /= books[2, -1]
    return np.asarray(books)


def good_samples(leaf: Segment) -> int:
    """Every fifth leaf or so has no good sample, others lose one now and then."""
    kind = (leaf.first * 7 + len(leaf.slice)) % 5
    return 0 if kind == 3 else leaf.last - leaf.first - (kind == 1)


def finished(leaf: Segment) -> Segment:
    """A leaf as its worker would report it."""
    good = good_samples(leaf)
    lost = tuple(
        {"index": leaf.first + i, "reason": "loss is NaN"} for i in range(leaf.last - leaf.first - good)
    )
    return Segment(leaf.slice, leaf.first, leaf.last, good, lost)


def leaf_records(leaf: Segment, parameter: Parameter) -> UInt16:
    """Incompressible records of a leaf: a function of its name and of the tensor's alone."""
    rng = np.random.default_rng(dither_seed(1, leaf.name, parameter.name))
    return (rng.integers(0, 4096, parameter.shape) << 4).astype(np.uint16)


def dither(seed: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """SplitMix64 of the weight's index, as in its paper."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def expected_records(manifest: Manifest, segment: Segment, parameter: Parameter) -> UInt16:
    """What a live segment must hold, computed from its leaves."""
    return _expected(_Key(manifest), segment.slice, segment.range, parameter)[2]


def expected_codebooks(manifest: Manifest, segment: Segment, parameter: Parameter) -> Float64:
    """The codebooks that a live segment must have, computed from its leaves."""
    return _expected(_Key(manifest), segment.slice, segment.range, parameter)[1]


class _Key:
    """A manifest as a dictionary key: what decides the order and the seeds of merging."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.value = (
            tuple(manifest.slices.items()),
            tuple(manifest.grown.items()),
            manifest.segment_size,
            manifest.max_live,
            manifest.seed,
        )

    def __hash__(self) -> int:
        return hash(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.value == self.value


@lru_cache(maxsize=4096)
def _expected(
    key: _Key, slice: str, span: tuple[int, int], parameter: Parameter
) -> tuple[int, Float64, UInt16]:
    manifest = key.manifest
    leaves = {leaf.range: leaf for leaf in manifest.leaves(slice)}
    if span in leaves:
        leaf = leaves[span]
        return good_samples(leaf), leaf_codebooks(leaf, parameter), leaf_records(leaf, parameter)
    children = dict(merges(manifest, slice))[span]
    parts = [part for part in (_expected(key, slice, child, parameter) for child in children) if part[0]]
    samples = sum(weight for weight, _, _ in parts)
    if len(parts) < 2:
        return parts[0] if parts else (0, np.zeros((3, 16)), np.zeros(parameter.shape, np.uint16))
    books = np.tensordot([weight / samples for weight, _, _ in parts], [book for _, book, _ in parts], 1)
    tables, low, scale = value_tables(books)
    name = f"{slice}/{span[0]}-{span[1]}"
    noise = dither(dither_seed(manifest.seed, name, parameter.name), parameter.size).reshape(parameter.shape)
    ends = [0, *manifest.grown.get(slice, ()), manifest.slices[slice]]
    nearest = span[1] in ends and span[0] in (0, ends[ends.index(span[1]) - 1])
    out = np.zeros(parameter.shape, np.uint64)
    for s, shift in enumerate((12, 8, 4)):
        mean = np.zeros(parameter.shape)
        for weight, book, records in parts:
            mean = mean + (book[s] * (weight / samples))[(records >> shift) & 15]
        index = np.clip(((mean - low[s]) * scale[s]).astype(np.int64), 0, VALUE_STEPS - 1)
        extra = np.uint64(128) if nearest else (noise >> np.uint64(8 * s)) & np.uint64(255)
        out |= ((tables[s][index].astype(np.uint64) + extra) >> np.uint64(8)) << np.uint64(shift)
    return samples, books, out.astype(np.uint16)


def check_ranges(manifest: Manifest, segments: Iterable[Segment]) -> set[tuple[str, tuple[int, int]]]:
    """Live segments are disjoint unions of leaves, with their samples; returns the covered leaves."""
    seen: set[tuple[str, tuple[int, int]]] = set()
    for segment in segments:
        leaves = [leaf for leaf in manifest.leaves(segment.slice) if segment.contains(leaf)]
        assert leaves and (leaves[0].first, leaves[-1].last) == segment.range, (
            f"{segment.name} is not made of leaves"
        )
        places = {(leaf.slice, leaf.range) for leaf in leaves}
        assert not places & seen, f"{segment.name} is covered twice"
        seen |= places
        done = [finished(leaf) for leaf in leaves]
        assert segment.samples == sum(leaf.samples for leaf in done), segment.name
        assert list(segment.set_aside) == [item for leaf in done for item in leaf.set_aside], segment.name
    return seen


def check_records(store: Store) -> None:
    """Every live segment holds every tensor, bit for bit what follows from its leaves."""
    reader = store.reader()
    for segment in reader.segments:
        for parameter in store.manifest.parameters if segment.samples else ():
            stored = reader.read(segment, parameter.name, 0, parameter.shape[0])
            expected = expected_records(store.manifest, segment, parameter)
            assert np.array_equal(stored, expected), f"{segment.name}: {parameter.name} has other bits"
            books = expected_codebooks(store.manifest, segment, parameter)
            np.testing.assert_array_equal(reader.codebooks(segment, parameter.name), books)


def check_store(store: Store) -> set[tuple[str, tuple[int, int]]]:
    """All of the above; returns the covered leaves."""
    seen = check_ranges(store.manifest, store.segments())
    for name in store.manifest.slices:
        spans = store.covered(name)
        assert all(a[1] < b[0] for a, b in pairwise(spans)), f"{name}: {spans} not joined"
        covered = sum(last - first for first, last in spans)
        assert covered == sum(last - first for slice_name, (first, last) in seen if slice_name == name)
    check_records(store)
    return seen


def check_live(manifest: Manifest, segments: Iterable[Segment], workers: int) -> None:
    """At most max_live segments per slice and one per worker."""
    segments = list(segments)
    for name in manifest.slices:
        live = [segment.name for segment in segments if segment.slice == name]
        assert len(live) <= manifest.max_live + workers, f"{len(live)} live: {live}"
