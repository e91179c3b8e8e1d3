from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyonn.select.cuts as cuts_module
from tests.recorded import make_run, score, write_labels
from tests.select.arrays import CELLS, arrays, attributes, make_source
from tinyonn.config import ExpertsConfig, ScoreConfig
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.experts.report import totals
from tinyonn.run import open_run
from tinyonn.score.scores import SCORES
from tinyonn.score.source import DROPPED, ArraySource, RunSource, digest
from tinyonn.select.cuts import EVERY, NONE, Cutter, exact_cut, keys_of
from tinyonn.select.select import Selection, SelectOptions, TensorGroups, groups_of, select, select_bytes
from tinyonn.select.selection import select_options
from tinyonn.store.records import dither_seed
from tinyonn.workers.tasks import EngineOptions, computing


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


def ranks(values: np.ndarray, index: np.ndarray, seed: int) -> np.ndarray:
    """Order of values, ties by hash: the rank of each, distinct."""
    order = np.lexsort((hashes(index, seed), values))
    out = np.empty(values.size, np.int64)
    out[order] = np.arange(values.size)
    return out


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
    values = score.prepare(source, parameter)(source.band(name, 0, shape[0], score.needs)).ravel()
    seed, index = dither_seed(options.seed, "select", name), np.arange(values.size)
    marked = highest(ranks(values, index, seed), np.ones(values.size, np.bool_), kept.sum())
    core = highest(ranks(keys_of(values)[0] >> 16, index, seed), marked, kept[-1])
    groups = np.where(marked, data["labels"].ravel(), DROPPED)
    groups[core] = source.cells
    return groups.reshape(shape)


@pytest.mark.parametrize("score", ["source", "wanda", "magnitude", "root", "random"])
@pytest.mark.parametrize("transposed", [False, True])
def test_groups_are_those_of_a_sort(score: str, transposed: bool) -> None:
    source = make_source(transposed=transposed)
    for budget, core in ((0.3, 0.5), (0.3, 0.4), (777, 0.0), (0.9, 1.0)):
        options = SelectOptions(budget=budget, score=score, core=core, seed=3)
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
    score(location)
    write_labels(location, 6)
    return location


@pytest.fixture(scope="module")
def run_source(location: str) -> RunSource:
    return RunSource(open_run(location), _weights)


def _weights(name: str, first: int, last: int) -> np.ndarray:
    rng = np.random.default_rng(dither_seed(0, "weights", name))
    return rng.normal(0, 0.1, (128, 32)).astype(np.float32)[first:last]


@pytest.mark.parametrize("score", list(SCORES))
def test_a_recorded_run_keeps_exactly_the_budget(run_source: RunSource, score: str) -> None:
    allocations: list[dict[str, Any]] = [
        {"allocation": "uniform"},
        {"allocation": "global"},
        {"allocation": "given", "shares": {"q_proj": 0.6, "up_proj": 0.2}},
    ]
    for allocation, budget in product(allocations, (1234, 0.5)):
        selection = select(run_source, SelectOptions(budget=budget, score=score, core=0.5, **allocation))
        counts = np.zeros(256, np.int64)
        for name in selection.tensors:
            counts += np.bincount(groups_of(selection, run_source, name).ravel(), minlength=256)
        assert counts[:7].tolist() == selection.group_sizes
        wanted = budget if budget > 1 else round(budget * sum(counts))
        assert sum(selection.group_sizes) == selection.budget == wanted


def test_the_full_budget_keeps_every_weight_in_its_cell() -> None:
    source = make_source()
    selection = select(source, SelectOptions(budget=1.0, core=0.0))
    for name in selection.tensors:
        np.testing.assert_array_equal(groups_of(selection, source, name), source.arrays[name]["labels"])


def score_of(source: ArraySource, name: str, score: str) -> np.ndarray:
    parameter = next(p for p in source.parameters if p.name == name)
    chosen = SCORES[score]
    return chosen.prepare(source, parameter)(source.band(name, 0, parameter.shape[0], chosen.needs))


def test_a_global_cut_keeps_the_highest_of_all_tensors() -> None:
    source = make_source()
    selection = select(source, SelectOptions(budget=0.25, score="wg", allocation="global"))
    values = np.concatenate([score_of(source, name, "wg").ravel() for name in selection.tensors])
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


def test_a_tensor_of_several_chunks_is_cut_the_same_held_or_read_again() -> None:
    shape = (2300, 2000)  # more weights than are sorted at once, two chunks
    parameter = Parameter("w", shape, 0, "linear")
    data = arrays(shape, 0)
    source = ArraySource((parameter,), {"w": data}, {"w": attributes()}, cells=CELLS)
    options = SelectOptions(budget=0.3, score="wanda")
    keep, core = round(0.3 * parameter.size), round(0.15 * parameter.size)
    held, read = (Cutter(source, parameter, keep, core, options, size).cuts() for size in (1 << 40, 0))
    assert held.tree() == read.tree()
    selection = Selection(options, source.identity, CELLS, keep, {"w": read})
    groups = groups_of(selection, source, "w")
    assert np.bincount(groups.ravel(), minlength=256)[: CELLS + 1].tolist() == read.kept.tolist()


