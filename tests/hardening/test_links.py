"""Links and pipes in the folder of a model that somebody else packed: what they lead to is never published."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.experts.runs import clustered_run
from tests.record.runs import serial_run
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import Config, ExpertsConfig
from tinyonn.errors import InputError
from tinyonn.experts.assemble import assemble_run
from tinyonn.experts.export import export_model
from tinyonn.record.driver import record
from tinyonn.score.stage import score_run

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjE"
NAMES = (
    "tokenizer_extra.json",
    "vocab.txt",
    "merges.txt",
    "secret.model",
    "chat_template.jinja",
    "README.md",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A clustered run, and the configuration of its model in ``model``."""
    folder = tmp_path_factory.mktemp("links")
    return folder, clustered_run(folder, quantization="none")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    key = tmp_path / "home" / "id_ed25519"
    key.write_text(SECRET)
    return key


def copy(made: tuple[Path, Config], folder: Path) -> tuple[Path, Config]:
    shutil.copytree(made[0] / "run", folder / "run")
    shutil.copytree(made[0] / "model", folder / "model")
    config = made[1]
    model = config.model.model_copy(update={"path": str(folder / "model")})
    return folder, config.model_copy(update={"model": model})


def assemble(folder: Path, config: Config) -> Path:
    assemble_run(str(folder / "run"), config.model, ExpertsConfig(budget=0.5))
    return folder / "run" / "experts"


def holds_secret(folder: Path) -> list[str]:
    return [
        str(path) for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_the_models_folder_is_refused_before_any_work(
    made: tuple[Path, Config], tmp_path: Path, key: Path, name: str
) -> None:
    folder, config = copy(made, tmp_path)
    (folder / "model" / name).unlink(missing_ok=True)
    (folder / "model" / name).symlink_to(key)
    with pytest.raises(InputError, match=rf"{name} is a link to {key}, outside of the model's folder"):
        assemble(folder, config)
    assert not holds_secret(folder / "run")


def test_recording_warns_of_a_link_that_assembling_would_refuse(
    made: tuple[Path, Config], tmp_path: Path, key: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, config = copy(made, tmp_path)
    (folder / "model" / "vocab.txt").symlink_to(key)
    nothing = config.data.model_copy(update={"path": str(tmp_path / "nowhere.jsonl")})
    with pytest.raises(InputError, match="nowhere"):
        record(str(folder / "new"), config.model_copy(update={"data": nothing}))
    (line,) = [one.getMessage() for one in caplog.records if "is a link to" in one.getMessage()]
    assert "vocab.txt" in line and "tinyonn assemble" in line


def linked(folder: Path, key: Path) -> None:
    (folder / "tokenizer.model").symlink_to(key)


def linked_twice(folder: Path, key: Path) -> None:
    (folder / "inside").symlink_to(key)
    (folder / "tokenizer.model").symlink_to("inside")


def linked_folder(folder: Path, key: Path) -> None:
    (folder / "deep").symlink_to(key.parent)
    (folder / "tokenizer.model").symlink_to(f"deep/{key.name}")


def climbing(folder: Path, key: Path) -> None:
    (folder / "tokenizer.model").symlink_to(os.path.relpath(key, folder))


@pytest.mark.parametrize("plant", [linked, linked_twice, linked_folder, climbing])
@pytest.mark.parametrize("format", ["hub", "dense"])
def test_what_is_exported_holds_nothing_from_elsewhere(
    made: tuple[Path, Config], tmp_path: Path, key: Path, plant: Callable[[Path, Path], None], format: str
) -> None:
    experts = tmp_path / "experts"
    shutil.copytree(assembled(made), experts)
    plant(experts, key)
    with pytest.raises(InputError, match="outside of the model's folder"):
        export_model(experts, tmp_path / "out", format)
    assert not holds_secret(tmp_path / "out")


def assembled(made: tuple[Path, Config]) -> Path:
    experts = made[0] / "run" / "experts"
    return experts if (experts / "config.json").exists() else assemble(*made)


@pytest.mark.parametrize("format", ["hub", "dense"])
def test_only_a_models_own_files_are_exported(
    made: tuple[Path, Config], tmp_path: Path, key: Path, format: str
) -> None:
    experts = tmp_path / "experts"
    shutil.copytree(assembled(made), experts)
    for name in ("id_rsa", "notes.txt", "credentials.json", ".env", "tokenizer.pem", "evil.py"):
        (experts / name).write_text(SECRET)
    (experts / "private.txt").symlink_to(key)
    os.mkfifo(experts / "pipe.json")
    export_model(experts, tmp_path / "out", format)
    assert not holds_secret(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "generation_config.json",
    } <= names
    assert not names & {"pipe.json", "private.txt", "selection.json"}


def test_a_trained_model_takes_no_linked_tokenizer_along(
    made: tuple[Path, Config], tmp_path: Path, key: Path
) -> None:
    from tinyonn.experts.folder import open_assembled
    from tinyonn.train.checkpoint import save_model

    experts = tmp_path / "experts"
    shutil.copytree(assembled(made), experts)
    model = open_assembled(experts)
    save_model(model, tmp_path / "model", {"steps": 1}, experts)
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    (experts / "vocab.txt").symlink_to(key)
    with pytest.raises(InputError, match=r"vocab\.txt is a link to"):
        save_model(model, tmp_path / "model", {"steps": 1}, experts)
    assert not [path for path in holds_secret(tmp_path) if not path.startswith((str(experts), str(key)))]
    assert (tmp_path / "model" / "config.json").is_file(), "what was there stays whole"


def into_cache(model: Path, cache: Path) -> Path:
    """The folder as the hub's cache holds it: blobs by digest, a snapshot of links."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "0123abcd", cache / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_the_hubs_cache_is_assembled_though_it_is_links(
    made: tuple[Path, Config], tmp_path: Path, key: Path
) -> None:
    snapshot = into_cache(made[0] / "model", tmp_path / "hub")
    model = made[1].model.model_copy(update={"path": str(snapshot)})
    folder, config = tmp_path, made[1].model_copy(update={"model": model})
    serial_run(folder / "run", config)
    score_run(str(folder / "run"), config)
    cluster_run(str(folder / "run"), config)
    experts = assemble(folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (experts / name).read_bytes() == (made[0] / "model" / name).read_bytes()
        assert not (experts / name).is_symlink()
    (snapshot / "vocab.txt").symlink_to(key)
    with pytest.raises(InputError, match=r"vocab\.txt is a link to"):
        assemble(folder, config)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json", "extra.model"])
def test_a_pipe_or_device_in_a_model_is_refused_and_never_read(
    made: tuple[Path, Config], tmp_path: Path, name: str
) -> None:
    from tinyonn.dense.source import model_folder

    folder, config = copy(made, tmp_path)
    for plant in (os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero")):
        (folder / "model" / name).unlink(missing_ok=True)
        plant(folder / "model" / name)
        with pytest.raises(InputError, match=rf"{name} is no regular file"):
            model_folder(config.model)


def test_a_link_that_is_swapped_while_it_is_copied_is_judged_by_what_was_opened(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyonn.dense.copies import copy_file

    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    name = tmp_path / "model" / "tokenizer.json"
    name.write_text("{}")
    real = os.open

    def swapped(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if Path(path) == name:
            name.unlink()
            name.symlink_to(key)
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(InputError, match="is a link to"):
        copy_file(name, tmp_path / "out")
    assert not holds_secret(tmp_path / "out")
