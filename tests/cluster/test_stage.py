"""`tinyonn cluster` on a real store: labels, churn, engines, refusals."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cluster.runs import CONFIG, cluster, job_of, of_cluster, scored_run
from tests.experts.runs import CELLS, clustered_run
from tests.recorded import SLICES, commit_part, make_run, make_store, parameters, score
from tinyonn.cluster import look
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import Config, FeatureWeights, parse_config
from tinyonn.dense.parameters import kind_of
from tinyonn.errors import CapacityError, InputError, StoreBusyError
from tinyonn.run import open_run
from tinyonn.select.select import one_by_one
from tinyonn.show.sizes import MiB
from tinyonn.store.lock import RunLock
from tinyonn.workers.tasks import EngineOptions

INSIDE = [p for p in parameters() if kind_of(p) in ("q_proj", "up_proj")]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_run(tmp_path_factory.mktemp("scored"))


def labels_of(folder: Path) -> dict[str, np.ndarray]:
    run = open_run(folder)
    return {parameter.name: np.asarray(run.labels(parameter.name)) for parameter in run.parameters}


def stored_of(folder: Path) -> dict[str, Any]:
    stored = open_run(folder).store.reader().stage("labels")
    assert stored is not None
    return stored


MANY = FeatureWeights(need=1, act=0.5, layer=1, kind=0.5)


@pytest.mark.parametrize("config", [CONFIG, of_cluster(features=MANY), of_cluster(even=False)])
def test_every_weight_gets_the_nearest_centre(scored: Path, config: Config) -> None:
    report = cluster(scored, config, fresh=True)
    stored, labels, job = stored_of(scored), labels_of(scored), job_of(scored, config)
    looks, tables = job.look(one_by_one)
    sizes, inertia = np.zeros(7, int), 0.0
    for number, parameter in enumerate(job.inside):
        x_NA = look.coordinates(
            looks[number], tables[number], job.space.place(parameter), np.arange(parameter.size)
        )
        far_NK = np.square(x_NA[:, None] - np.array(stored["means"])[None]).sum(2)
        own = labels[parameter.name].reshape(-1)
        assert np.mean((far_NK + np.array(stored["handicaps"])).argmin(1) == own) > 0.998
        sizes += np.bincount(own, minlength=7)
        inertia += far_NK[np.arange(own.size), own].sum()
    assert [cell.size for cell in report.cells] == sizes.tolist()
    assert report.inertia == pytest.approx(inertia / report.weights, rel=1e-4)
    assert report.weights + report.trunk == sum(parameter.size for parameter in parameters())
    for parameter in parameters():
        if parameter not in INSIDE:
            assert np.all(labels[parameter.name] == 255)


def test_summaries_say_what_the_cells_are_made_of(scored: Path) -> None:
    report, labels, job = cluster(scored, fresh=True), labels_of(scored), job_of(scored)
    run = open_run(scored)
    looks, tables = job.look(one_by_one)
    needs = np.concatenate([
        look.coordinates(its, table, job.space.place(p), np.arange(p.size))
        for its, table, p in zip(looks, tables, job.inside, strict=True)
    ])  # fmt: skip
    every = np.concatenate([labels[parameter.name].reshape(-1) for parameter in job.inside])
    for cell in report.cells:
        own = every == cell.number
        needed = own & (needs.min(1) <= 0)
        assert (cell.size, cell.needed) == (own.sum(), needed.sum())
        wanted = np.exp(needs[needed].mean(0)) if needed.any() else np.full(3, np.e)
        assert list(cell.needs.values()) == pytest.approx(wanted.tolist(), rel=1e-4)
        kinds = [kind_of(p) for p in job.inside for _ in range(int((labels[p.name] == cell.number).sum()))]
        assert cell.kinds == pytest.approx({kind: kinds.count(kind) / cell.size for kind in set(kinds)})
        dominant = [np.asarray(run.affinity(p.name))[labels[p.name] == cell.number] >> 4 for p in job.inside]
        shares = {name: np.mean(np.concatenate(dominant) == i) for i, name in enumerate(run.slices)}
        assert cell.slices == pytest.approx({name: share for name, share in shares.items() if share})
        layers = [
            sum((labels[p.name] == cell.number).sum() for p in job.inside if p.layer == i) for i in range(3)
        ]
        assert cell.layers == pytest.approx([count / cell.size for count in layers])
    assert sum(report.cells[0].needs.values()) < sum(report.cells[-1].needs.values())  # most needed first


def test_the_same_again_is_nothing_to_do(tmp_path: Path) -> None:
    config = clustered_run(tmp_path)
    run = str(tmp_path / "run")
    before = labels_of(tmp_path / "run")
    again = cluster_run(run, config)
    assert not again.fresh and len(again.cells) == CELLS
    assert cluster_run(run, config, fresh=True).fresh
    assert all(np.array_equal(before[name], table) for name, table in labels_of(tmp_path / "run").items())
    other = config.model_copy(update={"experts": config.experts.model_copy(update={"budget": 0.5})})
    assert cluster_run(run, other).fresh
    wrong = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "none"})})
    with pytest.raises(InputError, match=r"recorded with model\.quantization: nf4, not none"):
        cluster_run(run, wrong)


def test_new_data_start_from_the_stored_centres_and_keep_the_numbers(tmp_path: Path) -> None:
    store = make_store(tmp_path, parts=4)
    leaves = {name: len(store.manifest.leaves(name)) for name in SLICES}
    for name, count in leaves.items():
        for part in range(count - (name == "code")):
            commit_part(store, name, part)
    score(tmp_path)
    config = of_cluster(cells=12)
    cluster(tmp_path, config)
    before = labels_of(tmp_path)
    commit_part(store, "code", leaves["code"] - 1)
    score(tmp_path)
    report = cluster(tmp_path, config)
    after = labels_of(tmp_path)
    assert report.started_from == "stored centres"
    assert report.churn is not None
    moved = sum(int((before[p.name] != after[p.name]).sum()) for p in INSIDE)
    assert report.churn.share == pytest.approx(moved / sum(p.size for p in INSIDE))
    assert 0 < report.churn.share < 0.35
    name = "layers.1.mlp.up_proj.weight"
    assert report.churn.tensors[name] == pytest.approx(np.mean(before[name] != after[name]))
    assert len(report.churn.cells) == 12
    fresh = cluster(tmp_path, config, fresh=True)  # numbers are matched even so
    assert fresh.started_from == "k-means++"
    assert fresh.churn is not None and fresh.churn.share < 0.8


def test_a_slice_that_comes_later_is_an_axis_more(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    commit_part(store, "code", 0)
    score(tmp_path)
    assert cluster(tmp_path).cells[0].needs.keys() == {"code"}
    for name in ("prose", "sums"):
        commit_part(store, name, 0)
    score(tmp_path)
    report = cluster(tmp_path)
    assert report.started_from == "stored centres"
    assert report.cells[0].needs.keys() == set(SLICES)


@pytest.mark.parametrize(
    "engine", ["distributed", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.nightly])]
)
def test_every_engine_gives_the_same_labels(scored: Path, engine: str) -> None:
    results = []
    for options in (EngineOptions("threads", 1), EngineOptions("threads", 3), EngineOptions(engine, 2)):  # type: ignore[arg-type]
        cluster(scored, options=options, fresh=True)
        results.append({name: table.tobytes() for name, table in labels_of(scored).items()})
    assert results[0] == results[1] == results[2]


def test_what_cannot_be_clustered_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(InputError, match="run `tinyonn score` first"):
        cluster_run(str(tmp_path), CONFIG)
    with pytest.raises(InputError, match="no labels yet; run `tinyonn cluster` first"):
        open_run(tmp_path).labels("lm_head.weight")
    score(tmp_path)
    with pytest.raises(InputError, match=r"cluster\.features\.need"):
        parse_config({"cluster": {"features": {"need": 0}}}, whole=True)
    with RunLock(tmp_path), pytest.raises(StoreBusyError):
        cluster_run(str(tmp_path), CONFIG)
    with pytest.raises(CapacityError, match=r"clustering needs .* does not fit in 64.0 MiB of --memory"):
        cluster(tmp_path, options=EngineOptions(memory=64 * MiB))
    assert open_run(tmp_path).store.reader().stage("labels") is None


def test_a_full_disk_leaves_the_labels_from_before(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(scored, fresh=True)
    before = labels_of(scored)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tinyonn.store.repository.Store.commit_stage", full)
    with pytest.raises(OSError, match="No space left"):
        cluster(scored, of_cluster(seed=3), fresh=True)
    monkeypatch.undo()
    assert all(np.array_equal(before[name], table) for name, table in labels_of(scored).items())
    assert cluster(scored, of_cluster(seed=3), fresh=True).fresh


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf"), "much"])
def test_a_weight_of_a_feature_that_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"cluster\.features\.act"):
        parse_config({"cluster": {"features": {"act": value}}}, whole=True)
