"""The pass over all weights, against NumPy one weight at a time."""

from __future__ import annotations

import numpy as np
import pytest

from tinyonn.cluster import labels
from tinyonn.cluster.labels import Moved
from tinyonn.cluster.report import churn_of


@pytest.mark.parametrize(("count", "features", "slices"), [(2000, 7, 7), (511, 4, 2), (513, 1, 1), (5, 9, 3)])
def test_every_weight_gets_the_nearest_centre(count: int, features: int, slices: int) -> None:
    generator = np.random.default_rng(features)
    cells = 30
    table = generator.uniform(-3.5, 1, (features, 64)).astype(np.float32)
    bins = generator.integers(0, 64, (features, count)).astype(np.uint16)
    points = np.take_along_axis(table, bins.astype(np.int64), 1).T.astype(np.float64)
    means = generator.uniform(-3.5, 1, (cells, features))
    handicaps, away = generator.uniform(0, 1, cells), generator.uniform(0, 1, cells)
    padded = np.zeros((features + -features % labels.AT_A_TIME, cells), np.float32)
    padded[:features] = means.T
    fixed = (np.square(means).sum(1) + handicaps + away + 1).astype(np.float32)
    found = np.zeros(count, np.uint8)
    sums = np.zeros((2, cells), np.int64), np.zeros((cells, slices)), np.zeros(1)
    labels.find_nearest(bins, table, (padded, fixed, away), slices, found, sums)
    far = np.square(points[:, None] - means).sum(2) + away
    least = (far + handicaps).min(1)
    own = (far + handicaps)[np.arange(count), found]
    assert np.allclose(own, least, rtol=2**-14, atol=1e-4)
    assert (found == (far + handicaps).argmin(1)).mean() > 0.995
    assert sums[0][0].tolist() == np.bincount(found, minlength=cells).tolist()
    needed = (points[:, :slices] <= 0).any(1)
    assert sums[0][1].tolist() == np.bincount(found[needed], minlength=cells).tolist()
    for cell in range(cells):
        assert np.allclose(sums[1][cell], points[needed & (found == cell), :slices].sum(0), atol=1e-3)
    assert sums[2][0] == pytest.approx(far[np.arange(count), found].sum(), rel=1e-5)


def test_of_equally_near_cells_the_lowest_number_wins() -> None:
    bins, table = np.zeros((2, 3), np.uint16), np.zeros((2, 1), np.float32)
    means = np.zeros((4, 3), np.float32)
    means[:2] = [[2, 1, 1], [2, 1, 1]]
    found, sums = np.zeros(3, np.uint8), (np.zeros((2, 3), np.int64), np.zeros((3, 2)), np.zeros(1))
    fixed = np.array([8, 2, 2], np.float32) + 1
    labels.find_nearest(bins, table, (means, fixed, np.zeros(3)), 2, found, sums)
    assert found.tolist() == [1, 1, 1]


def test_churn_counts_weights_that_changed_cell() -> None:
    moves = np.zeros((256, 256), np.int64)
    moves[0, 0], moves[0, 1], moves[1, 1], moves[255, 255] = 6, 2, 12, 1000
    churn = churn_of({"w": Moved.of(moves)}, 2)
    assert churn.share == pytest.approx(2 / 20)
    assert churn.cells == pytest.approx([0.25, 0.0])
