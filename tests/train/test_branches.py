"""Branches of the router: experts that fire together are found again, sizes are equal, bad input is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tinyonn.errors import InputError
from tinyonn.train.branches import find_branches, shared_experts

Array = np.ndarray[Any, Any]


def by_topic(groups: list[list[int]], samples: int = 400, noise: float = 0.2, seed: int = 0) -> Array:
    """Contributions [samples, experts] of experts that are strong in samples of their own topic."""
    random = np.random.default_rng(seed)
    topic_S = random.integers(0, len(groups), samples)
    experts = sum(map(len, groups))
    level_SE = random.gamma(2.0, noise, (samples, experts))
    for number, group in enumerate(groups):
        level_SE[np.ix_(topic_S == number, group)] += 1
    scale_E = 10.0 ** random.uniform(-2, 2, experts)  # large and small experts
    return np.asarray(level_SE * scale_E)


def within(contribution_SE: Array, branches: list[list[int]]) -> float:
    """Sum of correlations within branches, straight from the definition."""
    share_SE = contribution_SE / contribution_SE.sum(1, keepdims=True)
    correlation_EE = np.corrcoef(share_SE.T)
    return float(
        sum(correlation_EE[a, b] for branch in branches for a, b in itertools.combinations(branch, 2))
    )


@pytest.mark.parametrize(("experts", "count"), [(100, 10), (12, 3), (23, 5), (4, 4), (5, 1)])
def test_experts_of_a_topic_share_a_branch(experts: int, count: int) -> None:
    order = np.random.default_rng(1).permutation(experts)
    groups = sorted(sorted(part.tolist()) for part in np.array_split(order, count))
    assert find_branches(by_topic(groups, noise=0.05), count) == groups


def test_no_balanced_partition_is_better() -> None:
    contribution_SE = by_topic([[0, 1, 2], [3, 4], [5]], samples=60, noise=1.0)
    found = find_branches(contribution_SE, 2)
    best = max(
        within(contribution_SE, [list(one), sorted(set(range(6)) - set(one))])
        for one in itertools.combinations(range(6), 3)
    )
    assert within(contribution_SE, found) == pytest.approx(best)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("experts", "count"), [(100, 10), (13, 4), (7, 7)])
def test_any_contributions_give_a_balanced_partition(experts: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    contribution_SE = random.gamma(0.3, 1.0, (30, experts))
    contribution_SE[:, ::3] = 0  # never used
    contribution_SE[:, 1] = 5.0
    contribution_SE[4] = 0  # a sample without any
    branches = find_branches(contribution_SE, count)
    assert sorted(itertools.chain(*branches)) == list(range(experts))
    sizes = sorted(map(len, branches))
    assert sizes[-1] - sizes[0] <= 1
    assert branches == find_branches(contribution_SE.copy(), count)
    assert [min(branch) for branch in branches] == sorted(min(branch) for branch in branches)


@pytest.mark.parametrize("samples", [0, 1, 2])
def test_few_samples(samples: int) -> None:
    branches = find_branches(np.ones((samples, 6)), 3)
    assert sorted(itertools.chain(*branches)) == list(range(6))
    assert shared_experts(np.ones((samples, 6)), 2) == [0, 1]


def test_shared_experts_are_steady() -> None:
    random = np.random.default_rng(0)
    contribution_SE = random.uniform(0.9, 1.1, (200, 6))
    contribution_SE[:, 4] *= 3  # strong everywhere
    contribution_SE[:, 1] *= 2
    contribution_SE[:, 2] = np.where(np.arange(200) % 4 == 0, 40.0, 0.1)  # the strongest on the average
    assert contribution_SE.mean(0).argmax() == 2
    assert shared_experts(contribution_SE, 2) == [1, 4]
    assert shared_experts(contribution_SE, 0) == []


@pytest.mark.parametrize(
    ("change", "count", "says"),
    [
        (0.0, 7, "7 branches cannot be made of 6 experts"),
        (0.0, 0, "0 branches"),
        (-1.0, 2, "expert 3 contributes -1.0 to sample 2"),
        (float("nan"), 2, "expert 3 contributes nan to sample 2"),
    ],
)
def test_bad_input(change: float, count: int, says: str) -> None:
    contribution_SE = np.ones((5, 6))
    contribution_SE[2, 3] = change
    with pytest.raises(InputError, match=says):
        find_branches(contribution_SE, count)


def test_bad_shape_and_number_of_shared() -> None:
    with pytest.raises(InputError, match=r"shape \[6\]"):
        find_branches(np.ones(6), 2)
    with pytest.raises(InputError, match="7 shared experts of 6"):
        shared_experts(np.ones((5, 6)), 7)
