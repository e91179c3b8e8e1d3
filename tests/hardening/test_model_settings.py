"""Settings of models, ours and others': what is damaged or hostile is a message that names the file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.hardening.models import refused, turn
from tinyonn.config import ModelConfig
from tinyonn.errors import InputError
from tinyonn.experts.export import Assembled
from tinyonn.experts.folder import open_assembled
from tinyonn.model.configuration_tinyonn import FREE


def test_no_turned_bit_of_the_settings_is_silent(model: Path) -> None:
    path = model / "config.json"
    whole, chance, harmless = path.read_bytes(), random.Random(3), 0
    before = AutoConfig.from_pretrained(model).to_dict()
    for _ in range(150):
        turn(path, chance.randrange(len(whole)), chance.randrange(7))
        said = refused(model)
        if not said:
            after = AutoConfig.from_pretrained(model).to_dict()
            assert all(after.get(key) == before[key] for key in before if key not in (*FREE, "_name_or_path"))
            harmless += 1
        assert not said or str(model) in said
        path.write_bytes(whole)
    assert harmless < 75  # mostly white space


def test_settings_can_be_changed_in_python_and_not_by_accident(model: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.config.experts_top_k, loaded.config.use_cache = 2, False
    loaded.save_pretrained(tmp_path / "again")
    path = tmp_path / "again" / "config.json"
    tree = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**tree, "dtype": "bfloat16", "transformers_version": "9"}), "utf-8")
    again = open_assembled(tmp_path / "again")
    assert again.config.experts_top_k == 2 and again.dtype == torch.bfloat16
    path.write_text(json.dumps({**tree, "experts_top_k": 3}), "utf-8")
    with pytest.raises(InputError, match=r"again/config\.json: 'experts_top_k' is not what was written"):
        open_assembled(tmp_path / "again")
    tree.pop("digests")
    path.write_text(json.dumps({**tree, "experts_top_k": 3}), "utf-8")
    assert open_assembled(tmp_path / "again").config.experts_top_k == 3


HOSTILE: dict[str, Any] = {
    "experts": "six", "expert_sizes": {"a": 1}, "expert_prior": ["x"], "sparse_layers": [1], "assembly": "id",
    "base_config": [1], "router": [[1]], "experts_top_k": {"a": 1}, "reroute_every": "often",
}  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_settings_of_the_wrong_kind_are_a_message(model: Path, key: str) -> None:
    path = model / "config.json"
    tree = json.loads(path.read_text("utf-8"))
    tree.pop("digests", None)
    path.write_text(json.dumps({**tree, key: HOSTILE[key]}), "utf-8")
    for read in (open_assembled, Assembled):
        with pytest.raises(InputError, match=r"config\.json"):
            read(model)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 100_000 + "}" * 100_000,
        '{"a":' * 60 + "1" + "}" * 60,
        "[" * 5000,
        '{"vocab_size": ' + "9" * 5000 + "}",
        "\xff",
        "7",
    ],
    ids=["deep", "nested", "open", "digits", "bytes", "number"],
)
def test_hostile_text_is_a_message(model: Path, saved: Path, tmp_path: Path, text: str) -> None:
    base = Path(shutil.copytree(saved / "base", tmp_path / "base"))
    from tinyonn.dense.load import recordable_shape

    for folder in (model, base):
        (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        open_assembled(model)
    with pytest.raises(InputError, match=r"config\.json"):
        recordable_shape(ModelConfig(path=str(base), quantization="none", device="cpu"))


OF_BASE: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", "x"), ("vocab_size", 0), ("vocab_size", "x"),
    ("text_config", {"a": {}}), ("text_config", [1]), ("hidden_act", {}), ("rope_parameters", [1]), ("model_type", {}),
    ("layer_types", [1]), ("num_attention_heads", 0), ("hidden_size", -1), ("max_position_embeddings", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), OF_BASE)
def test_a_bases_hostile_settings_are_a_message_at_once(
    saved: Path, tmp_path: Path, key: str, value: Any
) -> None:
    from tinyonn.plan.facts import describe_model

    base = Path(shutil.copytree(saved / "base", tmp_path / "base"))
    tree = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**tree, key: value}), "utf-8")
    with pytest.raises(InputError, match=str(base)):
        describe_model(ModelConfig(path=str(base), quantization="none", device="cpu"))


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "modeling_tinyonn.py"])
def test_what_lies_beside_the_weights_is_compared_too(model: Path, name: str) -> None:
    turn(model / name, 20)
    for read in (open_assembled, Assembled):
        with pytest.raises(InputError, match=rf"model/{name} is not what was written.*digests\.json"):
            read(model)
