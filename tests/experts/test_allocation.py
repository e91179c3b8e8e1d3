from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.experts.allocation import (
    Curve,
    apportion,
    given_counts,
    global_counts,
    hull,
    outlier_counts,
    solve,
    uniform_counts,
)


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


def test_outlier_shares_are_those_of_the_paper() -> None:
    layers, sizes = [0, 0, 1, 2], np.array([1000, 3000, 4000, 4000])
    outliers = np.array([10, 30, 0, 80])
    counts = outlier_counts(layers, sizes, outliers, 3600, 0.08)
    ratio = np.array([40 / 4000, 0.0, 80 / 4000])
    scaled = ratio / ratio.max() * 2 * 0.08
    wanted = scaled - scaled.mean() + 0.3  # the published code, where all layers have one size
    np.testing.assert_allclose(counts / sizes, wanted[layers], atol=1e-3)
    assert counts.sum() == 3600
    assert outlier_counts(layers, sizes, [0, 0, 0, 0], 1200, 0.08).tolist() == [100, 300, 400, 400]


def loss(curve: Curve, share: float) -> float:
    shares, losses = hull(curve)
    return float(np.interp(share, shares, losses))


def test_the_solver_finds_the_least_predicted_loss() -> None:
    rng = np.random.default_rng(1)
    sizes = {"a": 8, "b": 12, "c": 10}
    for _ in range(60):
        curves = []
        for name in sizes:
            shares = (0.25, 0.5, 0.75, 1.0)
            curves.append(Curve((name,), shares, tuple(np.sort(rng.random(4))[::-1].tolist())))
        total = int(rng.integers(9, 30))
        counts = solve(curves, sizes, total)
        assert sum(counts.values()) == total

        def predicted(its: tuple[int, ...], curves: list[Curve] = curves) -> float:
            return sum(loss(c, n / sizes[c.tensors[0]]) for c, n in zip(curves, its, strict=True))

        floors = [range(-(-size // 4), size + 1) for size in sizes.values()]
        best = min(predicted(its) for its in product(*floors) if sum(its) == total)
        assert (
            predicted(tuple(counts.values())) <= best + 0.05
        )  # counts are whole, the hulls' corners are not


def test_tensors_of_a_curve_share_one_share_and_floors_are_kept() -> None:
    curves = [
        Curve(("a", "b"), (0.1, 1.0), (5.0, 1.0)),
        Curve(("c",), (0.2, 1.0), (1.0, 1.0)),
    ]
    sizes = {"a": 100, "b": 300, "c": 100}
    assert solve(curves, sizes, 260) == {"a": 60, "b": 180, "c": 20}
    assert solve(curves, sizes, 30) == {"a": 5, "b": 15, "c": 10}
    assert solve(curves, sizes, 500) == sizes


def test_the_hull_never_rises_and_skips_what_lies_above() -> None:
    curve = Curve(("a",), (0.1, 0.2, 0.3, 0.4, 0.8), (4.0, 3.9, 1.0, 1.5, 0.9))
    shares, losses = hull(curve)
    assert shares == [0.1, 0.3, 0.8, 1.0]
    assert losses == [4.0, 1.0, 0.9, 0.9]


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([Curve(("a",), (0.1,), (1.0,))], "b is in no curve"),
        ([Curve(("a", "b", "a"), (0.1,), (1.0,))], "a is not cut, or in two"),
        ([Curve(("a", "b"), (0.5, 0.1), (1.0, 1.0))], "increase"),
        ([Curve(("a", "b"), (0.0, 0.1), (1.0, 1.0))], "increase"),
        ([Curve(("a", "b"), (0.1, 0.5), (float("nan"), 1.0))], "finite"),
        ([Curve(("a", "b"), (), ())], "finite"),
    ],
)
def test_what_is_no_curve_is_refused(curves: list[Curve], message: str) -> None:
    with pytest.raises(InputError, match=message):
        solve(curves, {"a": 10, "b": 10}, 5)
