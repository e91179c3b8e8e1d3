"""Centres: k-means of even sizes, and the numbers that cells keep."""

from __future__ import annotations

import numpy as np

from tinyonn.cluster.centres import Centres, find_centres, match_numbers, stored_means


def blobs() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    wanted = np.array([[-3, -3], [-2, 0], [0, -1]], np.float32)
    drawn = wanted[generator.integers(0, 3, 900)] + 0.01 * generator.standard_normal((900, 2))
    return wanted, drawn.astype(np.float32)


def uneven() -> np.ndarray:
    """Needs that go together, most of them small."""
    generator = np.random.default_rng(0)
    common, own = generator.standard_normal((8000, 1)), generator.standard_normal((8000, 3))
    return -np.abs(common + 0.5 * own).astype(np.float32)


def sizes(points: np.ndarray, centres: Centres) -> np.ndarray:
    far = ((points[:, None] - centres.means_KA) ** 2).sum(2)
    return np.bincount((far + centres.handicaps_K).argmin(1), minlength=len(centres.means_KA))


def test_what_is_needed_most_comes_first() -> None:
    wanted, points = blobs()
    centres = find_centres(points, 3, 0)
    assert np.allclose(centres.means_KA, wanted, atol=0.01)
    assert np.abs(centres.handicaps_K).max() < 1


def test_fewer_points_than_cells() -> None:
    _, points = blobs()
    assert find_centres(points[:2], 7, 0).means_KA.shape == (2, 2)
    assert find_centres(points[:2], 7, 0, start_KA=np.zeros((7, 2), np.float32)).means_KA.shape == (2, 2)
    same = np.zeros((5, 2), np.float32)
    assert find_centres(same, 3, 0).cost == 1.0


def test_cells_are_of_about_one_size_and_what_it_costs_is_told() -> None:
    points = uneven()
    even, plain = find_centres(points, 20, 0), find_centres(points, 20, 0, even=False)
    assert sizes(points, even).max() < 1.3 * sizes(points, even).min()
    assert sizes(points, plain).max() > 4 * sizes(points, plain).min()
    assert not plain.handicaps_K.any() and plain.cost == 1.0

    def spread(centres: Centres) -> float:
        far = ((points[:, None] - centres.means_KA) ** 2).sum(2)
        return float(far[np.arange(len(points)), (far + centres.handicaps_K).argmin(1)].sum())

    assert even.cost > 1
    assert abs(even.cost - spread(even) / spread(plain)) < 1e-3


def test_centres_go_on_from_where_they_were() -> None:
    wanted, points = blobs()
    order = [2, 0, 1]
    centres = find_centres(points, 3, 0, start_KA=wanted[order])
    assert np.allclose(centres.means_KA, wanted[order], atol=0.01)


def test_numbers_are_matched_by_the_centres() -> None:
    generator = np.random.default_rng(0)
    old = generator.uniform(0, 15, (9, 4))
    order = generator.permutation(9)
    means = (old[order] + generator.normal(0, 0.01, old.shape)).astype(np.float32)
    numbers = match_numbers(means, old)
    assert np.array_equal(numbers, order)
    centres = Centres(means, np.arange(9, dtype=np.float32), 1.0).numbered(numbers)
    assert np.allclose(centres.means_KA, old, atol=0.1)
    assert np.array_equal(centres.handicaps_K, np.argsort(order))


def test_stored_centres_are_taken_over_by_the_names_of_the_axes() -> None:
    generator = np.random.default_rng(0)
    means = generator.uniform(0, 1, (4, 3))
    stored = {"axes": ["need code", "need prose", "layer"], "means": means.tolist()}
    taken = stored_means(stored, ["need code", "need sums", "act", "layer"], 4)
    assert taken is not None
    assert np.allclose(taken[:, 0], means[:, 0]) and np.allclose(taken[:, 3], means[:, 2])
    assert np.allclose(taken[:, 1], means[:, :2].mean(1))  # a new slice needs what the others do
    assert not taken[:, 2].any()
    assert stored_means(stored, ["need code"], 5) is None
