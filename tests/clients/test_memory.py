"""Less memory: offloaded to disk, or computed again in the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.clients.models import GREEDY, model_of, tokens
from tests.dense.architectures import make_model
from tests.model.assembled import Groups, assemble, dense_model, random_groups

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


LOST = ("an expert", "a layer", "the core", "everything")
GATES = (
    [0, 1.0, 0, 0],
    torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0]]),
    torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(0)).round(),
)


def groups_without(base: Any, lost: str) -> Groups:
    """Random groups of four experts and the core (4), some without an entry."""
    groups = random_groups(base, 4, 0.6)
    for name, group in groups.items():
        if lost == "everything" or (lost == "a layer" and name.endswith("0.mlp.up_proj")):
            group[:] = 255
        elif lost == "the core":
            group[group == 4] = 255
        group[group == 1] = 255
    return groups


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lost", LOST)
def test_checkpointing_with_nothing_there(tmp_path: Path, lost: str, reentrant: bool) -> None:
    """The gradients of values and gates without checkpoints, also under autocast and with other value gates."""
    base = dense_model(make_model("qwen2", tmp_path))
    groups = groups_without(base, lost)
    torch.set_num_threads(1)
    ids, found = tokens(2), []
    for checkpointed in (False, True):
        model = assemble(base, groups, 4).train()
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        learned = torch.ones(2, 4, requires_grad=True)
        for gates in (*GATES, learned):
            model(ids, labels=ids, gates=gates).loss.backward()
        model(ids, labels=ids, gates=GATES[1], value_gates=[0, 1, 0, 1]).loss.backward()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, gates=GATES[1]).loss
        loss.backward()
        assert learned.grad is not None
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        found[-1]["gates"] = learned.grad
    assert found[0].keys() == found[1].keys()
    assert {f"base.{name}.values" for name in groups} <= found[0].keys()
    # A reentrant pass adds the gates' gradient up layer by layer
    torch.testing.assert_close(found[1].pop("gates"), found[0].pop("gates"), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("lost", LOST)
def test_every_path_with_nothing_there(tmp_path: Path, lost: str) -> None:
    """Saved and read again: dense, sparse and by the cost model, as with the weights left out."""
    base = dense_model(make_model("qwen2", tmp_path / "base"))
    groups = groups_without(base, lost)
    torch.set_num_threads(1)
    assemble(base, groups, 4).save_pretrained(tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    weights = {name: base.get_submodule(name).weight for name in groups}
    whole = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for on in ([1.0, 1, 1, 1], [0, 1.0, 0, 0]):
            chosen = torch.tensor([*on, 1, *[0] * 251])  # 255 is no group
            for name, group in groups.items():
                weights[name].copy_(whole[name] * chosen[torch.from_numpy(group).long()])
            wanted = base(tokens(2)).logits
            for path in ("dense", "sparse", "auto"):
                model.set_path(path)
                for gates in (on, [on, on], torch.tensor(on).expand(2, 9, 4)):
                    torch.testing.assert_close(
                        model(tokens(2), gates=gates).logits, wanted, rtol=1e-4, atol=1e-4
                    )
                mixed = model(tokens(2), gates=[on, [1.0, 0, 1, 0]]).logits
                torch.testing.assert_close(mixed[0], wanted[0], rtol=1e-4, atol=1e-4)