def test_a_selection_survives_json() -> None:
    source = make_source()
    names = [p.name for p in source.parameters if p.kind == "linear" and p.layer is not None]
    shares = dict.fromkeys(("q_proj", "up_proj", "down_proj"), 1.0)
    for options in (
        SelectOptions(budget=0.3, allocation="given", shares=shares),
        SelectOptions(budget=0.3, score="gblm", core=0),
    ):
        selection = select(source, options)
        tree = json.loads(json.dumps(selection.tree()))
        for cuts in tree["tensors"].values():
            cuts["cell_cut"] = ""  # of earlier versions, with cuts of cells
        again = Selection.from_tree(tree)
        assert again.tree() == selection.tree() and again.options == options
        for name in names:
            np.testing.assert_array_equal(groups_of(again, source, name), groups_of(selection, source, name))


def test_a_selection_is_the_one_that_models_assembled_before_are_known_by() -> None:
    options = select_options(ExpertsConfig(), "root")  # which was the default
    assert digest(options.tree()) == "e5107aeb90db05e77f1a0c1cc91c5e6c"


def test_seeds_break_ties_otherwise() -> None:
    source = make_source()
    kept = [
        [groups_of(s, source, name) != 255 for name in s.tensors]
        for s in (select(source, SelectOptions(budget=0.3, score="wanda", seed=seed)) for seed in (0, 1))
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


def test_the_trunk_stays_whole() -> None:
    source = make_source()
    selection = select(source, SelectOptions(budget=0.5))
    with pytest.raises(InputError, match=r"head\.weight is in the trunk"):
        groups_of(selection, source, "head.weight")


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
        ({"allocation": "best"}, "choose uniform"),
        ({"score": "wander"}, "no score is called"),
        ({"allocation": "given"}, "shares belong to"),
        ({"shares": {"q_proj": 1.0}}, "shares belong to"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(make_source(), SelectOptions(**{"budget": 0.5, **options}))


def test_bad_data_are_refused() -> None:
    uncut = replace(make_source(), parameters=make_source().parameters[:1])
    with pytest.raises(InputError, match="nothing to be cut"):
        select(uncut, SelectOptions(budget=0.5))
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
    score(location)
    with pytest.raises(InputError, match="run `tinyonn cluster` first"):
        RunSource(open_run(location))
    bare = RunSource(open_run(location), labels=False)
    selection = select(bare, SelectOptions(budget=0.3, score="random", core=0.2, allocation="uniform"))
    assert selection.group_sizes == [
        selection.budget - round(0.2 * selection.budget),
        round(0.2 * selection.budget),
    ]
    with pytest.raises(InputError, match="needs the weights of"):
        select(bare, SelectOptions(budget=0.3, score="wanda"))
    write_labels(location, 6)
    assert RunSource(open_run(location)).identity != bare.identity
    score(location, ScoreConfig(weights="source"))
    with pytest.raises(
        InputError, match=r"other rows than the present .*weights of S input 0.5, gradient 0.75.*gradient -1"
    ):
        RunSource(open_run(location))


def test_weights_of_another_model_are_refused(location: str) -> None:
    other = RunSource(open_run(location), lambda name, first, last: np.zeros((last - first, 7)))
    with pytest.raises(
        InputError, match=r"have the shape \[80, 7\] in the base model and \[80, 32\] in the run"
    ):
        select(other, SelectOptions(budget=0.5, score="magnitude"))


def test_a_task_states_its_memory(run_source: RunSource) -> None:
    large = ArraySource((Parameter("w", (9728, 2560), 0, "linear"),), {}, {}, cells=100)
    assert select_bytes(run_source) < select_bytes(large) < 512 << 20


def blocks_of(
    keys: np.ndarray, among: np.ndarray, ends: list[int]
) -> Callable[[], Iterator[tuple[int, Any, Any]]]:
    def blocks() -> Iterator[tuple[int, Any, Any]]:
        for first, last in zip([0, *ends], [*ends, keys.size], strict=True):
            yield first, keys[first:last], among if among is EVERY else among[first:last]

    return blocks


@pytest.mark.parametrize("weights", [0, 1 << 40])
@pytest.mark.parametrize("gathered", [0, 300, 1 << 22])
@pytest.mark.parametrize("distinct", [1, 3, 70_000, 1 << 32])
def test_a_cut_is_exact_whichever_way_it_is_found(
    weights: int, gathered: int, distinct: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts_module, "GATHERED", gathered)
    rng = np.random.default_rng(distinct & 7)
    n = 6000
    keys = rng.integers(0, distinct, n, dtype=np.uint64).astype(np.uint32)
    order = ranks(keys, np.arange(n), 99)
    full = keys.astype(np.uint64) << np.uint64(32) | hashes(np.arange(n), 99)
    for among in (rng.random(n) < 0.6, EVERY):
        counting = np.broadcast_to(among, n)
        for count in (0, 1, int(0.3 * counting.sum()), int(counting.sum())):
            cut = exact_cut(blocks_of(keys, among, [10, 2000, 2001]), count, 99, weights or n)
            reached = counting & (full >= cut)
            np.testing.assert_array_equal(reached, highest(order, counting, count))
            assert (cut == NONE) == (count == 0)


def test_keys_order_like_scores() -> None:
    values = np.array([-np.inf, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, np.inf], np.float32)
    keys, wrong = keys_of(values)
    assert (np.diff(keys.astype(np.int64))[[0, 1, 2, 4, 5, 6]] > 0).all() and keys[3] == keys[4] and not wrong
    assert keys_of(np.array([1, np.nan, -np.nan], np.float32))[1] == 2
