from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.experts.arrays import CELLS, arrays, attributes, make_source
from tests.recorded import make_run
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import SEED_WEIGHTS, ClusterConfig, ScoreConfig
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.experts.allocation import Curve
from tinyonn.experts.cuts import NONE, ONE_GROUP, exact_cuts, keys_of
from tinyonn.experts.cutting import Cutter
from tinyonn.experts.scores import SCORES, ScoreSettings, core_ranks
from tinyonn.experts.select import Selection, SelectOptions, TensorGroups, groups_of, select, select_bytes
from tinyonn.experts.source import ArraySource, RunSource
from tinyonn.experts.totals import totals
from tinyonn.run import open_run
from tinyonn.score.stage import score_run
from tinyonn.store.records import dither_seed
from tinyonn.workers.tasks import EngineOptions, computing

WITHIN = ("cell", "tensor", "row")


def hashes(index: np.ndarray, seed: int) -> np.ndarray:
    """The tie hash, in NumPy."""
    z = index.astype(np.uint32) ^ np.uint32(seed & 0xFFFFFFFF)
    for turn in range(2):
        z = (z ^ (z >> np.uint32(16))) * np.uint32(0x21F0AAAD)
        z = (z ^ (z >> np.uint32(15))) * np.uint32(0xD35A2D97)
        z = z ^ (z >> np.uint32(15))
        if turn == 0:
            z = z ^ np.uint32(seed >> 32)
    return z.astype(np.uint64)


def places(values: np.ndarray, index: np.ndarray, seed: int) -> np.ndarray:
    """Order of values, ties by hash: the rank of each, distinct."""
    order = np.lexsort((hashes(index, seed), values))
    ranks = np.empty(values.size, np.int64)
    ranks[order] = np.arange(values.size)
    return ranks


