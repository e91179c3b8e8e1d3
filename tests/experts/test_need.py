"""Experts by need: the labels against plain NumPy, their files, and what assembly makes of them."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.experts.runs import clustered_run
from tinyonn.config import Config, ExpertsConfig
from tinyonn.dense.weights import BaseWeights
from tinyonn.errors import CapacityError, InputError
from tinyonn.experts import assemble as assembly
from tinyonn.experts import need_passes
from tinyonn.experts.assemble import assemble_run
from tinyonn.experts.need import DEPTH, HEIGHT, ByNeed, NeedOptions, find_centres, needed_budgets
from tinyonn.experts.need_passes import BINS, LOWEST, STEPS, label_path
from tinyonn.experts.select import allocate, groups_of, select
from tinyonn.experts.selection import select_options
from tinyonn.experts.source import RunSource
from tinyonn.run import open_run
from tinyonn.workers.tasks import EngineOptions, computing

CONFIG = ExpertsConfig(budget=0.4, count=7, core=0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("need")
    return folder, clustered_run(folder)


def by_need(world: tuple[Path, Config], folder: Path, config: ExpertsConfig = CONFIG) -> ByNeed:
    place, base = world
    run, weights = open_run(str(place / "run")), BaseWeights(base.model)
    source = RunSource(run, weights.recorded_rows, weights.recorded_across, labels=False)
    return ByNeed(run, source, NeedOptions(config.count), select_options(config), {}, folder)


@pytest.fixture(scope="module")
def made(world: tuple[Path, Config], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    needs = by_need(world, tmp_path_factory.mktemp("labels"))
    with computing(EngineOptions("threads", 2), 2) as compute:
        yield needs, needs.make(compute)


def test_labels_are_those_of_the_nearest_needs(made: Any) -> None:
    """Exact ranks and NumPy's logarithms in the place of bins and tables: of few weights the label differs."""
    needs, selection = made
    run, source, choice = needs.run, needs.source, needs.selection
    tensors = needs.tensors
    total, weights = selection.budget, sum(p.size for p in tensors)
    levels = [round(total * level) for level in (0.03, 0.1, 0.3, 0.6, 1.0)]
    counts_LT = np.stack(allocate(source, tensors, choice, levels))
    features, chosen = [], []
    for number, parameter in enumerate(tensors):
        W = source.band(parameter.name, 0, parameter.shape[0], ("weights",)).weights
        log_W = np.log2(np.maximum(np.abs(W).reshape(-1).astype(np.float64), 1e-30))
        own = []
        for slice in run.slices:
            need = log_W + 0.7 / 2 * run.mean(parameter.name, slice)[1].reshape(-1)
            rank = np.empty(need.size)
            rank[np.argsort(-need, kind="stable")] = (np.arange(need.size) + 0.5) / need.size
            shares = counts_LT[:, number] / parameter.size
            budget = needed_budgets(rank, np.array(levels) / weights, shares)
            own.append(np.clip(np.log(budget * weights / total), -DEPTH, HEIGHT))
        features.append(np.stack(own, axis=1))
        groups = groups_of(selection, needs.labelled(), parameter.name)
        chosen.append((groups < CONFIG.count).reshape(-1))
    labels = [np.load(label_path(needs.folder / needs.identity, p.name)).reshape(-1) for p in tensors]
    features_NS, chosen_N, labels_N = map(np.concatenate, (features, chosen, labels))
    assert not labels_N[~chosen_N].any()
    kept_NS, kept_N = features_NS[chosen_N], labels_N[chosen_N]
    centres_KS = np.stack([kept_NS[kept_N == label].mean(0) for label in range(CONFIG.count)])
    nearest_N = ((kept_NS[:, None] - centres_KS) ** 2).sum(2).argmin(1)
    assert (nearest_N == kept_N).mean() > 0.9
    assert (np.diff(centres_KS.mean(1)) > -0.05).all()  # most needed first
    needs_SK = np.array([needs.needs()[name] for name in run.slices])
    sampled = np.abs(np.log(needs_SK.T) - centres_KS)  # bins in the place of exact ranks
    assert sampled.mean() < 0.1 < np.abs(np.log(needs_SK[::-1].T) - centres_KS).mean()


