"""`tinyonn cluster` on a real store: labels, churn, engines, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.recorded import SLICES, commit_part, make_run, make_store, parameters
from tinyonn.cluster.features import space_of
from tinyonn.cluster.histogram import Grid, Moved, count_bytes
from tinyonn.cluster.kmeans import match_numbers, stored_centres
from tinyonn.cluster.report import churn_of
from tinyonn.cluster.stage import OWN_BYTES, cluster_run
from tinyonn.config import ClusterConfig, FeatureWeights, ScoreConfig, parse_config
from tinyonn.dense.parameters import kind_of
from tinyonn.errors import CapacityError, InputError, StoreBusyError
from tinyonn.plan.demands import codec_bytes
from tinyonn.run import open_run
from tinyonn.score.stage import score_run
from tinyonn.show.sizes import MiB
from tinyonn.store.lock import RunLock
from tinyonn.store.records import Float64, unpack
from tinyonn.workers.tasks import EngineOptions

CONFIG = ClusterConfig(cells=7, iterations=200, tolerance=0.0)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("scored"))
    score_run(str(folder), ScoreConfig())
    return folder


def labels_of(folder: Path) -> dict[str, np.ndarray]:
    run = open_run(folder)
    return {parameter.name: np.asarray(run.labels(parameter.name)) for parameter in run.parameters}


def features_of(folder: Path, name: str, weights: FeatureWeights, config: ClusterConfig) -> Float64:
    """Scaled features of every weight of a tensor, one by one: float64 [weights, axes]."""
    run = open_run(folder)
    inside = [p for p in run.parameters if kind_of(p) not in config.trunk]
    space = space_of(inside, run.parameters, run.slices, weights)
    parameter = run.manifest.parameter(name)
    act, grad, freq, score = (code.reshape(-1) for code in unpack(np.asarray(run.rows(name))))
    affinity = np.asarray(run.affinity(name)).reshape(-1)
    out = np.zeros((parameter.size, space.axes))
    row, column = np.divmod(np.arange(parameter.size), parameter.shape[1])
    buckets = [16 if weight > 0 else 1 for weight in (weights.row, weights.column)]
    for i in range(parameter.size):
        out[i, :4] = score[i], act[i], grad[i], freq[i]
        out[i, 4 + (affinity[i] >> 4)] = affinity[i] & 15
        places = [
            0 if count == 1 else round((index * count // extent) * 15 / (count - 1))
            for index, extent, count in zip((row[i], column[i]), parameter.shape, buckets, strict=True)
        ]
        out[i, space.layer_axis :] = space.place(parameter, *places)
    return out * space.scale


@pytest.mark.parametrize("weights", [FeatureWeights(), FeatureWeights(row=0.5, column=0.25)])
def test_every_weight_gets_the_nearest_centre(scored: Path, weights: FeatureWeights) -> None:
    config = CONFIG.model_copy(update={"features": weights})
    report = cluster_run(str(scored), config, fresh=True)
    stored = open_run(scored).store.reader().stage("labels")
    assert stored is not None
    centres = np.array(stored["centres"]) * np.array(stored["scale"])
    labels, inertia = labels_of(scored), 0.0
    sizes = np.zeros(7, int)
    for parameter in parameters():
        own = labels[parameter.name].reshape(-1)
        if kind_of(parameter) in config.trunk:
            assert np.all(own == 255)
            continue
        features = features_of(scored, parameter.name, weights, config)
        distances = ((features[:, None, :] - centres[None]) ** 2).sum(2)
        assert np.mean(distances.argmin(1) == own) > 0.999
        inertia += distances.min(1).sum()
        sizes += np.bincount(own, minlength=7)
    assert report.inertia == pytest.approx(inertia, rel=1e-9)
    assert [cell.size for cell in report.cells] == sizes.tolist()
    assert report.weights + report.trunk == sum(parameter.size for parameter in parameters())


def test_summaries_say_what_the_cells_are_made_of(scored: Path) -> None:
    report = cluster_run(str(scored), CONFIG, fresh=True)
    run, labels = open_run(scored), labels_of(scored)
    for cell in report.cells:
        found = {"act": [], "slice": [], "kind": [], "layer": []}  # type: ignore[var-annotated]
        for parameter in parameters():
            own = labels[parameter.name] == cell.number
            found["act"] += unpack(np.asarray(run.rows(parameter.name)))[0][own].tolist()
            found["slice"] += (np.asarray(run.affinity(parameter.name))[own] >> 4).tolist()
            found["kind"] += [kind_of(parameter)] * int(own.sum())
            found["layer"] += [parameter.layer] * int(own.sum())
        assert cell.act == pytest.approx(np.mean(found["act"]))
        shares = {name: np.mean(np.array(found["slice"]) == i) for i, name in enumerate(run.slices)}
        assert cell.slices == pytest.approx({name: share for name, share in shares.items() if share})
        assert cell.kinds == pytest.approx(
            {k: found["kind"].count(k) / cell.size for k in set(found["kind"])}
        )
        assert cell.layers == pytest.approx([found["layer"].count(i) / cell.size for i in range(3)])


def test_the_same_again_is_nothing_to_do(scored: Path) -> None:
    first = cluster_run(str(scored), CONFIG, fresh=True)
    before = labels_of(scored)
    again = cluster_run(str(scored), CONFIG)
    assert not again.fresh
    assert again.cells == first.cells
    assert all(np.array_equal(before[name], table) for name, table in labels_of(scored).items())


def test_new_data_start_from_the_stored_centres_and_keep_the_numbers(tmp_path: Path) -> None:
    store = make_store(tmp_path, parts=4)
    leaves = {name: len(store.manifest.leaves(name)) for name in SLICES}
    for name, count in leaves.items():
        for part in range(count - (name == "code")):
            commit_part(store, name, part)
    score_run(str(tmp_path), ScoreConfig())
    config = ClusterConfig(cells=12, tolerance=0.0)
    cluster_run(str(tmp_path), config)
    before = labels_of(tmp_path)
    commit_part(store, "code", leaves["code"] - 1)
    score_run(str(tmp_path), ScoreConfig())
    report = cluster_run(str(tmp_path), config)
    after = labels_of(tmp_path)
    assert report.started_from == "stored centres"
    assert report.churn is not None
    inside = {name: before[name] != 255 for name in before}
    moved = sum(int((before[name] != after[name])[inside[name]].sum()) for name in before)
    total = sum(int(mask.sum()) for mask in inside.values())
    assert report.churn.share == pytest.approx(moved / total)
    assert 0 < report.churn.share < 0.25
    name = "layers.1.mlp.up_proj.weight"
    assert report.churn.tensors[name] == pytest.approx(np.mean(before[name] != after[name]))
    assert len(report.churn.cells) == 12
    fresh = cluster_run(str(tmp_path), config, fresh=True)  # numbers are matched even so
    assert fresh.started_from == "k-means++"


def test_numbers_are_matched_by_the_centres() -> None:
    space = space_of(parameters()[1:3], parameters(), ("code",), FeatureWeights())
    rng = np.random.default_rng(0)
    old = rng.uniform(0, 15, (9, space.axes))
    order = rng.permutation(9)
    numbers = match_numbers(old[order] + rng.normal(0, 0.01, old.shape), old, space)
    assert np.array_equal(numbers, order)


def test_stored_centres_are_taken_over_by_the_names_of_the_axes() -> None:
    small = space_of(parameters()[1:3], parameters(), ("code",), FeatureWeights())
    large = space_of(parameters()[1:3], parameters(), ("code", "new"), FeatureWeights())
    centres = np.random.default_rng(0).uniform(0, 15, (4, small.axes))
    taken = stored_centres({"axes": small.names, "centres": centres.tolist()}, large, 4)
    assert taken is not None
    assert np.array_equal(np.delete(taken, large.names.index("slice new"), axis=1), centres)
    assert np.all(taken[:, large.names.index("slice new")] == 0)
    assert stored_centres({"axes": small.names, "centres": centres.tolist()}, large, 5) is None


def test_churn_counts_weights_that_changed_cell() -> None:
    moves = np.zeros((256, 256), np.int64)
    moves[0, 0], moves[0, 1], moves[1, 1], moves[255, 255] = 6, 2, 12, 1000
    churn = churn_of({"w": Moved.of(moves)}, 2)
    assert churn.share == pytest.approx(2 / 20)
    assert churn.cells == pytest.approx([0.25, 0.0])


@pytest.mark.parametrize(
    "engine", ["distributed", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.nightly])]
)
def test_every_engine_gives_the_same_labels(scored: Path, engine: str) -> None:
    results = []
    for options in (EngineOptions("threads", 1), EngineOptions("threads", 3), EngineOptions(engine, 2)):  # type: ignore[arg-type]
        cluster_run(str(scored), CONFIG, options, fresh=True)
        results.append({name: table.tobytes() for name, table in labels_of(scored).items()})
    assert results[0] == results[1] == results[2]


def test_what_cannot_be_clustered_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(InputError, match="run `tinyonn score` first"):
        cluster_run(str(tmp_path), CONFIG)
    with pytest.raises(InputError, match="no labels yet; run `tinyonn cluster` first"):
        open_run(tmp_path).labels("lm_head.weight")
    score_run(str(tmp_path), ScoreConfig())
    flat = dict.fromkeys(FeatureWeights.model_fields, 0)
    with pytest.raises(InputError, match=r"cluster\.features.*at least one"):
        parse_config({"cluster": {"features": flat}}, whole=True)
    with pytest.raises(InputError, match="takes all tensors"):
        cluster_run(str(tmp_path), ClusterConfig(trunk=("norm", "embedding", "head", "q_proj", "up_proj")))
    with RunLock(tmp_path), pytest.raises(StoreBusyError):
        cluster_run(str(tmp_path), CONFIG)
    with pytest.raises(CapacityError, match=r"counting .* needs .* does not fit in 64.0 MiB of --memory"):
        cluster_run(str(tmp_path), CONFIG, EngineOptions(memory=64 * MiB))


def test_distinct_rows_that_do_not_fit_are_refused_before_the_clustering(tmp_path: Path) -> None:
    make_run(tmp_path)
    score_run(str(tmp_path), ScoreConfig())
    task = max(count_bytes(parameter.shape, Grid(1, 1)) for parameter in parameters())
    need = OWN_BYTES + codec_bytes(parameter.shape for parameter in parameters()) + task
    tight = EngineOptions(workers=1, memory=need + 1000)
    with pytest.raises(
        CapacityError, match=r"distinct rows of .* weights take .* 0.977 KiB are left.*--memory"
    ):
        cluster_run(str(tmp_path), CONFIG, tight)
    assert open_run(tmp_path).store.reader().stage("labels") is None
    assert cluster_run(str(tmp_path), CONFIG, EngineOptions(workers=1, memory=2 * need)).fresh


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf"), "much"])
def test_a_weight_of_a_feature_that_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"cluster\.features\.act"):
        parse_config({"cluster": {"features": {"act": value}}}, whole=True)
