"""Needs: bins against plain NumPy, what bins stand for, and what a look at a part of a tensor misses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cluster.runs import CONFIG, job_of, of_cluster, scored_run
from tests.recorded import weights
from tinyonn.cluster import look
from tinyonn.cluster.features import TensorBins
from tinyonn.cluster.needs import BINS, DEPTH, HEIGHT, LOWEST, STEPS, needed_budgets
from tinyonn.config import Config, ExpertsConfig, FeatureWeights
from tinyonn.dense.parameters import kind_of
from tinyonn.errors import InputError
from tinyonn.run import open_run
from tinyonn.select.select import allocate, one_by_one
from tinyonn.store.records import unpack


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_run(tmp_path_factory.mktemp("needs"))


def test_a_need_is_the_weight_times_the_seven_tenths_power_of_its_gradient(scored: Path) -> None:
    job, run = job_of(scored), open_run(scored)
    assert job.needs.slices == tuple(run.slices)
    for parameter in job.inside:
        W = weights(parameter.name, 0, parameter.shape[0])
        bins_SOI = job.needs.tensor(parameter.name).bins(0, parameter.shape[0], W)
        for slice, bins_OI in zip(job.needs.slices, bins_SOI, strict=True):
            grad_OI = run.mean(parameter.name, slice)[1].reshape(W.shape) / 2  # levels are half octaves
            wanted_OI = (np.log2(np.abs(W)) + 0.7 * grad_OI - LOWEST) * STEPS
            assert np.abs(bins_OI + 0.5 - np.clip(wanted_OI, 0, BINS - 1)).max() < 0.75


def test_tables_turn_bins_into_the_budget_under_which_a_weight_is_kept(scored: Path) -> None:
    """Exact ranks and NumPy's logarithms in the place of bins."""
    job, run = job_of(scored), open_run(scored)
    looks, tables = job.look(one_by_one)
    total, every = job.budget, sum(parameter.size for parameter in job.inside)
    levels = [round(total * level) for level in (0.03, 0.1, 0.3, 0.6, 1.0)]
    counts_LT = np.stack(allocate(job.source, job.inside, job.choice, levels))
    for number, parameter in enumerate(job.inside):
        W = weights(parameter.name, 0, parameter.shape[0])
        bins_SN = job.needs.tensor(parameter.name).bins(0, parameter.shape[0], W).reshape(3, -1)
        assert (
            looks[number].counts_SB.sum(1).tolist() == [parameter.size] * 3
        )  # it is small: all is looked at
        for place, slice in enumerate(run.slices):
            need = np.log2(np.abs(W).reshape(-1)) + 0.35 * run.mean(parameter.name, slice)[1].reshape(-1)
            rank = np.empty(need.size)
            rank[np.argsort(-need, kind="stable")] = (np.arange(need.size) + 0.5) / need.size
            shares = counts_LT[:, number] / parameter.size
            budget = needed_budgets(rank, np.array(levels) / every, shares)
            wanted = np.clip(np.log(budget * every / total), -DEPTH, HEIGHT)
            found = tables[number][place, bins_SN[place]]
            assert np.abs(found - wanted).mean() < 0.05
            assert (np.diff(tables[number][place]) <= 0).all()  # the higher, the smaller a budget will do


def test_points_are_of_what_experts_would_hold(scored: Path) -> None:
    job = job_of(scored)
    looks, tables = job.look(one_by_one)
    curves = job.curves(looks)
    points = look.points_of(looks, tables, job.inside, job.space, curves, 0.1)
    assert len(points) == pytest.approx(0.9 * job.budget, rel=0.02)
    assert points[:, :3].min(1).mean() < -0.5  # most is needed by some slice
    few = look.points_of(looks, tables, job.inside, job.space, curves, 0.9)
    assert len(few) == pytest.approx(0.1 * job.budget, rel=0.1)
    assert few.mean() > points.mean()  # the best are the core's
    with pytest.raises(InputError, match=r"experts\.core = 1 leaves nothing"):
        look.points_of(looks, tables, job.inside, job.space, curves, 1.0)