def test_a_need_is_the_weight_times_the_seven_tenths_power_of_its_gradient(made: Any) -> None:
    needs, _ = made
    assert needs.data.slices == tuple(needs.run.slices)
    for parameter in needs.tensors[:4]:
        W = needs.source.band(parameter.name, 0, parameter.shape[0], ("weights",)).weights
        bins_SOI = needs.data.tensor(parameter.name).bins(0, parameter.shape[0], W)
        for slice, bins_OI in zip(needs.data.slices, bins_SOI, strict=True):
            grad_OI = needs.run.mean(parameter.name, slice)[1].reshape(W.shape) / 2  # levels are half octaves
            wanted_OI = (np.log2(np.maximum(np.abs(W), 1e-30)) + 0.7 * grad_OI - LOWEST) * STEPS
            off_OI = np.abs(bins_OI + 0.5 - np.clip(wanted_OI, 0, BINS - 1))
            assert off_OI[W != 0].max() < 0.75


def test_groups_and_counts_fit(made: Any) -> None:
    needs, selection = made
    source = needs.labelled()
    sizes = np.zeros(256, np.int64)
    for name, cuts in selection.tensors.items():
        counted = np.bincount(groups_of(selection, source, name).reshape(-1), minlength=256)
        assert counted[: CONFIG.count + 1].tolist() == cuts.kept.tolist()
        sizes += counted
    assert sizes[: CONFIG.count + 1].tolist() == selection.group_sizes
    assert sum(selection.group_sizes) == selection.budget
    assert not selection.empty_experts
    plain = select(
        needs.source, needs.selection
    )  # what is kept, and how much of it is core, is as without experts
    assert selection.group_sizes[-1] == plain.group_sizes[-1]
    for name, cuts in plain.tensors.items():
        kept = groups_of(plain, needs.source, name) != 255
        assert (kept == (groups_of(selection, source, name) != 255)).all()
        assert cuts.kept.sum() == selection.tensors[name].kept.sum()


def test_of_equally_near_experts_the_lowest_number_wins() -> None:
    groups_N, bins_SN, table_SB = np.array([0, 1, 3], np.uint8), np.zeros((2, 3), np.uint16), np.zeros((2, 1))
    centres = np.array([[2, 1, 1], [2, 1, 1]], np.float32), np.zeros(3, np.float32)
    labels_N, counts_K, sums_KS = np.zeros(3, np.uint8), np.zeros(3, np.int64), np.zeros((3, 2))
    need_passes._nearest(groups_N, bins_SN, table_SB, centres, 3, labels_N, counts_K, sums_KS)
    assert labels_N.tolist() == [1, 1, 0]  # the third is the core's
    assert counts_K.tolist() == [0, 2, 0]


def test_needed_budgets_undo_the_allocation() -> None:
    budgets, shares = np.array([0.01, 0.1, 0.3]), np.array([0.002, 0.05, 0.5])
    assert np.allclose(needed_budgets(shares, budgets, shares), budgets)
    assert needed_budgets(np.array([0.001]), budgets, shares)[0] == pytest.approx(0.005)  # in proportion
    assert needed_budgets(np.array([1.0]), budgets, shares)[0] == pytest.approx(1.0)
    between = needed_budgets(np.array([0.01]), budgets, shares)[0]
    assert between == pytest.approx(0.01 * 10 ** (np.log(5) / np.log(25)))
    flat = needed_budgets(np.array([0.05, 0.2]), budgets, np.array([0.1, 0.1, 0.1]))
    assert np.isfinite(flat).all() and flat[0] < flat[1]


