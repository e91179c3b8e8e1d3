"""What the model refuses: gates, inputs, damaged folders, configurations that contradict themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, StaticCache

from tests.dense.conftest import ModelFactory
from tests.model.assembled import UP, assembled, saved, tokens
from tinyonn.experts import TinyONNConfig, TinyONNForCausalLM


@pytest.mark.parametrize(
    ("gates", "says"),
    [
        ([1.0, 0], r"gates of shape \[2\] do not fit 4 experts"),
        ([1, -0.5, 0, 0], r"gate at \[1\] is -0.5"),
        ([1, 0, float("nan"), 0], r"gate at \[2\] is nan"),
        ([1, 0, float("inf"), 0], "finite"),
        ([[1.0, 0, 0, 0]] * 3, "gates for 3 samples do not fit a batch of 2"),
        ([[[1.0, 0, 0, 0]] * 5] * 2, "gates for 5 tokens do not fit an input of 9"),
    ],
)
def test_bad_gates(pair: tuple[Any, TinyONNForCausalLM], gates: Any, says: str) -> None:
    _, model = pair
    with pytest.raises(ValueError, match=says):
        model(tokens(), gates=gates)
    with pytest.raises(ValueError, match=says), model.gates(gates):
        model(tokens())


def test_too_many_tokens(pair: tuple[Any, TinyONNForCausalLM]) -> None:
    _, model = pair
    with pytest.raises(ValueError, match="129 tokens do not fit the model's context of 128"):
        model(tokens(1, 129))
    padded = torch.ones(1, 129, dtype=torch.long)
    padded[0, :3] = 0
    model(tokens(1, 129), attention_mask=padded)
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
        with pytest.raises(ValueError, match="18 tokens do not fit a cache of 12"):
            model(tokens(), past_key_values=cache)


def test_sparse_path_says_that_it_has_no_gradients(pair: tuple[Any, TinyONNForCausalLM]) -> None:
    _, model = pair
    model.set_path("sparse")
    with pytest.raises(ValueError, match="no gradients"):
        model(tokens())
    with pytest.raises(ValueError, match="choose one of auto, dense, sparse"):
        model.set_path("fast")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _rename_assembly(path: Path) -> None:
    save_file(load_file(path), path, {"assembly": "another"})


def _forget_assembly(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (Path.unlink, "is missing"),
        (_cut, "truncated or damaged"),
        (_rename_assembly, "belongs to assembly another"),
        (_forget_assembly, "belongs to assembly unknown"),
    ],
)
def test_bad_shards(
    pair: tuple[Any, TinyONNForCausalLM], tmp_path: Path, harm: Callable[[Path], None], says: str
) -> None:
    path = sorted(saved(pair[1], tmp_path).glob("*.safetensors"))[1]
    with safe_open(path, framework="pt") as shard:
        assert shard.metadata()["assembly"] == "test"
    harm(path)
    with pytest.raises(ValueError, match=f"{path.name}.*{says}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_shard_of_other_sizes(model_of: ModelFactory, tmp_path: Path) -> None:
    """The same id, but entries that the configuration does not speak of."""
    for seed in (0, 1):
        _, model = assembled(model_of("qwen2"), kept=0.6, seed=seed)
        model.save_pretrained(tmp_path / str(seed))
    shutil.copy(tmp_path / "1" / "model.safetensors", tmp_path / "0")
    with pytest.raises(ValueError, match=r"model\.safetensors: .* has shape .* config\.json asks for"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "0")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("columns", 64, "a column is 64"), ("row_pointer", 1 << 20, "row_pointer falls|row_pointer ends")],
)
def test_entries_outside_the_matrix(
    pair: tuple[Any, TinyONNForCausalLM], tmp_path: Path, field: str, value: int, says: str
) -> None:
    pair[1].save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state[f"base.{UP}.{field}"].numpy()[7] = value
    save_file(state, tmp_path / "model.safetensors", {"assembly": "test"})
    with pytest.raises(ValueError, match=rf"{UP}: ({says})"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_tensor(pair: tuple[Any, TinyONNForCausalLM], tmp_path: Path) -> None:
    pair[1].save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["base.model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors", {"assembly": "test"})
    with pytest.raises(ValueError, match=r"1 tensors are in none of the shards, base\.model\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"experts": 255}, "experts = 255"),
        ({"expert_prior": [1.0]}, "expert_prior has 1 values but 4 experts need 4"),
        ({"expert_sizes": [1, 2, 3, 4, 5]}, "add up to 15"),
        ({"experts_top_k": 5}, "experts_top_k = 5"),
        ({"reroute_every": 0}, "reroute_every = 0"),
        ({"gates_per": "token"}, "gates_per = 'token' was removed"),
        ({"forward_path": "fast"}, "forward_path = 'fast'"),
        ({"base_config": {"vocab_size": 3}}, "no model_type"),
        ({"sparse_layers": {UP: {"out": 2, "in": 2, "entries": 5}}}, "5 entries but only 2 x 2"),
    ],
)
def test_bad_configuration(pair: tuple[Any, TinyONNForCausalLM], change: dict[str, Any], says: str) -> None:
    tree = pair[1].config.to_dict()
    with pytest.raises(ValueError, match=says):
        TinyONNConfig.from_dict({**tree, **change})


def test_a_removed_setting_at_its_default_is_read(pair: tuple[Any, TinyONNForCausalLM]) -> None:
    tree = pair[1].config.to_dict()
    config = TinyONNConfig.from_dict({**tree, "gates_per": "prompt"})
    assert config.to_dict() == tree


@pytest.mark.parametrize(
    ("name", "says"),
    [("model.layers.9.mlp.up_proj", "does not have"), ("model.norm", "must be a linear"), (UP, "is 4 x 4")],
)
def test_layers_of_another_base(pair: tuple[Any, TinyONNForCausalLM], name: str, says: str) -> None:
    tree = pair[1].config.to_dict()
    layers = {name: {"out": 4, "in": 4, "entries": 3}}
    config = TinyONNConfig.from_dict({**tree, "sparse_layers": layers, "expert_sizes": None})
    with pytest.raises(ValueError, match=says):
        TinyONNForCausalLM(config)