def test_a_look_at_a_part_tells_about_the_whole(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bands of many, and one weight of four drawn."""
    job = job_of(scored)
    whole, exact = job.look(one_by_one)
    monkeypatch.setattr(look, "bands", lambda shape: [(i, i + 8) for i in range(0, shape[0], 8)])
    monkeypatch.setattr(look, "DRAWN", 3000)
    parts, tables = job_of(scored).look(one_by_one)
    for parameter, part, all_of_it, near, table in zip(job.inside, parts, whole, tables, exact, strict=True):
        assert part.counts_SB.sum(1).tolist() == [16 * parameter.shape[1]] * 3
        assert 0 < part.at_N.size < all_of_it.at_N.size
        middle = (table > -2) & (table < 0.5)
        assert np.abs(near - table)[middle].mean() < 0.5


def test_other_features_beside_the_needs(scored: Path) -> None:
    features = FeatureWeights(need=0.5, score=1, act=0.25, grad=2, freq=1, layer=3, kind=1, row=1, column=0.5)
    job, run = job_of(scored, of_cluster(features=features)), open_run(scored)
    looks, tables = job.look(one_by_one)
    kinds = ["kind q_proj", "kind up_proj"]
    needs = [f"need {name}" for name in run.slices]
    axes = [*needs, "score", "act", "grad", "freq", "row", "column", "layer", *kinds]
    assert job.space.names == axes
    plain = job_of(scored)
    _, bare = plain.look(one_by_one)
    for number, parameter in enumerate(job.inside):
        x_NA = look.coordinates(
            looks[number], tables[number], job.space.place(parameter), np.arange(parameter.size)
        )
        act, grad, freq, score = (part.reshape(-1) for part in unpack(np.asarray(run.rows(parameter.name))))
        for axis, (weight, code) in enumerate(((1, score), (0.25, act), (2, grad), (1, freq)), 3):
            assert np.allclose(x_NA[:, axis], weight * code / 15, atol=1e-6)
        rows, columns = np.divmod(np.arange(parameter.size), parameter.shape[1])
        assert np.allclose(x_NA[:, 7], rows * 16 // parameter.shape[0] / 15, atol=1e-6)
        assert np.allclose(x_NA[:, 8], 0.5 * (columns * 16 // parameter.shape[1]) / 15, atol=1e-6)
        assert np.allclose(x_NA[:, 9], 3 * (parameter.layer or 0) / 2)
        of_kind = [0.5**0.5 * (kind_of(parameter) == name.removeprefix("kind ")) for name in kinds]
        assert np.allclose(x_NA[:, 10:], of_kind)
        assert np.allclose(tables[number][:3], 0.5 * bare[number], atol=1e-6)
        bins = TensorBins(job.needs, job.space, parameter)
        band = job.source.band(parameter.name, 0, parameter.shape[0], job.space.reads)
        assert np.array_equal(bins.of(band).reshape(9, -1), looks[number].drawn_FN)


def test_needed_budgets_undo_the_allocation() -> None:
    budgets, shares = np.array([0.01, 0.1, 0.3]), np.array([0.002, 0.05, 0.5])
    assert np.allclose(needed_budgets(shares, budgets, shares), budgets)
    assert needed_budgets(np.array([0.001]), budgets, shares)[0] == pytest.approx(0.005)  # in proportion
    assert needed_budgets(np.array([1.0]), budgets, shares)[0] == pytest.approx(1.0)
    between = needed_budgets(np.array([0.01]), budgets, shares)[0]
    assert between == pytest.approx(0.01 * 10 ** (np.log(5) / np.log(25)))
    flat = needed_budgets(np.array([0.05, 0.2]), budgets, np.array([0.1, 0.1, 0.1]))
    assert np.isfinite(flat).all() and flat[0] < flat[1]


def test_an_allocation_that_was_searched_is_a_point_of_the_curves(scored: Path) -> None:
    config = Config(cluster=CONFIG.cluster, experts=ExpertsConfig(budget=0.4), router=CONFIG.router)
    job = job_of(scored, config)
    shares = {parameter.name: 0.1 if kind_of(parameter) == "q_proj" else 0.3 for parameter in job.inside}
    looks, _ = job.look(one_by_one)
    job.searched = {0.2: shares, 0.9: shares}
    curves = job.curves(looks)
    at = int(np.argmin(np.abs(curves.budgets_L - 0.2)))
    assert curves.budgets_L[at] == pytest.approx(0.2, rel=1e-3)
    of_kind = dict(zip(map(kind_of, job.inside), curves.shares_LT[at], strict=True))
    assert of_kind["up_proj"] == pytest.approx(3 * of_kind["q_proj"], rel=0.01)
    assert curves.budgets_L.max() == pytest.approx(0.4, rel=1e-3)
