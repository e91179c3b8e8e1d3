"""A trained model on disk is the model in memory, and says what it was trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.dense.architectures import make_model
from tests.model.assembled import dense_model
from tests.train.trained import make_models
from tinyonn.errors import InputError
from tinyonn.experts.folder import open_assembled
from tinyonn.train.checkpoint import save_model

IDS = torch.arange(20).view(2, 10)


def test_it_loads_as_an_assembled_model(tmp_path: Path) -> None:
    _, model = make_models(tmp_path / "base")
    router: Any = model.router
    router.bias.uniform_()
    with torch.no_grad():
        router.main.weight.add_(0.123456789)
    folder = save_model(model, tmp_path / "model", {"steps": 3}, tmp_path / "base", torch.float32)
    loaded = open_assembled(folder).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    about = loaded.config.assembly
    assert about["training"] == {"steps": 3} and about["assembled"] == "test" and about["id"] != "test"
    assert model.config.assembly == {"id": "test"}
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == [64, 65]
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 13)


def test_masters_become_bfloat16_and_stay_in_memory(tmp_path: Path) -> None:
    _, model = make_models(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = open_assembled(save_model(model, tmp_path / "model", {}))
    assert loaded.dtype == torch.bfloat16 and loaded.state_dict()["router.main.weight"].dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    values = "base.model.layers.0.mlp.up_proj.values"
    assert torch.equal(loaded.state_dict()[values], before[values].bfloat16())


def test_a_new_one_takes_the_place_of_the_old_and_their_shards_do_not_mix(tmp_path: Path) -> None:
    _, model = make_models(tmp_path / "base")
    first = save_model(model, tmp_path / "model", {"steps": 1})
    shutil.copytree(first, tmp_path / "copy")
    second = save_model(model, tmp_path / "model", {"steps": 2})
    assert open_assembled(second).config.assembly["training"] == {"steps": 2}
    shutil.copyfile(tmp_path / "copy" / "model.safetensors", second / "model.safetensors")
    with pytest.raises(InputError, match="belongs to assembly"):
        open_assembled(second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "copy", "model"]


def test_any_other_model_is_saved_too(tmp_path: Path) -> None:
    model = dense_model(make_model("gpt2", tmp_path / "base"))
    folder = save_model(model, tmp_path / "model", {"steps": 5}, tmp_path / "base", torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert loaded.dtype == torch.float32 and loaded.config.training == {"steps": 5}
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
