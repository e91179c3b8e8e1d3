from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.dense.architectures import make_model
from tests.dense.conftest import ModelFactory
from tests.dense.hub import COMMIT, serve_hub
from tinyonn.config import ModelConfig
from tinyonn.dense.checkpoint import open_tensors, tensor_files, weight_files
from tinyonn.dense.load import load_model, load_shape
from tinyonn.dense.parameters import list_parameters
from tinyonn.dense.source import fingerprint_model, model_folder
from tinyonn.dense.weights import BaseWeights
from tinyonn.errors import InputError
from tinyonn.plan.facts import describe_model

IDS = torch.arange(40, 56)[None]
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def config_of(path: object, **options: Any) -> ModelConfig:
    return ModelConfig(path=str(path), device="cpu", **{"quantization": "none", **options})


def logits(config: ModelConfig) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(config).model(input_ids=IDS).logits
    return found


@pytest.fixture
def folder(model_of: ModelFactory, tmp_path: Path) -> Path:
    """A copy of a model, to be changed."""
    return Path(shutil.copytree(model_of("llama"), tmp_path / "model"))


def shard(folder: Path, ending: str) -> list[str]:
    """Spread a model's weights over three files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[ending]
    files = [f"{stem}-0000{at}-of-00003.{ending}" for at in (1, 2, 3)]
    places = {name: files[at % 3] for at, name in enumerate(sorted(tensors))}
    for file in files:
        held = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        if ending == "bin":
            torch.save(held, folder / file)
        else:
            save_file(held, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return files


def to_bin(folder: Path, **options: Any) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["whole", "shards", "old"])
def test_a_bin_is_the_same_model_as_its_safetensors(
    form: str, name: str, quantization: str, model_of: ModelFactory, tmp_path: Path
) -> None:
    plain = config_of(model_of(name), quantization=quantization)
    folder = Path(shutil.copytree(plain.path, tmp_path / "bin"))
    if form == "shards":
        shard(folder, "bin")
    else:
        to_bin(folder, _use_new_zipfile_serialization=form == "whole")
    config = config_of(folder, quantization=quantization)
    assert torch.equal(logits(config), logits(plain))
    ours, theirs = BaseWeights(config), BaseWeights(plain)
    for parameter in list_parameters(load_shape(config)):
        if parameter.kind == "linear" and ours.has(parameter.name):
            assert torch.equal(ours.matrix(parameter.name), theirs.matrix(parameter.name))
            assert torch.equal(ours.rows(parameter.name, 3, 9), theirs.rows(parameter.name, 3, 9))
        elif ours.has(parameter.name):
            assert torch.equal(ours.tensor(parameter.name), theirs.tensor(parameter.name))


def test_the_fingerprint_has_the_files_of_the_weights(folder: Path) -> None:
    to_bin(folder)
    (folder / "training_args.bin").write_bytes(b"no part of the model")
    first = fingerprint_model(config_of(folder))
    assert "pytorch_model.bin" in first
    assert "training_args.bin" not in first
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors["model.norm.weight"][3] += 1
    torch.save(tensors, folder / "pytorch_model.bin")
    assert fingerprint_model(config_of(folder)) != first


class Evil:
    """What runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "bare", "inside"])
def test_code_in_a_bin_is_never_run(form: str, folder: Path, tmp_path: Path) -> None:
    ran, place = tmp_path / "ran", folder / "pytorch_model.bin"
    to_bin(folder)
    if form == "inside":
        torch.save({**torch.load(place), "model.extra": Evil(ran)}, place)
    elif form == "bare":
        place.write_bytes(pickle.dumps(Evil(ran)))
    else:
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Evil(ran), protocol=2))
            archive.writestr("archive/version", "3\n")
    for read in (load_model, lambda config: BaseWeights(config).tensor("model.norm.weight")):
        with pytest.raises(
            InputError, match=r"pytorch_model\.bin: not readable as tensors alone.*can run code"
        ):
            read(config_of(folder))
    assert not ran.exists()


def test_a_bin_that_is_damaged_or_no_tensors_by_name(folder: Path) -> None:
    to_bin(folder)
    place = folder / "pytorch_model.bin"
    content = place.read_bytes()
    place.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="not readable as tensors alone"):
        load_model(config_of(folder))
    torch.save({"state_dict": {"x": torch.zeros(3)}, "epoch": 3}, place)
    with pytest.raises(InputError, match=r"not tensors by name \('epoch': int\)"):
        load_model(config_of(folder))
    torch.save([torch.zeros(3)], place)
    with pytest.raises(InputError, match=r"not tensors by name \(list\)"):
        load_model(config_of(folder))


