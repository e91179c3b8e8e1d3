from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file

from tests.dense.architectures import ARCHITECTURES, VOCAB, make_model
from tests.dense.conftest import ModelFactory
from tinyonn.config import ModelConfig
from tinyonn.dense.load import (
    choose_device,
    fingerprint_model,
    load_model,
    load_shape,
    load_tokenizer,
    resolve_model,
)
from tinyonn.dense.parameters import list_parameters, list_uses
from tinyonn.dense.source import REFERENCE_MODEL, SHAPES, sha256
from tinyonn.errors import InputError

IDS = torch.arange(40, 56)[None]


def config_of(folder: object, **options: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", **options)


def output_gradients(config: ModelConfig) -> dict[str, torch.Tensor]:
    model = load_model(config).model
    found: dict[str, torch.Tensor] = {}

    def watch(module_name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: found.__setitem__(module_name, gradient))

        return hook

    names = {use.module_name: use.module for use in list_uses(model)}
    for module_name, module in names.items():
        module.register_forward_hook(watch(module_name))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert set(found) == set(names)
    assert all(tensor.grad is None for tensor in model.parameters())
    return found


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_output_gets_a_gradient_and_checkpointing_changes_no_bit(
    name: str, quantization: str, model_of: ModelFactory
) -> None:
    folder = model_of(name)
    plain = output_gradients(config_of(folder, quantization=quantization))
    again = output_gradients(config_of(folder, quantization=quantization, checkpointing=True))
    for module_name, gradient in plain.items():
        assert gradient.abs().max() > 0, module_name
        assert torch.equal(gradient, again[module_name]), module_name


def test_checkpointing_runs_the_layers_again_and_drops_nothing_out(model_of: ModelFactory) -> None:
    model = load_model(config_of(model_of("gpt2"), checkpointing=True)).model
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.get_submodule("transformer.h.0.ln_1").register_forward_hook(count)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert runs == 2
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    assert not any(module.training for module in dropouts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nf4_weights_stay_close_and_keep_their_shape_after_a_forward(
    name: str, model_of: ModelFactory
) -> None:
    model = load_model(config_of(model_of(name))).model
    unquantized = load_model(config_of(model_of(name), quantization="none")).model
    plain = {key: tensor.detach() for key, tensor in unquantized.named_parameters()}
    with torch.no_grad():
        model(input_ids=IDS)  # bitsandbytes may repack weights here
    quantized = 0
    for key, tensor in model.named_parameters():
        wanted = plain[key]
        if not hasattr(tensor, "quant_state"):
            assert torch.equal(tensor, wanted), key
            continue
        quantized += 1
        got = dequantize_4bit(tensor.data, tensor.quant_state)
        wanted = wanted.T if name == "gpt2" else wanted
        assert got.shape == wanted.shape
        assert 0.005 < (got - wanted).norm() / wanted.norm() < 0.15, key
    layers = [p for p in list_parameters(model) if p.kind == "linear" and p.layer is not None]
    assert quantized == len(layers) > 0  # the head, norms, biases and embeddings are left as they are


def test_a_loaded_model_is_frozen_and_in_evaluation(model_of: ModelFactory) -> None:
    dense = load_model(config_of(model_of("qwen2")))
    assert dense.device == torch.device("cpu")
    assert not dense.model.training
    assert not any(tensor.requires_grad for tensor in dense.model.parameters())
    assert dense.tokenizer.decode(dense.tokenizer("né")["input_ids"]) == "né"
    assert dense.model(input_ids=IDS).past_key_values is None


def test_the_padding_token_has_its_true_gradient(model_of: ModelFactory) -> None:
    model = load_model(config_of(model_of("gemma"), quantization="none", dtype="float32")).model
    model.requires_grad_(True)
    ids = torch.tensor([[256, 65, 66, 67]])  # 256 is Gemma's padding here
    hidden = model.get_submodule("model")(input_ids=ids).last_hidden_state
    hidden.square().sum().backward()
    gradient = model.get_parameter("model.embed_tokens.weight").grad
    assert gradient is not None
    assert gradient[256].abs().max() > 0


def test_the_shipped_shape_is_the_published_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    listed = list_parameters(load_shape(ModelConfig(path="Qwen/Qwen1.5-4B")))
    assert sum(parameter.size for parameter in listed) == 3_950_369_280
    assert sum(p.size for p in listed if p.kind == "linear" and p.layer is not None) == 3_171_942_400
    assert (SHAPES / "Qwen--Qwen1.5-4B" / "config.json").is_file()


def test_where_models_are_looked_for(tmp_path: Path) -> None:
    assert resolve_model(ModelConfig()) == REFERENCE_MODEL
    assert resolve_model(ModelConfig(path=str(tmp_path))) == tmp_path
    assert resolve_model(ModelConfig(path="org/name")) == "org/name"
    assert resolve_model(ModelConfig(path="gpt2")) == "gpt2"
    for path in ("./none", "/none/such", "a/b/c", "~/none", str(tmp_path / "none")):
        with pytest.raises(InputError, match=r"does not exist.*hub name.*reference"):
            resolve_model(ModelConfig(path=path))


def test_the_fingerprint_follows_the_content_alone(model_of: ModelFactory, tmp_path: Path) -> None:
    first = fingerprint_model(config_of(model_of("llama")))
    copy = shutil.copytree(model_of("llama"), tmp_path / "copy")
    assert fingerprint_model(config_of(copy)) == first
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(first)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    changed = fingerprint_model(config_of(copy))
    assert [key for key in first if first[key] != changed[key]] == ["model.safetensors"]


def test_digests_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, known = config_of(make_model("llama", tmp_path / "model")), tmp_path / "known.json"
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha256(path)

    monkeypatch.setattr("tinyonn.dense.source.sha256", counted)
    first = fingerprint_model(config, known)
    assert sorted(read) == sorted(first)
    read.clear()
    assert fingerprint_model(config, known) == first
    assert read == []
    settings = tmp_path / "model" / "generation_config.json"
    settings.write_text(settings.read_text("utf-8") + " ", "utf-8")
    again = fingerprint_model(config, known)
    assert read == ["generation_config.json"]
    assert again["generation_config.json"] != first["generation_config.json"]
    known.write_text("not JSON", "utf-8")
    assert fingerprint_model(config, known) == again


def test_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=r"model\.device = 'cuda'.*cpu or auto"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_on_the_gpu_are_near_the_cpus(name: str, model_of: ModelFactory) -> None:
    global IDS
    folder = model_of(name)
    cpu = output_gradients(config_of(folder, dtype="float32"))
    host = IDS
    try:
        IDS = host.cuda()
        gpu = output_gradients(ModelConfig(path=str(folder), device="cuda", dtype="float32"))
    finally:
        IDS = host
    for module_name, gradient in cpu.items():
        torch.testing.assert_close(gpu[module_name].cpu(), gradient, rtol=0.02, atol=1e-5, msg=module_name)


@pytest.fixture
def broken(model_of: ModelFactory, tmp_path: Path) -> Path:
    """A copy of a model, to be spoilt."""
    return Path(shutil.copytree(model_of("qwen2"), tmp_path / "broken"))


def edit_config(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / "config.json").read_text())
    tree.update(changes)
    (folder / "config.json").write_text(json.dumps(tree))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_model(config_of(folder))


def test_pickled_weights_are_refused_with_the_remedy(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    torch.save({}, broken / "model.pt")
    refused(broken, r"only pickled weights \(model\.pt\).*save_pretrained")


def test_no_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    refused(broken, "no weights")


def test_no_configuration(broken: Path) -> None:
    (broken / "config.json").unlink()
    refused(broken, r"no config\.json")


def test_malformed_configuration(broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": "qwen2"')
    refused(broken, "not readable as JSON")


def test_unknown_architecture(broken: Path) -> None:
    edit_config(broken, model_type="abacus")
    refused(broken, "model_type 'abacus' is not a causal language model")


def test_quantized_already(broken: Path) -> None:
    edit_config(broken, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(broken, r"quantized already \(gptq, 4 bits\)")


def test_truncated_weights(broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(broken, "not a readable safetensors file")


def test_a_missing_tensor_is_not_filled_with_random_numbers(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    refused(broken, r"1 tensors are missing.*layers\.1\.mlp\.up_proj")


def test_weights_of_another_shape(broken: Path) -> None:
    edit_config(broken, intermediate_size=192)
    refused(broken, "cannot be read|another shape")


def test_no_tokenizer(broken: Path) -> None:
    for file in broken.glob("tokenizer*"):
        file.unlink()
    refused(broken, "no usable tokenizer")
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_tokenizer(config_of(broken))


HUB = """
from tinyonn.dense.load import load_model
from tinyonn.config import ModelConfig
from tinyonn.errors import InputError
try:
    load_model(ModelConfig(path="nobody/nothing"))
except InputError as error:
    print(error)
"""


def test_the_hub_cannot_be_reached(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "'nobody/nothing' is not a folder here and the hub cannot be reached" in done.stdout
    assert "Traceback" not in done.stderr


def test_vocabulary_of_the_test_tokenizer(model_of: ModelFactory) -> None:
    assert len(load_tokenizer(config_of(model_of("qwen3")))) <= VOCAB
