"""Less memory: offloaded to disk, or computed again in the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.base.architectures import make_model
from tests.clients.models import GREEDY, model_of, tokens
from tests.experts.assembled import assemble, dense_model, random_groups

SPLIT = {
    "base.model.embed_tokens": "cpu",
    "base.model.layers.0": "disk",
    "base.model.layers.1": "cpu",
    "base.model.norm": "cpu",
    "base.model.rotary_emb": "cpu",
    "base.lm_head": "disk",
    "router": "disk",
}


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"device_map": {"": "disk"}}, {"device_map": SPLIT}, {"device_map": SPLIT, "offload_buffers": True}],
)
def test_offloaded_to_disk(tmp_path: Path, router: bool, options: dict[str, Any]) -> None:
    model = model_of(tmp_path / "base", router=router)
    model.save_pretrained(tmp_path / "sparse", max_shard_size="60KB")
    if not router and len(options["device_map"]) > 1:
        options = {**options, "device_map": {k: v for k, v in SPLIT.items() if k != "router"}}
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", offload_folder=tmp_path / "away", **options
    )
    assert any(parameter.is_meta for parameter in away.parameters())
    ids = tokens(2)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, **GREEDY}
    with torch.no_grad():
        assert torch.equal(away(ids).logits, model(ids).logits)
    assert torch.equal(away.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lost", ["an expert", "a layer", "everything"])
def test_checkpointing_with_nothing_there(tmp_path: Path, lost: str, reentrant: bool) -> None:
    """An expert, a layer or all of them without an entry: the same gradients as without checkpoints."""
    base = dense_model(make_model("qwen2", tmp_path))
    groups = random_groups(base, 4, 0.6)
    for name, group in groups.items():
        if lost == "everything" or (lost == "a layer" and name.endswith("0.mlp.up_proj")):
            group[:] = 255
        group[group == 1] = 255
    ids, found = tokens(2), []
    for checkpointed in (False, True):
        model = assemble(base, groups, 4).train()
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for gates in (None, [0, 1.0, 0, 0], torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0]])):
            model(ids, labels=ids, gates=gates).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
