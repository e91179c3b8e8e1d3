from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tinyonn.config import Config
from tinyonn.corpus.corpus import Corpus
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError, StoreDamagedError
from tinyonn.evaluate.allocate import AllocateOptions, allocate_run
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.loss import batches_of, losses
from tinyonn.evaluate.sensitivity import (
    Curve,
    Trials,
    groups_by_depth,
    hull,
    measure,
    most_passes_of_search,
    passes_of_measuring,
    predicted,
    scaled,
    search,
    smooth,
    solve,
)
from tinyonn.run import open_run
from tinyonn.score.source import RunSource
from tinyonn.select.selection import stored_shares


@pytest.fixture(scope="module")
def trials(recorded: tuple[Path, Config]) -> Trials:
    place, config = recorded
    dense = DenseWeights(config.model)
    source = RunSource(open_run(place), dense.rows, dense.transposed, labels=False)
    samples = Corpus(place / "corpus.arrow").calibration(4)
    return Trials(dense, source, "wg", batches_of(samples))


def test_groups_hold_every_tensor_once() -> None:
    parameters = [
        Parameter(f"layers.{layer}.{kind}.weight", (4, 4), layer, "linear")
        for layer in range(5)
        for kind in ("up", "down")
    ]
    groups = groups_by_depth(parameters, 2)
    assert [group.name for group in groups] == ["up/0-2", "up/3-4", "down/0-2", "down/3-4"]
    assert sorted(n for group in groups for n in group.tensors) == sorted(p.name for p in parameters)
    names = [group.name for group in groups_by_depth(parameters, 3)]
    assert names == ["up/0", "up/1-3", "up/4", "down/0", "down/1-3", "down/4"]
    assert len(groups_by_depth(parameters, 99)) == 10


def test_scaled_shares_keep_the_budget_and_stay_below_one() -> None:
    sizes = {"a": 100, "b": 300, "c": 600}
    found = scaled({"a": 3.0, "b": 1.0, "c": 0.5}, sizes, 0.4)
    assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(400)
    assert found["a"] == 1.0 and found["b"] == pytest.approx(2 * found["c"])


def test_smooth_curves_fall_and_go_through_what_was_measured() -> None:
    curve = Curve(("a",), (0.1, 0.2, 0.5, 1.0), (4.0, 3.0, 2.2, 2.0))
    found = smooth(curve)
    assert np.all(np.diff(found.losses) <= 0) and found.losses[-1] == 2.0
    for share, loss in zip(curve.shares[:-1], curve.losses[:-1], strict=True):
        assert np.interp(share, found.shares, found.losses) == pytest.approx(loss, rel=0.01)


def test_losses_of_shares_are_those_of_the_masks(trials: Trials) -> None:
    whole = losses(trials.dense.model, trials.batches).mean
    assert trials.loss({}) == whole
    assert trials.loss(dict.fromkeys(trials.sizes, 1.0)) == whole
    none = trials.loss(dict.fromkeys(trials.sizes, 0.0))
    assert none != whole and none == trials.loss(dict.fromkeys(trials.sizes, 1e-7))


def test_a_search_ends_below_its_starts_within_the_budget(trials: Trials) -> None:
    groups = groups_by_depth(trials.dense.parameters, 1)
    ticks: list[int] = []
    curves = measure(trials, groups, (0.1, 0.4), lambda: ticks.append(1))
    assert len(ticks) == passes_of_measuring(groups, (0.1, 0.4))
    start = predicted(curves, trials.sizes, 0.3)
    total = sum(trials.sizes.values())
    assert sum(start[n] * size for n, size in trials.sizes.items()) == pytest.approx(0.3 * total, abs=1)
    uniform = dict.fromkeys(trials.sizes, 0.3)
    found = search(trials, groups, [start, uniform], 0.3, rounds=1)
    tried = [trials.loss(scaled(shares, trials.sizes, 0.3)) for shares in (start, uniform)]
    assert found.loss <= found.start == min(tried)
    assert found.passes <= most_passes_of_search(groups, 2, 1)
    kept = sum(found.shares[n] * size for n, size in trials.sizes.items())
    assert kept == pytest.approx(0.3 * total, rel=1e-6)
    assert trials.loss(found.shares) == found.loss


def test_what_was_found_is_kept(recorded: tuple[Path, Config]) -> None:
    place, config = recorded
    options = AllocateOptions((0.3,), samples=2, depths=1, rounds=1)
    scored = open_run(place).store.reader().stage("rows")
    assert stored_shares(place, scored) == {}
    told: list[str] = []
    first = allocate_run(str(place), config, options, told.append)
    assert told[0] == "7 groups of tensors: at most 46 passes over 2 samples"
    assert first.fresh and 29 < first.passes <= 46
    again = allocate_run(str(place), config, options)
    assert not again.fresh and again.passes == 0 and again.found == first.found
    assert stored_shares(place, scored) == {0.3: first.found[0.3].shares}
    assert stored_shares(place, {"segments": {}}) == {}  # made of other rows
    more = allocate_run(str(place), config, AllocateOptions((0.3, 0.5), 2, depths=1, rounds=1))
    assert more.found[0.3] == first.found[0.3] and more.passes <= 17  # curves are taken over
    assert more.figures()["found"]["0.5"]["loss"] == more.found[0.5].loss
    assert len(more.table().rows) == 2
    (place / "allocation.json").write_text('{"found": 3}')
    with pytest.raises(StoreDamagedError, match=r"allocation\.json is damaged .*no allocation"):
        allocate_run(str(place), config, options)
    with pytest.raises(InputError, match="a budget of 5 is no share"):
        allocate_run(str(place), config, AllocateOptions((5.0,)))


def hull_loss(curve: Curve, share: float) -> float:
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
            return sum(hull_loss(c, n / sizes[c.tensors[0]]) for c, n in zip(curves, its, strict=True))

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
