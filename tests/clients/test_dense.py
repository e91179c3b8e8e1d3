"""A dense export in transformers, accelerate and peft: a model of the base's class, and what the sparse one says."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.clients.models import GREEDY, dense_of, model_of, tokens
from tinyonn.experts import TinyONNForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[TinyONNForCausalLM, Any]:
    sparse = model_of(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "sparse")
    return sparse, dense_of(sparse, folder)


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, **GREEDY, **options}
    torch.manual_seed(0)
    return model.generate(ids, **settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 10},
        {"prompt_lookup_num_tokens": 4},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
    ],
)
def test_generates_the_same(models: tuple[TinyONNForCausalLM, Any], options: dict[str, Any]) -> None:
    sparse, dense = models
    ids = tokens(1)
    assert torch.equal(generate(dense, ids, **options), generate(sparse, ids, **options))


def test_assistant_and_threads(models: tuple[TinyONNForCausalLM, Any]) -> None:
    sparse, dense = models
    prompts = [tokens(1, seed=seed) for seed in range(4)]
    wanted = [generate(sparse, ids) for ids in prompts]
    assert torch.equal(generate(dense, prompts[0], assistant_model=sparse), wanted[0])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda ids: generate(dense, ids), prompts))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_pipeline(folder: Path, models: tuple[TinyONNForCausalLM, Any]) -> None:
    sparse, dense = models
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    chat = [{"role": "user", "content": "one two"}]
    said = [
        pipeline("text-generation", model, tokenizer=tokenizer)(chat, max_new_tokens=6, do_sample=False)
        for model in (dense, sparse)
    ]
    assert said[0][0]["generated_text"][:-1] == chat and said[0] == said[1]


def test_offloaded_to_disk(folder: Path, models: tuple[TinyONNForCausalLM, Any], tmp_path: Path) -> None:
    split = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    split |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    away = AutoModelForCausalLM.from_pretrained(folder / "dense", device_map=split, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in away.parameters())
    assert torch.equal(generate(away, tokens(2)), generate(models[1], tokens(2)))


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"target_modules": "all-linear", "r": 4}),
    "dora": ("LoraConfig", {"target_modules": ["q_proj"], "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj"], "feedforward_modules": []}),
    "loha": ("LoHaConfig", {"target_modules": ["q_proj"]}),
    "adalora": ("AdaLoraConfig", {"target_modules": ["q_proj"], "total_step": 10}),
    "oft": ("OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 16}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "p": ("PromptEncoderConfig", {"num_virtual_tokens": 4}),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_peft(folder: Path, models: tuple[TinyONNForCausalLM, Any], adapter: str) -> None:
    """Trained, and merged where there is something to merge."""
    pytest.importorskip("peft", reason="peft is not installed")
    peft: Any = importlib.import_module("peft")
    kind, options = ADAPTERS[adapter]
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    model = peft.get_peft_model(dense, getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, ids, losses = torch.optim.AdamW(trained, lr=0.02), tokens(3), []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if hasattr(model, "merge_and_unload"):
        model.eval()
        with torch.no_grad():
            wanted = model(input_ids=ids).logits
            torch.testing.assert_close(model.merge_and_unload()(ids).logits, wanted, rtol=1e-4, atol=1e-4)
