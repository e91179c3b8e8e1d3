"""Settings of a model's text part, and the names under which checkpoints store tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests.dense.architectures import make_model
from tests.dense.conftest import ModelFactory
from tests.record.runs import config_of
from tinyonn.config import ModelConfig
from tinyonn.corpus.corpus import max_tokens, prepare_corpus
from tinyonn.dense.load import load_model, load_shape, load_tokenizer
from tinyonn.dense.settings import base_settings, context_length, text_settings, vocabulary_size
from tinyonn.dense.weights import BaseWeights
from tinyonn.errors import InputError

VISION = ["gemma3_vision", "mistral3_vision"]


def plain(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), quantization="none", dtype="float32", device="cpu")


def edit_text(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    tree = json.loads(path.read_text("utf-8"))
    for key, value in changes.items():
        tree["text_config"].pop(key, None)
        if value is not None:
            tree["text_config"][key] = value
    path.write_text(json.dumps(tree), "utf-8")


@pytest.mark.parametrize("name", VISION)
def test_the_text_part_computes_what_the_whole_model_does_on_a_text(
    name: str, model_of: ModelFactory
) -> None:
    folder, ids = model_of(name), torch.arange(40, 60)[None]
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    text = load_model(plain(folder)).model
    assert "vision" not in str([name for name, _ in text.named_parameters()])
    with torch.no_grad():
        assert torch.equal(text(input_ids=ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_the_checkpoint_says_whether_the_head_is_the_embedding(tied: bool, tmp_path: Path) -> None:
    folder = make_model("mistral3_vision", tmp_path)
    edit_text(folder, tie_word_embeddings=not tied)  # the text part's own word is often wrong
    if tied:
        weights = load_file(folder / "model.safetensors")
        save_file({k: v for k, v in weights.items() if "lm_head" not in k}, folder / "model.safetensors")
    assert text_settings(folder)[0].tie_word_embeddings is tied
    names = [name for name, _ in load_model(plain(folder)).model.named_parameters()]
    assert ("lm_head.weight" in names) is not tied


def test_context_and_vocabulary_are_the_text_parts(tmp_path: Path) -> None:
    folder = make_model("gemma3_vision", tmp_path / "model")
    assert (context_length(folder), vocabulary_size(folder)) == (128, 264)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "A text for a model that sees."}\n' * 4, "utf-8")
    config = config_of(folder, rows)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"slice": None, "max_tokens": 129})}
    )
    with pytest.raises(InputError, match=r"129 is beyond the context .* 128 tokens"):
        max_tokens(config)
    edit_text(folder, vocab_size=40, max_position_embeddings=None)
    assert context_length(folder) == 131072  # the default of its class, which is what the library builds
    with pytest.raises(InputError, match="its vocabulary ends at 39"):
        prepare_corpus(config, load_tokenizer(config.model), tmp_path / "corpus.arrow")


def test_what_is_assembled_has_the_text_parts_settings(model_of: ModelFactory) -> None:
    assert base_settings(model_of("gemma3_vision"))["model_type"] == "gemma3_text"
    assert base_settings(model_of("qwen2"))["model_type"] == "qwen2"


@pytest.mark.parametrize(
    "name", ["gpt_neox", "gemma3_vision", "mistral3_vision", "qwen2_tied", "gpt2", "opt"]
)
def test_every_tensor_is_found_under_the_name_that_the_library_reads(
    name: str, model_of: ModelFactory
) -> None:
    config = plain(model_of(name))
    loaded, weights = dict(load_model(config).model.named_parameters()), BaseWeights(config)
    weights.check(loaded)
    for key, tensor in loaded.items():
        assert torch.equal(weights.tensor(key), tensor), key


def test_a_tensor_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    folder = make_model("gpt_neox", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["embed_out.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    names = [name for name, _ in load_shape(plain(folder)).named_parameters()]
    with pytest.raises(InputError, match=r"no tensor lm_head\.weight"):
        BaseWeights(plain(folder)).check(names)