def highest(ranks: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """Mask of so many with the highest rank among those of a mask."""
    chosen = np.flatnonzero(among)
    out = np.zeros(ranks.size, np.bool_)
    out[chosen[np.argsort(-ranks[chosen])][:count]] = True
    return out


def oracle(source: ArraySource, name: str, options: SelectOptions, kept: np.ndarray) -> np.ndarray:
    """Groups by sorting, given how many weights the tensor keeps and how many are in the core."""
    data, shape = source.arrays[name], source.arrays[name]["records"].shape
    parameter = next(p for p in source.parameters if p.name == name)
    score = SCORES[options.score]
    values = score.prepare(source, parameter, options.settings)(
        source.band(name, 0, shape[0], score.needs)
    ).ravel()
    seed = dither_seed(options.seed, "select", name)
    index = np.arange(values.size)
    order = places(values, index, seed)
    if options.core_by == "score":
        core_key = keys_of(values)[0] >> 16  # as exact as a rank is
    else:
        classes = (data["records"] & 0xFFF0) | (data["affinity"] & 15)
        core_key = core_ranks(source.attributes(name))[classes].ravel()
    core_order = places(core_key, index, seed)
    labels = data["labels"].ravel()
    rows, columns = index // shape[1], index % shape[1]
    lines = {"row": columns if source.transposed else rows}.get(options.within, np.zeros_like(index))
    marked, core = np.zeros(values.size, np.bool_), np.zeros(values.size, np.bool_)
    n = lines.max() + 1
    extra = np.argsort([_row_hash(seed, line) for line in range(n)], kind="stable")
    for line in range(n):
        more = int(np.flatnonzero(extra == line)[0])
        here = highest(order, lines == line, kept.sum() // n + (more < kept.sum() % n))
        marked |= here
        core |= highest(core_order, here, kept[-1] // n + (more < kept[-1] % n))
    groups = np.where(marked, labels, 255)
    if options.within == "cell" and options.balance:
        groups = np.full(values.size, 255)
        for cell in range(source.cells):
            groups[highest(order, (labels == cell) & ~core, kept[cell])] = cell
    groups[core] = source.cells
    return groups.reshape(shape)


def _row_hash(seed: int, row: int) -> int:
    mask = 2**64 - 1
    z = (seed + (row + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("score", ["S", "wanda", "magnitude", "random"])
@pytest.mark.parametrize("transposed", [False, True])
def test_groups_are_those_of_a_sort(within: str, score: str, transposed: bool) -> None:
    source = make_source(transposed=transposed)
    for budget, core, by in (
        (0.3, 0.5, "even"),
        (0.3, 0.4, "score"),
        (777, 0.0, "even"),
        (0.9, 1.0, "score"),
    ):
        options = SelectOptions(budget=budget, score=score, within=within, core=core, core_by=by, seed=3)
        selection = select(source, options)
        for name, cuts in selection.tensors.items():
            groups = groups_of(selection, source, name)
            np.testing.assert_array_equal(groups, oracle(source, name, options, cuts.kept))
            assert (
                np.bincount(groups.ravel(), minlength=CELLS + 1)[: CELLS + 1].tolist() == cuts.kept.tolist()
            )
        assert sum(selection.group_sizes) == selection.budget
        assert selection.group_sizes[-1] == round(core * selection.budget)


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> str:
    location = str(make_run(tmp_path_factory.mktemp("run")))
    score_run(location, ScoreConfig())
    cluster_run(location, ClusterConfig(cells=6))
    return location


@pytest.fixture(scope="module")
def run_source(location: str) -> RunSource:
    return RunSource(open_run(location), _weights)


def _weights(name: str, first: int, last: int) -> np.ndarray:
    rng = np.random.default_rng(dither_seed(0, "weights", name))
    return rng.normal(0, 0.1, (128, 32)).astype(np.float32)[first:last]


@pytest.mark.parametrize("score", list(SCORES))
def test_a_recorded_run_keeps_exactly_the_budget(run_source: RunSource, score: str) -> None:
    names = [p.name for p in run_source.parameters if p.kind == "linear" and p.layer is not None]
    curves = tuple(Curve((name,), (0.1, 0.5, 1.0), (4.0 + i, 2.0, 1.0)) for i, name in enumerate(names))
    allocations: list[dict[str, Any]] = [
        {"allocation": "uniform"},
        {"allocation": "global"},
        {"allocation": "outlier", "outlier_times": 1.5},
        {"allocation": "given", "shares": {"q_proj": 0.6, "up_proj": 0.2}},
        {"allocation": "measured", "curves": curves},
    ]
    for within in WITHIN:
        for allocation in allocations:
            budget = 1234 if within == "row" else 0.5
            options = SelectOptions(budget=budget, score=score, within=within, balance=0.7, **allocation)
            selection = select(run_source, options)
            counts = np.zeros(256, np.int64)
            for name in selection.tensors:
                counts += np.bincount(groups_of(selection, run_source, name).ravel(), minlength=256)
            assert counts[:7].tolist() == selection.group_sizes
            wanted = budget if budget > 1 else round(budget * sum(counts))
            assert sum(selection.group_sizes) == selection.budget == wanted


def test_the_full_budget_keeps_every_weight_in_its_cell() -> None:
    source = make_source()
    for within in WITHIN:
        selection = select(source, SelectOptions(budget=1.0, within=within, core=0.0))
        for name in selection.tensors:
            np.testing.assert_array_equal(groups_of(selection, source, name), source.arrays[name]["labels"])


def test_without_balance_cells_keep_what_the_tensor_keeps() -> None:
    source = make_source()
    plain = select(source, SelectOptions(budget=0.4, within="tensor"))
    cells = {b: select(source, SelectOptions(budget=0.4, within="cell", balance=b)) for b in (0.0, 0.5, 1.0)}
    for name, cuts in plain.tensors.items():
        np.testing.assert_array_equal(groups_of(plain, source, name), groups_of(cells[0.0], source, name))
        ends = cells[0.0].tensors[name].kept, cells[1.0].tensors[name].kept
        assert np.abs(cells[0.5].tensors[name].kept - (ends[0] + ends[1]) / 2).max() <= 1.5
        labels, groups = source.arrays[name]["labels"], groups_of(cells[1.0], source, name)
        outside = np.bincount(labels[groups != CELLS], minlength=CELLS)
        exact = outside * ((cuts.kept.sum() - cuts.kept[-1]) / outside.sum())
        assert np.abs(cells[1.0].tensors[name].kept[:-1] - exact).max() < 1


def test_a_global_cut_keeps_the_highest_of_all_tensors() -> None:
    source = make_source()
    options = SelectOptions(
        budget=0.25, score="magnitude", worth="magnitude", within="tensor", allocation="global"
    )
    selection = select(source, options)
    values = np.concatenate([np.abs(source.arrays[n]["weights"]).ravel() for n in selection.tensors])
    kept = np.concatenate([groups_of(selection, source, n).ravel() != 255 for n in selection.tensors])
    assert values[kept].min() >= values[~kept].max()


def test_bands_engines_and_memory_do_not_matter(run_source: RunSource) -> None:
    options = SelectOptions(budget=0.3, score="gblm", allocation="global")
    alone = select(run_source, options)
    copied: RunSource = pickle.loads(pickle.dumps(run_source))
    with computing(EngineOptions(), 3) as compute:
        assert select(copied, options, compute).tree() == alone.tree()
    for name in alone.tensors:
        whole, groups = groups_of(alone, run_source, name), TensorGroups(alone, copied, name)
        rows = whole.shape[0]
        parts = [groups.of(first, min(first + 7, rows)) for first in reversed(range(0, rows, 7))]
        np.testing.assert_array_equal(np.concatenate(parts[::-1]), whole)


@pytest.mark.parametrize("within", WITHIN)
def test_a_tensor_of_several_chunks_is_cut_the_same_held_or_read_again(within: str) -> None:
    shape = (2300, 2000)  # more weights than are sorted at once, two chunks
    parameter = Parameter("w", shape, 0, "linear")
    data = arrays(shape, 0)
    source = ArraySource((parameter,), {"w": data}, {"w": attributes()}, cells=CELLS)
    options = SelectOptions(budget=0.3, within=within)
    keep, core = round(0.3 * parameter.size), round(0.15 * parameter.size)
    held, read = (Cutter(source, parameter, keep, core, options, size).cuts() for size in (1 << 40, 0))
    assert held.tree() == read.tree()
    selection = Selection(options, source.identity, CELLS, keep, {"w": read})
    groups = groups_of(selection, source, "w")
    assert np.bincount(groups.ravel(), minlength=256)[: CELLS + 1].tolist() == read.kept.tolist()


def test_a_selection_survives_json() -> None:
    source = make_source()
    names = [p.name for p in source.parameters if p.kind == "linear" and p.layer is not None]
    for options in (
        SelectOptions(
            budget=0.3,
            within="row",
            allocation="given",
            shares=dict.fromkeys(("q_proj", "up_proj", "down_proj"), 1.0),
        ),
        SelectOptions(budget=0.3, allocation="measured", curves=(Curve(tuple(names), (0.1,), (1.0,)),)),
        SelectOptions(budget=0.3, score="gblm", settings=ScoreSettings((1, 2, 3), 0.1, 4), core=0),
    ):
        selection = select(source, options)
        again = Selection.from_tree(json.loads(json.dumps(selection.tree())))
        assert again.tree() == selection.tree() and again.options == options
        for name in names:
            np.testing.assert_array_equal(groups_of(again, source, name), groups_of(selection, source, name))


def test_seeds_break_ties_otherwise() -> None:
    source = make_source()
    kept = [
        [groups_of(s, source, name) != 255 for name in s.tensors]
        for s in (select(source, SelectOptions(budget=0.3, within="tensor", seed=seed)) for seed in (0, 1))
    ]
    assert any((a != b).any() for a, b in zip(*kept, strict=True))


def test_totals_add_up() -> None:
    source = make_source()
    selection = select(source, SelectOptions(budget=500, core=0.3))
    found = totals(selection, source.parameters)
    everything = sum(p.size for p in source.parameters)
    assert found.linear.kept == 500 == sum(found.experts) and found.experts[-1] == 150 == found.linear.core
    assert found.linear.weights + found.trunk == everything == found.whole.weights
    assert found.whole.kept == 500 + found.trunk
    for parts in (found.kinds, found.layers, found.tensors):
        assert sum(part.kept for part in parts.values()) == 500
        assert sum(part.weights for part in parts.values()) == found.linear.weights
    assert list(found.kinds) == ["q_proj", "up_proj", "down_proj"] and list(found.layers) == ["0", "1"]
    assert len(found.table().rows) == 2 + 3 + 2
    assert json.loads(json.dumps(found.figures()))["linear"]["kept"] == 500


def test_the_trunk_can_be_widened() -> None:
    source = make_source()
    trunk = ("norm", "bias", "embedding", "head", "q_proj")
    selection = select(source, SelectOptions(budget=0.5, trunk=trunk))
    assert all("q_proj" not in name for name in selection.tensors)
    with pytest.raises(InputError, match=r"q_proj\.weight is in the trunk"):
        groups_of(selection, source, "l.0.q_proj.weight")
    head = replace(source, trunk=("norm", "bias", "embedding"))
    selection = select(head, SelectOptions(budget=0.5, trunk=("norm", "bias", "embedding")))
    assert "head.weight" in selection.tensors


def test_empty_experts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tinyonn")
    source = make_source()
    for data in source.arrays.values():
        data["labels"][data["labels"] == 3] = 1
    selection = select(source, SelectOptions(budget=0.3))
    assert selection.empty_experts == [3]
    assert "1 of 5 experts are empty: 3;" in caplog.text
    assert "experts are empty: 3" in totals(selection, source.parameters).table().notes[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 10**9}, r"budget = 1,000,000,000 weights, but only 3,328 .* at most 3328"),
        ({"budget": 4}, "below one weight for each of 5 experts"),
        ({"budget": 0.001}, "below one weight for each of 5 experts"),
        ({"budget": 0.0}, "budget = 0.0"),
        ({"budget": -3}, "budget = -3"),
        ({"budget": float("nan")}, "budget = nan"),
        ({"budget": 10.5}, "whole"),
        ({"core": 1.2}, "core = 1.2"),
        ({"core": float("nan")}, "core = nan"),
        ({"balance": -0.1}, "balance = -0.1"),
        ({"within": "layer"}, "choose cell, tensor, row"),
        ({"allocation": "best"}, "choose uniform"),
        ({"score": "wander"}, "no score is called"),
        ({"worth": "wander"}, "no score is called"),
        ({"allocation": "given"}, "shares belong to"),
        ({"shares": {"q_proj": 1.0}}, "shares belong to"),
        ({"allocation": "measured"}, "curves belong to"),
        ({"outlier_spread": float("inf")}, "outlier_spread = inf"),
        ({"settings": ScoreSettings(weights=(0, 0, 0))}, "all 0"),
        ({"trunk": ("norm",)}, "bias, embedding cannot be cut"),
        (
            {"trunk": (*("norm", "bias", "embedding", "head"), *("q_proj", "up_proj", "down_proj"))},
            "takes all",
        ),
        ({"trunk": ("norm", "bias", "embedding"), "budget": 0.5}, "head have no labels"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(make_source(), SelectOptions(**{"budget": 0.5, **options}))


def test_bad_data_are_refused() -> None:
    source = make_source()
    source.arrays["l.0.q_proj.weight"]["weights"][3, 4] = np.nan
    with pytest.raises(InputError, match=r"magnitude of 1 weights of l\.0\.q_proj\.weight is not a number"):
        select(source, SelectOptions(budget=0.5, score="magnitude", allocation="uniform"))
    source = make_source()
    source.arrays["l.1.q_proj.weight"]["labels"][0, 0] = 9
    with pytest.raises(InputError, match=r"l\.1\.q_proj\.weight has a weight with the label 9"):
        select(source, SelectOptions(budget=0.5))
    selection = select(make_source(), SelectOptions(budget=0.5))
    with pytest.raises(InputError, match="other records or labels"):
        groups_of(selection, replace(make_source(), identity="another"), "l.0.q_proj.weight")


def test_labels_that_are_missing_or_old_are_refused(tmp_path: Path) -> None:
    location = str(make_run(tmp_path))
    with pytest.raises(InputError, match="run `tinyonn score` first"):
        RunSource(open_run(location))
    score_run(location, ScoreConfig())
    with pytest.raises(InputError, match="run `tinyonn cluster` first"):
        RunSource(open_run(location))
    bare = RunSource(open_run(location), labels=False)
    selection = select(bare, SelectOptions(budget=0.3, score="activation", core=0.2, allocation="uniform"))
    assert selection.group_sizes == [
        selection.budget - round(0.2 * selection.budget),
        round(0.2 * selection.budget),
    ]
    with pytest.raises(InputError, match="needs the weights of"):
        select(bare, SelectOptions(budget=0.3, score="wanda"))
    cluster_run(location, ClusterConfig(cells=6))
    assert RunSource(open_run(location)).identity != bare.identity
    score_run(location, ScoreConfig(weights=SEED_WEIGHTS))
    with pytest.raises(InputError, match=r"other rows than the present .*weights of S act 1, grad 0.*grad 1"):
        RunSource(open_run(location))


def test_weights_of_another_model_are_refused(location: str) -> None:
    other = RunSource(open_run(location), lambda name, first, last: np.zeros((last - first, 7)))
    with pytest.raises(
        InputError, match=r"have the shape \[80, 7\] in the base model and \[80, 32\] in the run"
    ):
        select(other, SelectOptions(budget=0.5, score="magnitude"))


def test_a_task_states_its_memory(run_source: RunSource) -> None:
    large = ArraySource((Parameter("w", (9728, 2560), 0, "linear"),), {}, {}, cells=100)
    assert select_bytes(run_source, SelectOptions()) < select_bytes(large, SelectOptions()) < 512 << 20


def blocks_of(
    keys: np.ndarray, groups: np.ndarray, ends: list[int]
) -> Callable[[], Iterator[tuple[int, Any, Any]]]:
    def blocks() -> Iterator[tuple[int, Any, Any]]:
        for first, last in zip([0, *ends], [*ends, keys.size], strict=True):
            yield first, keys[first:last], groups if groups.size == 1 else groups[first:last]

    return blocks


@pytest.mark.parametrize("weights", [0, 1 << 40])
@pytest.mark.parametrize("distinct", [1, 3, 70_000, 1 << 32])
def test_cuts_are_exact_whichever_way_they_are_found(weights: int, distinct: int) -> None:
    rng = np.random.default_rng(distinct & 7)
    n, cells = 6000, 4
    keys = rng.integers(0, distinct, n, dtype=np.uint64).astype(np.uint32)
    for groups in (rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), n), ONE_GROUP):
        whose = np.broadcast_to(groups, n)
        sizes = np.bincount(whose, minlength=256)[: cells if groups.size > 1 else 1]
        place = places(keys, np.arange(n), 99)
        for fraction in (0.0, 0.3, 1.0):
            wanted = np.floor(sizes * fraction).astype(np.int64)
            cuts = exact_cuts(blocks_of(keys, groups, [10, 2000, 2001]), wanted, 99, weights)
            full = keys.astype(np.uint64) << np.uint64(32) | hashes(np.arange(n), 99)
            for cell, count in enumerate(wanted):
                reached = (whose == cell) & (full >= cuts[cell])
                np.testing.assert_array_equal(reached, highest(place, whose == cell, count))
                assert (cuts[cell] == NONE) == (count == 0)


def test_keys_order_like_scores() -> None:
    values = np.array([-np.inf, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, np.inf], np.float32)
    keys, wrong = keys_of(values)
    assert (np.diff(keys.astype(np.int64))[[0, 1, 2, 4, 5, 6]] > 0).all() and keys[3] == keys[4] and not wrong
    assert keys_of(np.array([1, np.nan, -np.nan], np.float32))[1] == 2