@pytest.mark.parametrize("form", ["whole", "shards"])
def test_what_lies_beside_the_weights_is_not_read(form: str, folder: Path) -> None:
    if form == "shards":
        shard(folder, "safetensors")
    before, wanted = fingerprint_model(config_of(folder)), logits(config_of(folder))
    for stray in (
        "consolidated.safetensors",
        "model-00009-of-00009.safetensors",
        "adapter_model.safetensors",
    ):
        (folder / stray).write_bytes(b"not safetensors, and no part of the model")
    for stray in ("pytorch_model.bin", "rng.pt", "x.gguf"):
        (folder / stray).write_bytes(b"older, and a pickle")
    assert fingerprint_model(config_of(folder)) == before
    assert torch.equal(logits(config_of(folder)), wanted)
    assert set(tensor_files(folder).values()) == set(weight_files(folder))
    assert BaseWeights(config_of(folder)).has("model.norm.weight")


def test_the_whole_file_is_preferred_where_there_is_an_index_too(folder: Path) -> None:
    """As ``transformers`` does, so that all that read a model read the same."""
    whole = (folder / "model.safetensors").read_bytes()
    files = shard(folder, "safetensors")
    (folder / "model.safetensors").write_bytes(whole)
    tensors = load_file(folder / files[0])
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, folder / files[0], {"format": "pt"})
    name = sorted(tensors)[0]
    loaded = load_model(config_of(folder, dtype="float32")).model.get_parameter(name)
    assert torch.equal(BaseWeights(config_of(folder, dtype="float32")).tensor(name), loaded)
    assert files[0] not in fingerprint_model(config_of(folder))


def rename(folder: Path, index: str, name: object) -> None:
    tree = json.loads((folder / index).read_text())
    tree["weight_map"]["model.norm.weight"] = name
    (folder / index).write_text(json.dumps(tree))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_index_that_names_what_it_must_not(ending: str, folder: Path, tmp_path: Path) -> None:
    index = {"safetensors": INDEX, "bin": BIN_INDEX}[ending]
    files = shard(folder, ending)
    shutil.copy(folder / files[0], tmp_path / files[0])
    for name in (
        f"../{files[0]}",
        str(tmp_path / files[0]),
        f"sub/{files[0]}",
        "..\\x",
        "config.json",
        "..",
        3,
    ):
        rename(folder, index, name)
        with pytest.raises(InputError, match=r"index\.json names .*, which is not a \*\.\w+ file beside it"):
            model_folder(config_of(folder))
    rename(folder, index, f"gone.{ending}")
    with pytest.raises(InputError, match=rf"index\.json names gone\.{ending}, which is not there"):
        model_folder(config_of(folder))
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        (folder / index).write_text(text)
        with pytest.raises(InputError, match="not a readable index"):
            model_folder(config_of(folder))


def test_weights_under_another_name_are_not_guessed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(InputError, match=r"weights \(consolidated\.safetensors\), which no index names"):
        model_folder(config_of(folder))
    tree = json.loads((folder / "config.json").read_text()) | {
        "transformers_weights": "consolidated.safetensors"
    }
    (folder / "config.json").write_text(json.dumps(tree))
    with pytest.raises(
        InputError, match=r"names 'consolidated\.safetensors' as its weights, which is not read"
    ):
        load_shape(config_of(folder))


def adapt(folder: Path, **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
    save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("read", [load_shape, load_model, describe_model, fingerprint_model, BaseWeights])
def test_adapters_are_refused_with_what_to_do(read: Any, folder: Path, tmp_path: Path) -> None:
    adapt(folder, base_model_name_or_path="org/base")
    with pytest.raises(
        InputError, match=r"adapter beside the weights.*a copy without it, or merge.*merge_and"
    ):
        read(config_of(folder))
    adapt(tmp_path / "alone", base_model_name_or_path="org/base")
    with pytest.raises(InputError, match=r"adapter of org/base.*give org/base.*pretrained\('org/base'\)"):
        read(config_of(tmp_path / "alone"))
    (tmp_path / "alone" / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="an adapter of its base model"):
        read(config_of(tmp_path / "alone"))


QUANTIZED = [
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, r"\(fp8\)"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"\(gptq, 4 bits\)"),
    ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, r"\(awq, 4 bits\)"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, r"\(mxfp4\)"),
    ({"quantization_config": {"load_in_4bit": True}}, r"\(bitsandbytes, 4 bits\)"),
    ({"quantization_config": "int8"}, r"\(int8\)"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, r"\(compressed-tensors\)"),
    ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, r"\(fp8\)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "match"), QUANTIZED)
