"""What can be made again of a model's damaged files is, with a warning that names it; the rest is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.dense.architectures import make_model
from tests.experts.runs import clustered_run
from tests.hardening.models import place_of, turn
from tests.model.assembled import dense_model
from tests.train.trained import make_corpus
from tinyonn.config import Config, ExpertsConfig, ModelConfig
from tinyonn.errors import InputError
from tinyonn.experts.assemble import assemble_run
from tinyonn.experts.export import Assembled


def test_a_teachers_cache_is_compared_and_its_damaged_part_made_again(tmp_path: Path) -> None:
    from tinyonn.train.teacher import Cached, Live, cache_key, cache_teacher

    corpus = make_corpus(tmp_path / "corpus.arrow")
    live = Live(dense_model(make_model("qwen2", tmp_path / "model")))
    cache_teacher(live, corpus, tmp_path / "cache", "model", k=5)
    folder = tmp_path / "cache" / cache_key(corpus, "model", 5)
    path = folder / "part-000000.safetensors"
    whole = path.read_bytes()
    turn(path, -1)
    with pytest.raises(InputError, match=rf"{path.name} is damaged"):
        Cached(folder)
    cache_teacher(live, corpus, tmp_path / "cache", "model", k=5)
    assert path.read_bytes() == whole
    about = (folder / "teacher.json").read_text("utf-8")
    (folder / "teacher.json").write_text(about.replace("264", "265"), "utf-8")
    with pytest.raises(InputError, match=r"teacher\.json"):
        Cached(folder)


def test_a_converted_gguf_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    pytest.importorskip("gguf")
    from tests.dense.gguf_models import write_gguf
    from tinyonn.dense import gguf_folder
    from tinyonn.dense.source import model_folder

    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    config = ModelConfig(path=str(path), quantization="none", dtype="float32", device="cpu")
    folder = model_folder(config)
    for name in ("tokenizer.json", next(folder.glob("*.safetensors")).name, "config.json"):
        whole = (folder / name).read_bytes()
        turn(folder / name, -9)
        monkeypatch.setattr(gguf_folder, "_WHOLE", set())  # as another process sees it
        with caplog.at_level(logging.WARNING):
            assert model_folder(config) == folder
        assert (folder / name).read_bytes() == whole
        assert name in caplog.text


# Of a run: what assembly makes again, and what a profile reads


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("run")
    config = clustered_run(folder, quantization="none", rows_each=6)
    assemble_run(str(folder / "run"), config.model, ExpertsConfig(budget=0.6))
    return folder / "run", config


@pytest.fixture
def experts(run: tuple[Path, Config]) -> Iterator[Path]:
    """The assembled folder; whole again behind every test."""
    folder = run[0] / "experts"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    for name, content in before.items():
        (folder / name).write_bytes(content)


def again(run: tuple[Path, Config]) -> Any:
    return assemble_run(str(run[0]), run[1].model, ExpertsConfig(budget=0.6))


def test_a_damaged_shard_is_made_again_and_the_others_are_kept(
    run: tuple[Path, Config], experts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not again(run).fresh
    shards = sorted(experts.glob("*.safetensors"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    turn(shards[1], place_of(shards[1], "up_proj.values", 7), 3)
    with caplog.at_level(logging.WARNING):
        assert again(run).fresh
    assert f"{shards[1]} is damaged" in caplog.text and "made again" in caplog.text
    assert all(path.read_bytes() == before[path][0] for path in shards)
    assert [path.stat().st_mtime_ns == before[path][1] for path in shards] == [
        path != shards[1] for path in shards
    ]
    assert not again(run).fresh


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "generation_config.json",
        "digests.json",
    ],
)
def test_a_damaged_file_beside_the_shards_is_made_again(
    run: tuple[Path, Config], experts: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = experts / name
    before = path.read_bytes()
    times = {shard: shard.stat().st_mtime_ns for shard in experts.glob("*.safetensors")}
    path.write_bytes(before[: len(before) * 2 // 3])
    with pytest.raises(InputError, match=name):
        Assembled(experts)
    with caplog.at_level(logging.WARNING):
        assert again(run).fresh
    assert str(path) in caplog.text
    tree, wanted = path.read_bytes(), before
    assert name == "config.json" or tree == wanted  # the configuration tells how long it took
    assert times == {shard: shard.stat().st_mtime_ns for shard in experts.glob("*.safetensors")}
    assert not again(run).fresh


def test_cuts_of_a_killed_call_are_taken_only_as_they_were_written(
    run: tuple[Path, Config], experts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = {path: path.read_bytes() for path in experts.glob("*.safetensors")}
    for path in (experts / "config.json", *shards):
        path.unlink()
    cuts = experts / "selection.json"
    text = cuts.read_text("utf-8")
    place = next(at for at in range(len(text) // 2, len(text)) if text[at].isdigit())
    cuts.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :], "utf-8")
    with caplog.at_level(logging.WARNING):
        again(run)
    assert str(cuts) in caplog.text
    assert all(path.read_bytes() == content for path, content in shards.items())


def test_a_profile_reads_no_damaged_groups(run: tuple[Path, Config], experts: Path) -> None:
    from tinyonn.profile.groups import find_groups
    from tinyonn.run import open_run

    groups = find_groups(open_run(run[0]), experts, run[1].model)
    name = groups.tensors[0].name
    whole = groups.read(name)
    path = next(path for path in sorted(experts.glob("*.safetensors")) if _has(path, name))
    turn(path, place_of(path, f"{name.removesuffix('.weight')}.columns", 3))
    with pytest.raises(InputError, match=rf"{path.name} is damaged.*columns"):
        find_groups(open_run(run[0]), experts, run[1].model).read(name)
    assert whole.dtype == "uint8"


def _has(path: Path, name: str) -> bool:
    with safe_open(path, framework="pt") as file:
        return any(f"{name.removesuffix('.weight')}.columns" in key for key in file.keys())  # noqa: SIM118


@pytest.mark.slow
def test_a_damaged_trained_model_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.train.runs import make_world
    from tinyonn.train.stage import train_run

    world = make_world(tmp_path)
    (tmp_path / "trained").mkdir()
    assert train_run(world.run, world.config, world.options(tmp_path / "trained")).fresh
    path = tmp_path / "trained" / "model" / "model.safetensors"
    wanted = {name: tensor.clone() for name, tensor in load_file(path).items()}  # which lies in the file
    turn(path, -2)
    with caplog.at_level(logging.WARNING):
        assert train_run(world.run, world.config, world.options(tmp_path / "trained")).fresh
    assert f"{path} is damaged" in caplog.text
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_file(path).items())
    assert not train_run(world.run, world.config, world.options(tmp_path / "trained")).fresh
