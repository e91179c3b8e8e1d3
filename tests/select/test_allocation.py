from __future__ import annotations

import numpy as np
import pytest

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.select.select import apportion, given_counts, global_counts, uniform_counts


def test_apportioning_is_exact_proportional_and_keeps_limits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 30))
        limits = rng.integers(0, 1000, n)
        weights = rng.random(n) * (rng.random(n) < 0.8)
        room = int(limits[weights > 0].sum())
        total = int(rng.integers(0, room + 1))
        counts = apportion(total, weights, limits)
        assert counts.sum() == total
        assert (counts >= 0).all() and (counts <= limits).all() and not counts[weights == 0].any()
        free = (counts > 0) & (counts < limits - 1)
        if free.sum() > 1:
            factor = counts[free] / weights[free]
            slack = 1.01 / weights[free]
            assert (factor - slack).max() <= (factor + slack).min() + 1e-6


def test_what_is_left_over_goes_to_the_largest_remainders_and_of_equal_ones_to_the_first() -> None:
    assert apportion(10, [5.6, 2.3, 2.1], [10, 10, 10]).tolist() == [6, 2, 2]
    assert apportion(10, [2.5, 2.5, 5.0], [10, 10, 10]).tolist() == [3, 2, 5]


def test_a_large_total_comes_out_to_the_unit() -> None:
    sizes = np.array([17_694_720, 6_553_600, 17_694_720] * 130)
    for total in (1_000_000_000, 1, int(sizes.sum()), int(sizes.sum()) - 1):
        assert uniform_counts(sizes, total).sum() == total


def tensors() -> list[Parameter]:
    return [
        Parameter(f"l.{layer}.{kind}.weight", shape, layer, "linear")
        for layer in range(2)
        for kind, shape in (("q_proj", (10, 10)), ("up_proj", (30, 10)))
    ]


def test_given_shares_go_by_tensor_then_layer_then_kind() -> None:
    shares = {"q_proj": 0.2, "up_proj": 0.05, "up_proj/1": 0.1, "l.0.q_proj.weight": 0.4}
    assert given_counts(tensors(), shares, 105).tolist() == [40, 15, 20, 30]
    assert given_counts(tensors(), shares, 210).tolist() == [80, 30, 40, 60]
    assert given_counts(tensors(), shares, 790)[0] == 100  # all of it; the others take the rest
    with pytest.raises(InputError, match=r"l\.0\.up_proj\.weight.*up_proj/0, up_proj"):
        given_counts(tensors(), {"q_proj": 1}, 10)
    with pytest.raises(InputError, match=r"'gate_proj'.*kinds are q_proj, up_proj"):
        given_counts(tensors(), {"q_proj": 1, "up_proj": 1, "gate_proj": 1}, 10)
    with pytest.raises(InputError, match="share of up_proj is nan"):
        given_counts(tensors(), {"q_proj": 1, "up_proj": float("nan")}, 10)


def test_a_global_cut_is_that_of_all_tensors_together() -> None:
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 40, n).astype(np.uint16) + i for i, n in enumerate((200, 500, 300))]
    histograms = [np.unique(its, return_counts=True) for its in values]
    for total in (1, 17, 400, 999, 1000):
        counts = global_counts(histograms, total)
        cut = np.sort(np.concatenate(values))[::-1][total - 1]
        above = np.array([(its > cut).sum() for its in values])
        inside = np.array([(its == cut).sum() for its in values])
        assert counts.sum() == total
        assert ((counts >= above) & (counts <= above + inside)).all()