def test_centres() -> None:
    generator = np.random.default_rng(0)
    wanted = np.array([[-3, -3], [-2, 0], [0, -1]], np.float32)
    points = (wanted[generator.integers(0, 3, 900)] + 0.01 * generator.standard_normal((900, 2))).astype(
        np.float32
    )
    centres, handicaps = find_centres(points, 3, 0)
    assert np.allclose(centres, wanted, atol=0.01)
    assert np.abs(handicaps).max() < 1
    assert find_centres(points[:2], 7, 0)[0].shape == (2, 2)


def test_experts_are_of_about_one_size() -> None:
    """Of needs that go together, most of them small."""
    generator = np.random.default_rng(0)
    common, own = generator.standard_normal((8000, 1)), generator.standard_normal((8000, 3))
    points = -np.abs(common + 0.5 * own).astype(np.float32)
    centres, handicaps = find_centres(points, 20, 0)
    far = ((points[:, None] - centres) ** 2).sum(2)
    sizes = np.bincount((far + handicaps).argmin(1), minlength=20)
    assert sizes.max() < 1.3 * sizes.min()  # of k-means alone nine times


def test_nothing_left_for_experts() -> None:
    points = np.zeros((0, 2), np.float32)
    with pytest.raises(InputError, match=r"experts\.core = 1"):
        find_centres(points, 3, 0)


@pytest.mark.parametrize("engine", [EngineOptions("threads", 1), EngineOptions("threads", 3)])
def test_same_folder_with_any_workers(
    world: tuple[Path, Config], tmp_path: Path, engine: EngineOptions
) -> None:
    place, config = world
    first = place / "first"
    assemble_run(str(place / "run"), config.model, CONFIG, folder=first)
    report = assemble_run(str(place / "run"), config.model, CONFIG, engine, tmp_path / "again")
    assert report.fresh
    for path in sorted(first.glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    tree = json.loads((first / "config.json").read_text("utf-8"))
    assert tree["experts"] == CONFIG.count and min(tree["expert_sizes"]) > 0
    assert not (place / "run" / assembly.NEED).exists()  # labels are gone when the model is there


def test_killed_while_labelling(
    world: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, config = world
    assemble_run(str(place / "run"), config.model, CONFIG, folder=tmp_path / "whole")
    calls = []

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        nearest(*arguments)

    nearest = need_passes._nearest
    monkeypatch.setattr(need_passes, "_nearest", failing)
    with pytest.raises(KeyboardInterrupt):
        assemble_run(
            str(place / "run"), config.model, CONFIG, EngineOptions("threads", 1), tmp_path / "killed"
        )
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "config.json").exists()
    assemble_run(str(place / "run"), config.model, CONFIG, folder=tmp_path / "killed")
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


def test_a_lost_shard_is_made_again(world: tuple[Path, Config], tmp_path: Path) -> None:
    """Also when the labels are long gone."""
    place, config = world
    assemble_run(str(place / "run"), config.model, CONFIG, folder=tmp_path / "a")
    lost = min((tmp_path / "a").glob("*.safetensors"))
    before = lost.read_bytes()
    lost.unlink()
    assert assemble_run(str(place / "run"), config.model, CONFIG, folder=tmp_path / "a").fresh
    assert lost.read_bytes() == before
    assert not assemble_run(str(place / "run"), config.model, CONFIG, folder=tmp_path / "a").fresh


def test_a_full_disk(world: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place, config = world
    monkeypatch.setattr(need_passes, "_nearest", full)
    with pytest.raises(CapacityError, match=r"no space left .* a byte for each linear weight"):
        assemble_run(str(place / "run"), config.model, CONFIG, folder=tmp_path / "a")


def test_bad_input(world: tuple[Path, Config], tmp_path: Path) -> None:
    place, config = world
    with pytest.raises(InputError, match=r"experts\.count = 255; give 1 to 254"):
        NeedOptions(255)
    with pytest.raises(InputError, match=r"experts\.core = 1"):
        assemble_run(
            str(place / "run"), config.model, CONFIG.model_copy(update={"core": 1.0}), folder=tmp_path / "a"
        )
