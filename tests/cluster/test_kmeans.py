"""Weighted k-means over distinct rows: exactly scikit-learn's over all rows, and exact at any number of them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans as Reference

from tinyonn.cluster.features import CODE_AXES, Space, space_of
from tinyonn.cluster.kmeans import Assignment, KMeans, Rows
from tinyonn.config import FeatureWeights
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.store.records import Float64

PARAMETERS = [
    *(Parameter(f"layers.{i}.attn.q_proj.weight", (8, 8), i, "linear") for i in range(4)),
    *(Parameter(f"layers.{i}.mlp.up_proj.weight", (8, 8), i, "linear") for i in range(4)),
]
SLICES = ("code", "prose", "sums")
WEIGHTS = FeatureWeights(  # such that no two centres are equally near
    score=1.013,
    act=0.971,
    grad=1.097,
    freq=0.511,
    slice=1.913,
    layer=0.537,
    kind=0.261,
    row=0.417,
    column=0.303,
)


def world(seed: int, rows: int = 300, most: int = 5) -> tuple[Rows, Space]:
    """Random distinct rows in the places of eight tensors."""
    rng = np.random.default_rng(seed)
    space = space_of(PARAMETERS, PARAMETERS, SLICES, WEIGHTS)
    keys, scores, offsets, places = [], [], [0], []
    for parameter in PARAMETERS:
        code = np.unique(rng.normal(2000, 700, rows).astype(int) & 4095)
        affinity = rng.integers(0, 3, code.size) << 4 | rng.integers(0, 16, code.size)
        keys.append((code << 8 | affinity).astype(np.uint32))
        scores.append((code >> 8).astype(np.uint8))
        offsets.append(offsets[-1] + code.size)
        places.append(space.place(parameter, int(rng.integers(16)), int(rng.integers(16))))
    counts = rng.integers(1, most + 1, offsets[-1]).astype(np.uint32)
    return Rows(
        np.concatenate(keys), np.concatenate(scores), counts, np.array(offsets), np.stack(places)
    ), space


def expanded(rows: Rows, space: Space) -> Float64:
    """Every row as often as it counts, scaled: float64 [total, axes]."""
    matrix = rows.matrix(space, np.arange(rows.keys.size)) * space.scale
    return np.repeat(matrix, rows.counts.astype(int), axis=0)


def inertia_of(rows: Rows, space: Space, centres: Float64) -> tuple[float, np.ndarray]:
    """Brute force, in float64."""
    matrix = rows.matrix(space, np.arange(rows.keys.size)) * space.scale
    distances = ((matrix[:, None, :] - (centres * space.scale)[None]) ** 2).sum(2)
    return float((distances.min(1) * rows.counts).sum()), distances.argmin(1)


def check_sums(rows: Rows, space: Space, found: Assignment) -> None:
    """Sizes and sums are those of the labels, to the unit."""
    matrix = rows.matrix(space, np.arange(rows.keys.size)).astype(np.int64)
    for cell in range(found.sizes.size):
        inside = found.labels == cell
        assert found.sizes[cell] == rows.counts[inside].sum()
        assert np.array_equal(found.sums[cell], (matrix[inside] * rows.counts[inside][:, None]).sum(0))


@pytest.mark.parametrize("seed", range(3))
def test_the_same_labels_and_inertia_as_scikit_learn_on_all_rows(seed: int) -> None:
    rows, space = world(seed)
    kmeans = KMeans(rows, space, 2)
    start = kmeans.seed(12, seed)
    ours = kmeans.settle(start, 300, 0.0)
    theirs = Reference(12, init=start * space.scale, n_init=1, tol=0, max_iter=300, algorithm="lloyd")
    labels = theirs.fit_predict(expanded(rows, space))
    assert ours.converged
    assert np.mean(np.repeat(ours.last.labels, rows.counts.astype(int)) == labels) >= 0.99999
    assert ours.last.inertia == pytest.approx(theirs.inertia_, rel=1e-9)
    np.testing.assert_allclose(ours.centres * space.scale, theirs.cluster_centers_, atol=1e-9)


def test_a_pass_finds_the_nearest_centre_of_every_row() -> None:
    rows, space = world(5)
    centres = np.random.default_rng(0).uniform(0, 10, (40, space.axes))
    found = KMeans(rows, space).assign(centres)
    inertia, labels = inertia_of(rows, space, centres)
    assert np.array_equal(found.labels, labels)
    assert found.inertia == pytest.approx(inertia, rel=1e-12)
    check_sums(rows, space, found)


def test_of_equally_near_cells_the_lowest_number_wins() -> None:
    rows, space = world(5)
    centres = np.random.default_rng(0).uniform(0, 10, (20, space.axes))
    found = KMeans(rows, space).assign(np.concatenate([centres, centres[::-1]]))
    assert np.array_equal(found.labels, inertia_of(rows, space, centres)[1])


def test_bounds_skip_no_row_that_would_change() -> None:
    """After any number of iterations the labels are those of a full pass with the centres before the last move."""
    rows, space = world(7, rows=900)
    kmeans = KMeans(rows, space)
    centres = kmeans.seed(25, 1)
    for iterations in (1, 2, 3, 8, 20):
        ours = kmeans.settle(centres, iterations, 0.0)
        plain = centres
        for _ in range(iterations):
            found = kmeans.assign(plain)
            plain = found.sums / np.maximum(found.sizes, 1)[:, None]
        np.testing.assert_array_equal(ours.centres, plain)


def test_threads_change_no_bit() -> None:
    rows, space = world(3, rows=2000)
    results = []
    for threads in (1, 2, 5):
        kmeans = KMeans(rows, space, threads)
        clustering = kmeans.settle(kmeans.warm_up(kmeans.seed(20, 4)), 50, 1e-4)
        results.append(
            (clustering.centres.tobytes(), clustering.last.labels.tobytes(), clustering.last.inertia)
        )
    assert results[0] == results[1] == results[2]


def test_a_batch_is_every_sixteenth_row() -> None:
    rows, space = world(2)
    kmeans = KMeans(rows, space)
    centres = kmeans.seed(6, 0)
    sizes = [kmeans.assign(centres, first=batch, step=16).sizes for batch in range(16)]
    assert np.array_equal(np.sum(sizes, axis=0), kmeans.assign(centres).sizes)


def test_an_empty_cell_goes_to_the_farthest_row() -> None:
    rows, space = world(1)
    kmeans = KMeans(rows, space)
    start = kmeans.seed(8, 0)
    start[5] = 1e3  # nowhere near any row
    clustering = kmeans.settle(start, 300, 0.0)
    assert clustering.converged
    assert clustering.last.sizes.min() > 0


def test_four_billion_rows_move_a_centre_as_they_should_where_float32_does_not() -> None:
    """Running means in float32 stand still once a centre counts many rows; integer sums and float64 do not."""
    space = space_of(PARAMETERS[:1], PARAMETERS, SLICES, FeatureWeights())
    keys = np.array([0x555 << 8, 0x666 << 8], np.uint32)
    counts = np.array([4_000_000_000, 4_000_001], np.uint32)
    rows = Rows(
        keys, np.array([5, 6], np.uint8), counts, np.array([0, 2]), space.place(PARAMETERS[0], 0, 0)[None]
    )
    found = KMeans(rows, space).assign(rows.matrix(space, np.array([0])))
    total = 4_004_000_001
    assert found.sizes[0] == total
    exact = (5 * 4_000_000_000 + 6 * 4_000_001) / total
    assert found.sums[0, 0] / found.sizes[0] == exact
    centre, seen = np.float32(5), np.float32(0)
    for value, count in ((5, 4_000_000_000), (6, 4_000_001)):
        for _ in range(100):
            seen += np.float32(count / 100)
            centre += np.float32(count / 100) / seen * (np.float32(value) - centre)
    drift32 = abs(float(centre) - exact)
    one_by_one = np.float32(5)
    for k in range(100_000):  # the end of such a stream, row by row: each step is rounded away
        one_by_one += (np.float32(6) - one_by_one) / np.float32(4_000_000_000 + k)
    assert float(one_by_one) == 5.0
    assert abs(found.sums[0, 0] / found.sizes[0] - exact) < 1e-15 < drift32


@pytest.mark.parametrize("cap", [1.2, 2.0])
def test_a_cap_bounds_the_cells_and_says_what_it_costs(cap: float) -> None:
    rows, space = world(4, rows=3000, most=3)
    kmeans = KMeans(rows, space, 2)
    free = kmeans.settle(kmeans.seed(16, 0), 100, 0.0)
    capped, cost = kmeans.balance(free, cap)
    limit = np.ceil(cap * rows.total / 16)
    assert free.last.sizes.max() > 1.2 * rows.total / 16
    assert capped.last.sizes.max() <= limit
    assert capped.last.sizes.sum() == rows.total
    assert cost == pytest.approx(capped.last.inertia / free.last.inertia)
    assert cost >= 1
    check_sums(rows, space, capped.last)


def test_more_cells_than_distinct_rows_are_refused() -> None:
    rows, space = world(0, rows=3)
    with pytest.raises(InputError, match=rf"cluster.cells = 200.*only {rows.keys.size} distinct rows"):
        KMeans(rows, space).seed(200, 0)


def test_features_of_a_row_by_hand() -> None:
    space = space_of(PARAMETERS, PARAMETERS, SLICES, FeatureWeights())
    key = np.array([0xABC << 8 | 2 << 4 | 9], np.uint32)
    rows = Rows(
        key,
        np.array([13], np.uint8),
        np.ones(1, np.uint32),
        np.array([0, 1]),
        space.place(PARAMETERS[6], 3, 4)[None],
    )
    (row,) = rows.matrix(space, np.array([0]))
    assert dict(zip(space.names, row.tolist(), strict=True)) == {
        "score": 13,
        "act": 0xA,
        "grad": 0xB,
        "freq": 0xC,
        "slice code": 0,
        "slice prose": 0,
        "slice sums": 9,
        "layer": 2,
        "kind q_proj": 0,
        "kind up_proj": 1,
        "row": 3,
        "column": 4,
    }
    assert space.names[CODE_AXES] == "slice code"
    assert space.largest_distance >= ((row * space.scale) ** 2).sum()
