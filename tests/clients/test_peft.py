"""Adapters of peft on an assembled model: trained, saved, switched off, and never merged into what was cut away."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.clients.models import GREEDY, model_of, router_of, tokens
from tinyonn.experts import TinyONNForCausalLM
from tinyonn.experts.export import export_model

pytest.importorskip("peft", reason="peft is not installed")
LORA = ("LoraConfig", {"target_modules": "all-linear", "r": 4})
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": LORA,
    "ia3": (
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "loha": ("LoHaConfig", {"target_modules": ["q_proj"]}),
    "adalora": ("AdaLoraConfig", {"target_modules": ["q_proj"], "total_step": 10}),
    "oft": ("OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 16}),
}
PROMPTS = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "p": ("PromptEncoderConfig", {"num_virtual_tokens": 4}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("models")


def peft() -> Any:
    return importlib.import_module("peft")


def adapted(model: TinyONNForCausalLM, kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return peft().get_peft_model(model, getattr(peft(), kind)(task_type="CAUSAL_LM", **options))


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(3), **options).logits  # type: ignore[no-any-return]


def train(model: Any, steps: int = 12) -> list[float]:
    ids, losses = tokens(3), []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize(("name", "router"), [("qwen2", False), ("qwen2", True), ("gpt2", False)])
def test_lora(folder: Path, name: str, router: bool, tmp_path: Path) -> None:
    model = model_of(folder / name, name, router)
    wanted = logits(model)
    values = {name: layer.values.clone() for name, layer in model.sparse_layers.items()}
    lora = adapted(model, *LORA)
    held = {module for module, _ in lora.named_modules() if module.endswith("lora_A")}
    assert len(held) >= len(values)
    assert torch.equal(logits(lora), wanted)
    losses = train(lora)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(layer.values, values[name]) for name, layer in model.sparse_layers.items())
    learned = logits(lora)
    assert not torch.allclose(learned, wanted, atol=1e-2)
    with lora.disable_adapter():
        assert torch.equal(logits(lora), wanted)
    lora.save_pretrained(tmp_path)
    again = peft().PeftModel.from_pretrained(model_of(folder / name, name, router), tmp_path)
    assert torch.equal(logits(again), learned)
    ids = tokens(2)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, **GREEDY}
    assert torch.equal(again.generate(input_ids=ids, **settings), lora.generate(input_ids=ids, **settings))


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_begins_as_the_model(folder: Path, adapter: str, router: bool) -> None:
    model = model_of(folder / "qwen2", router=router)
    wanted = logits(model)
    found = adapted(model, *ADAPTERS[adapter])
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-4)
    losses = train(found, 6)
    assert losses[-1] < losses[0]


def test_dora_wants_all_experts_on(folder: Path) -> None:
    options = {"target_modules": ["q_proj", "up_proj"], "use_dora": True}
    model = model_of(folder / "qwen2")
    wanted = logits(model)
    found = adapted(model, "LoraConfig", options)
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-4)
    losses = train(found)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="there is no one weight"):
        logits(found, gates=[1.0, 0, 0, 1])


@pytest.mark.parametrize("adapter", PROMPTS)
def test_virtual_tokens(folder: Path, adapter: str) -> None:
    """Of an own kind before the prompt; a router reads those that are embeddings."""
    found = adapted(model_of(folder / "qwen2"), *PROMPTS[adapter])
    losses = train(found)
    assert losses[-1] < losses[0]
    for router in (False, True):
        found = adapted(model_of(folder / "qwen2", router=router), *PROMPTS[adapter]).eval()
        ids = tokens(1)
        settings = {"attention_mask": torch.ones_like(ids), **GREEDY}
        out = found.generate(input_ids=ids, max_new_tokens=6, **settings)
        given: dict[str, Any] = {}
        if router and adapter == "prefix":
            with pytest.raises(ValueError, match="has to see the 4 tokens"):
                found(input_ids=ids)
            given = {"gates": router_of(found.base_model)(ids)}
        with torch.no_grad():
            first = found(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[:, -1].argmax()
        assert int(first) == int(out[0, ids.shape[1]])
        slow = found.generate(input_ids=ids, max_new_tokens=6, use_cache=True, num_beams=1, **settings)
        assert torch.equal(out, slow)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_merging_is_refused(folder: Path, adapter: str, safe: bool) -> None:
    model = model_of(folder / "qwen2")
    found = adapted(model, *ADAPTERS[adapter])
    train(found, 3)
    wanted = logits(found)
    with pytest.raises(ValueError, match=r"holds its weight compressed.*export --format dense"):
        found.merge_adapter(safe_merge=safe)
    assert torch.equal(logits(found), wanted)
    with pytest.raises(ValueError, match="holds its weight compressed"):
        adapted(
            model_of(folder / "qwen2"),
            "LoraConfig",
            {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        )


def test_merged_into_a_dense_export(folder: Path, tmp_path: Path) -> None:
    """The way that the refusal names."""
    model = model_of(folder / "qwen2")
    model.save_pretrained(tmp_path / "sparse")
    found = adapted(model, "LoraConfig", {"target_modules": ["q_proj", "down_proj"]})
    train(found, 5)
    wanted = logits(found)
    found.save_pretrained(tmp_path / "adapter")
    export_model(tmp_path / "sparse", tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    names = {r"^base\.": ""}  # the sparse model holds the base within itself
    merged = (
        peft().PeftModel.from_pretrained(dense, tmp_path / "adapter", key_mapping=names).merge_and_unload()
    )
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