def test_quantized_checkpoints_are_refused_from_their_configuration(
    changes: dict[str, Any], match: str, folder: Path
) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | changes))
    with pytest.raises(InputError, match=rf"is quantized already {match}; give the original model"):
        describe_model(config_of(folder))  # what `tinyonn plan` reads


def test_quantized_checkpoints_that_say_so_elsewhere(folder: Path) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"quantization_config": None}))
    load_shape(config_of(folder))
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"quantized already \(ModelOpt\)"):
        describe_model(config_of(folder))
    (folder / "hf_quant_config.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        tensors | {name: tensors[name].to(torch.float8_e4m3fn)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match=r"up_proj\.weight is F8_E4M3, so the model is quantized already"):
        load_model(config_of(folder))


def test_from_the_hub_come_the_named_files_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, named = logits(config_of(folder)), shard(folder, "safetensors")
    for stray in (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "model.gguf",
        "old/x.safetensors",
        "onnx/a.json",
    ):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_bytes(b"not fetched")
    with serve_hub(folder, tmp_path / "cache", monkeypatch) as fetched:
        config = config_of("org/name")
        load_shape(config)
        assert fetched == ["config.json"]
        assert torch.equal(logits(config), wanted)
        beside = {path.name for path in folder.iterdir() if path.suffix in (".json", ".jinja")}
        assert sorted(fetched) == sorted({*named, *beside})
        prints = fingerprint_model(config)
        assert prints.pop("commit") == COMMIT
        assert prints == fingerprint_model(config_of(folder))
        assert len(fetched) == len({*named, *beside})


@pytest.mark.parametrize("form", ["whole", "bin", "bin shards"])
def test_from_the_hub_in_every_form(
    form: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, named = logits(config_of(folder)), ["model.safetensors"]
    (folder / "training_args.bin").write_bytes(b"not fetched")
    if form == "bin shards":
        named = shard(folder, "bin")
    elif form == "bin":
        to_bin(folder)
        named = ["pytorch_model.bin"]
    with serve_hub(folder, tmp_path / "cache", monkeypatch) as fetched:
        assert torch.equal(logits(config_of("org/name")), wanted)
    assert sorted(name for name in fetched if not name.endswith((".json", ".jinja"))) == named


def test_what_the_hub_has_not(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with (
        serve_hub(folder, tmp_path / "one", monkeypatch),
        pytest.raises(InputError, match="of GGUF files fetch one"),
    ):
        model_folder(config_of("org/name"))
    adapt(folder, base_model_name_or_path="org/base")
    (folder / "config.json").unlink()
    with (
        serve_hub(folder, tmp_path / "two", monkeypatch),
        pytest.raises(InputError, match="an adapter of org/base"),
    ):
        load_shape(config_of("org/name"))


def test_tensors_of_a_bin_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.ones(2)}, tmp_path / "x.bin")
    with open_tensors(tmp_path / "x.bin") as file:
        assert sorted(file.keys()) == ["a", "b"]
        assert file.get_slice("a").get_shape() == [4, 3]
        assert file.get_slice("a").get_dtype() == "FLOAT32"
        part = file.get_slice("a")[1:3]
    (tmp_path / "x.bin").unlink()
    assert part.tolist() == [[1.0, 5.0, 9.0], [2.0, 6.0, 10.0]]


def test_transformers_reads_the_same_file(tmp_path: Path) -> None:
    """The order of `weight_files` is that of ``from_pretrained``."""
    folder = make_model("llama", tmp_path / "m")
    to_bin(folder)
    other = make_model("llama", tmp_path / "other", seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(logits(config_of(folder)), model(input_ids=IDS).logits)
    shutil.copy(other / "model.safetensors", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(logits(config_of(folder)), model(input_ids=IDS).logits)
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]
