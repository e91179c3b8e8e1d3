"""Assembly: every kept weight once, in its own expert, with the dense model's value; whatever happens on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dense.architectures import make_model
from tests.experts.independent_reader import read_weights
from tests.experts.runs import CELLS, clustered_run
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import Config, ExpertsConfig, ScoreConfig
from tinyonn.dense.weights import BaseWeights
from tinyonn.errors import CapacityError, InputError
from tinyonn.experts.assemble import assemble_run
from tinyonn.experts.folder import open_assembled
from tinyonn.run import open_run
from tinyonn.score.stage import score_run
from tinyonn.workers.tasks import EngineOptions, Kind


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("assemble")
    return folder / "run", clustered_run(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


def test_an_independent_reader_finds_every_kept_weight_once_in_its_expert(
    clustered: tuple[Path, Config],
) -> None:
    folder, config = clustered
    report = assemble_run(str(folder), config.model, ExpertsConfig(budget=0.4))
    run, base = open_run(folder), BaseWeights(config.model)
    sizes, core_and_cells = np.zeros(CELLS + 1, np.int64), 0
    for module, (experts, rows, columns, values) in read_weights(Path(report.folder)):
        places = rows * 10_000 + columns
        assert np.unique(places).size == places.size
        labels = np.asarray(run.labels(f"{module}.weight")[:])[rows, columns]
        assert ((experts == labels) | (experts == CELLS)).all()
        weights = base.matrix(f"{module}.weight").float().numpy()
        assert np.array_equal(weights[rows, columns].view(np.uint32), values.view(np.uint32))
        sizes += np.bincount(experts, minlength=CELLS + 1)
        core_and_cells += places.size
    assert core_and_cells == report.budget == round(0.4 * report.linear)
    assert sizes.tolist() == report.sizes
    assert report.sizes[-1] == round(ExpertsConfig().core * report.budget)


def test_the_configuration_says_how_large_experts_are_and_what_goes_through_them(
    clustered: tuple[Path, Config], tmp_path: Path
) -> None:
    folder, config = clustered
    report = assemble_run(str(folder), config.model, ExpertsConfig(budget=0.4), folder=tmp_path / "a")
    run, shares = open_run(folder), []
    for module, (experts, rows, columns, _) in read_weights(tmp_path / "a"):
        scored: Any = run.rows(f"{module}.weight")
        record, book = np.asarray(scored[:]), np.array(scored.attrs["fields"]["act"]["codebook"])
        energy = 2.0 ** book[record >> 12]  # two levels to the octave of |W| rms x
        own = np.bincount(experts, weights=energy[rows, columns], minlength=CELLS + 1)
        shares.append(own[:CELLS] / energy.sum())
    tree = json.loads((tmp_path / "a" / "config.json").read_text("utf-8"))
    assert tree["expert_sizes"] == report.sizes
    np.testing.assert_allclose(tree["expert_prior"], np.mean(shares, axis=0), rtol=1e-6)


def test_sizes_on_disk_are_those_of_the_arithmetic(clustered: tuple[Path, Config]) -> None:
    folder, config = clustered
    report = assemble_run(str(folder), config.model, ExpertsConfig(budget=0.4))
    assert report.bytes == pytest.approx(report.planned_bytes, rel=0.05)


def test_a_second_call_finds_nothing_to_do_and_what_is_lost_is_made_again(
    clustered: tuple[Path, Config], tmp_path: Path
) -> None:
    folder, config = clustered
    first = assemble_run(str(folder), config.model, ExpertsConfig(), folder=tmp_path / "a")
    before = contents(tmp_path / "a")
    again = assemble_run(str(folder), config.model, ExpertsConfig(), folder=tmp_path / "a")
    assert (first.fresh, again.fresh) == (True, False)
    assert again.sizes == first.sizes
    shard = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    kept = sorted((tmp_path / "a").glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:100])
    (tmp_path / "a" / "config.json").unlink()
    (tmp_path / "a" / "config.part").mkdir()  # of a call that was killed at its very end
    (tmp_path / "a" / "config.part" / "config.json").touch()
    (tmp_path / "a" / "model-00001-of-00003.part").touch()
    stamp = kept.stat().st_mtime_ns
    assert assemble_run(str(folder), config.model, ExpertsConfig(), folder=tmp_path / "a").fresh
    assert contents(tmp_path / "a") == before
    assert not list((tmp_path / "a").glob("*.part"))
    assert kept.stat().st_mtime_ns == stamp  # it was whole and stayed


@pytest.mark.parametrize(
    "engine", ["threads", pytest.param("distributed", marks=[pytest.mark.slow, pytest.mark.nightly])]
)
def test_any_engine_gives_the_same_bytes(
    clustered: tuple[Path, Config], tmp_path: Path, engine: Kind
) -> None:
    folder, config = clustered
    found = []
    for number, options in enumerate((EngineOptions("threads", 1), EngineOptions(engine, 2))):
        assemble_run(str(folder), config.model, ExpertsConfig(), options, tmp_path / str(number))
        found.append(contents(tmp_path / str(number)))
    assert found[0] == found[1]


def test_another_budget_replaces_the_folder(clustered: tuple[Path, Config], tmp_path: Path) -> None:
    folder, config = clustered
    assemble_run(str(folder), config.model, ExpertsConfig(), folder=tmp_path / "a")
    report = assemble_run(str(folder), config.model, ExpertsConfig(budget=100), folder=tmp_path / "a")
    assert report.budget == 100
    assert sum(rows.size for _, (_, rows, _, _) in read_weights(tmp_path / "a")) == 100


def test_an_empty_expert_is_named(clustered: tuple[Path, Config], tmp_path: Path) -> None:
    folder, config = clustered
    report = assemble_run(
        str(folder), config.model, ExpertsConfig(budget=CELLS, core=1.0), folder=tmp_path / "a"
    )
    assert report.empty == list(range(CELLS))
    assert logits(open_assembled(tmp_path / "a"), torch.ones(1, 3, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ExpertsConfig(budget=10**9), r"only 73,728 linear weights"),
        (ExpertsConfig(budget=3), r"below one weight for each of 6 experts"),
    ],
)
def test_budgets_out_of_range(clustered: tuple[Path, Config], config: ExpertsConfig, message: str) -> None:
    folder, settings = clustered
    with pytest.raises(InputError, match=message):
        assemble_run(str(folder), settings.model, config)


def test_labels_missing_or_of_other_rows(tmp_path: Path) -> None:
    config = clustered_run(tmp_path)
    run = str(tmp_path / "run")
    score_run(run, config.model_copy(update={"score": ScoreConfig(weights="wanda")}))
    with pytest.raises(
        InputError, match=r"labels .* were made from other rows .* run `tinyonn cluster` again"
    ):
        assemble_run(run, config.model, ExpertsConfig())
    cluster_run(run, config)
    assert assemble_run(run, config.model, ExpertsConfig()).fresh
    with pytest.raises(InputError, match=r"none"):
        assemble_run(str(tmp_path / "none"), config.model, ExpertsConfig())


def test_a_base_model_that_changed_is_refused(clustered: tuple[Path, Config], tmp_path: Path) -> None:
    folder, config = clustered
    make_model("qwen2", tmp_path / "other", seed=1)
    other = config.model.model_copy(update={"path": str(tmp_path / "other")})
    with pytest.raises(
        InputError, match=r"not the model that was recorded: model.safetensors has the fingerprint"
    ):
        assemble_run(str(folder), other, ExpertsConfig())
    with pytest.raises(InputError, match=r"recorded with model.quantization: nf4, not none"):
        assemble_run(str(folder), config.model.model_copy(update={"quantization": "none"}), ExpertsConfig())


def test_a_folder_of_something_else_is_left_alone(clustered: tuple[Path, Config], tmp_path: Path) -> None:
    folder, config = clustered
    before = contents(folder.parent / "model")
    with pytest.raises(
        InputError, match=r"not empty and was not written by `tinyonn assemble`; give a new folder"
    ):
        assemble_run(str(folder), config.model, ExpertsConfig(), folder=folder.parent / "model")
    assert contents(folder.parent / "model") == before


def test_shards_of_another_assembly_are_refused(clustered: tuple[Path, Config], tmp_path: Path) -> None:
    folder, config = clustered
    for name, budget in (("a", 0.3), ("b", 0.5)):
        assemble_run(str(folder), config.model, ExpertsConfig(budget=budget), folder=tmp_path / name)
    shard = sorted((tmp_path / "b").glob("*.safetensors"))[1]
    shutil.copy(shard, tmp_path / "a" / shard.name)
    with pytest.raises(InputError, match="belongs to assembly"):
        open_assembled(tmp_path / "a")


def test_memory_below_one_task_is_refused_with_what_is_needed(
    clustered: tuple[Path, Config], tmp_path: Path
) -> None:
    folder, config = clustered
    with pytest.raises(CapacityError, match=r"selecting needs .* give it that much"):
        assemble_run(
            str(folder), config.model, ExpertsConfig(), EngineOptions(memory=1 << 20), folder=tmp_path / "a"
        )


def test_the_card_says_what_was_kept(clustered: tuple[Path, Config], tmp_path: Path) -> None:
    folder, config = clustered
    report = assemble_run(str(folder), config.model, ExpertsConfig(), folder=tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text("utf-8")
    assert f"{report.budget:,} of {report.linear:,} weights" in card
    tree = json.loads((tmp_path / "a" / "config.json").read_text("utf-8"))
    assert sum(tree["expert_prior"]) <= 1
    assert tree["assembly"]["slices"] == {"code": 12, "prose": 12}
    assert tree["base_config"]["model_type"] == "qwen2"
