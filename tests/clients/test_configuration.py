"""The configuration says in other programs' words what they ask for, and uses none of their words otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.clients.models import GREEDY, model_of, tokens
from tinyonn.experts import TinyONNForCausalLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyONNForCausalLM:
    return model_of(tmp_path_factory.mktemp("models") / "qwen2")


def test_no_word_of_a_sampler(model: TinyONNForCausalLM) -> None:
    settings = set(GenerationConfig._get_default_generation_params()) - {"use_cache"}
    assert not settings & set(model.config.to_dict())
    assert not [name for name in settings if getattr(model.config, name, None) is not None]


def test_fewer_experts_and_then_generate(model: TinyONNForCausalLM, tmp_path: Path) -> None:
    model.config.experts_top_k = 2
    assert len(model.config.chosen_experts) == 2
    ids = model.generate(tokens(), max_new_tokens=3, top_k=5, **{**GREEDY, "do_sample": True})
    assert ids.shape == (1, 12)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.experts_top_k == 2
    assert again.config.chosen_experts == model.config.chosen_experts


def test_folders_of_before(model: TinyONNForCausalLM, tmp_path: Path) -> None:
    model.config.experts_top_k = None
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text("utf-8"))
    del tree["experts_top_k"], tree["digests"]  # which they had not
    path.write_text(json.dumps({**tree, "top_k": 3}), "utf-8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.experts_top_k == 3
    assert "top_k" not in again.config.to_dict()
    again.generate(tokens(), max_new_tokens=1, **GREEDY)
