"""A model with its router: saved, loaded, generating; each sequence gets the gates of its own tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.dense.conftest import ModelFactory
from tests.model.assembled import assemble, assembled, dense_model, random_groups, tokens
from tests.model.routers import FOUR, decide
from tinyonn.experts import TinyONNConfig, TinyONNForCausalLM
from tinyonn.model.configuration_tinyonn import GATE_RULE, ROUTER_RULE
from tinyonn.model.router_tinyonn import PromptRouter

SETTINGS: dict[str, Any] = {"do_sample": False, "pad_token_id": 256}


@pytest.fixture(scope="module")
def folder(model_of: ModelFactory) -> Path:
    return model_of("qwen2")


def routed(folder: Path, options: dict[str, Any] | None = None, **configuration: Any) -> TinyONNForCausalLM:
    _, model = assembled(folder, kept=0.6, **configuration)
    model.set_router({**FOUR, **(options or {})})
    decide(router_of(model))
    return model


@pytest.fixture
def model(folder: Path) -> TinyONNForCausalLM:
    return routed(folder)


def router_of(model: Any) -> PromptRouter:
    assert isinstance(model.router, PromptRouter)
    return model.router


def prompts_that_differ(model: TinyONNForCausalLM) -> list[torch.Tensor]:
    """Prompts of 4, 6 and 9 tokens, no two of which want the same experts."""
    found: dict[tuple[float, ...], torch.Tensor] = {}
    for seed in range(100):
        prompt = tokens(1, (4, 6, 9)[len(found)], seed)
        found.setdefault(tuple(router_of(model)(prompt)[0].tolist()), prompt)
        if len(found) == 3:
            return list(found.values())
    raise AssertionError("the router tells nothing apart")


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(prompt.shape[1] for prompt in prompts)
    ids, mask = torch.full((len(prompts), length), 256), torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - prompt.shape[1] :] = prompt[0]
        mask[row, length - prompt.shape[1] :] = 1
    return ids, mask


def by_hand(model: TinyONNForCausalLM, prompt: torch.Tensor, count: int, every: int | None) -> torch.Tensor:
    """Greedy decoding with gates given from outside, chosen anew where they should be."""
    ids, cache = prompt, None
    with torch.no_grad():
        for step in range(count):
            if step == 0 or (every is not None and step % every == 0):
                gates = router_of(model)(ids)
            given = ids if cache is None else ids[:, -1:]
            result = model(given, past_key_values=cache, use_cache=True, gates=gates)
            cache = result.past_key_values
            result.logits[..., 256] = -torch.inf
            ids = torch.cat([ids, result.logits[:, -1:].argmax(-1)], 1)
    return ids[:, prompt.shape[1] :]


# Files


def test_saved_and_loaded(model: TinyONNForCausalLM, tmp_path: Path) -> None:
    router = router_of(model)
    router.bias.copy_(torch.tensor([0.5, 0, -0.25, 0]))
    router.top_k = 1
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.router == router.options.tree()
    assert again.config.gate_rule == ROUTER_RULE
    wanted = router.state_dict()
    assert set(wanted) == set(router_of(again).state_dict())
    for name, tensor in router_of(again).state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    ids = tokens(4)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(again(ids).logits, logits)
        assert torch.equal(again(ids, gates=router(ids)).logits, logits)
        assert not torch.equal(again(ids, gates=torch.ones(4)).logits, logits)
    assert (tmp_path / "router_tinyonn.py").is_file()
    assert again.num_parameters() == model.num_parameters()


def test_stays_in_float32(folder: Path, tmp_path: Path) -> None:
    base = dense_model(folder, dtype=torch.bfloat16)
    model = assemble(base, random_groups(base, 4, 0.6), 4)
    model.set_router(FOUR)
    decide(router_of(model))
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    ids = tokens(8)
    for options in ({"dtype": "auto"}, {"dtype": torch.bfloat16}, {"device_map": {"": "cpu"}}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert again.dtype == torch.bfloat16
        assert {tensor.dtype for tensor in router_of(again).state_dict().values()} == {torch.float32}
        assert torch.equal(router_of(again)(ids), router_of(model)(ids))
    halved = router_of(again.to(torch.bfloat16))  # coarser, but it works
    assert torch.equal(halved(ids).sum(1), torch.full((8,), 2.0))


def test_a_folder_without_router(folder: Path, tmp_path: Path) -> None:
    """Loads without one, and with a new one if the configuration asks for it."""
    _, model = assembled(folder, kept=0.6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.router is None
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    asked = AutoModelForCausalLM.from_pretrained(tmp_path, router=FOUR)
    again.set_router(FOUR)
    for name, tensor in router_of(asked).state_dict().items():
        assert torch.equal(tensor, router_of(again).state_dict()[name]), name
    again.set_router(None)
    assert again.config.router is None
    assert again.config.gate_rule == GATE_RULE
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_half_a_router_is_refused(model: TinyONNForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["router.main.weight"]
    save_file(state, tmp_path / "model.safetensors", {"assembly": "test"})
    with pytest.raises(ValueError, match=r"1 tensors are in none of the shards, router\.main\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_without_weights(model: TinyONNForCausalLM, tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = TinyONNForCausalLM(copy.deepcopy(model.config))
    empty.save_shell(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"assembly": "test", "format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_a_copy_reads_its_own_embeddings(model: TinyONNForCausalLM) -> None:
    other = copy.deepcopy(model)
    before = router_of(model).logits(tokens())
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_(other.get_input_embeddings().weight.flip(0))
    assert torch.equal(router_of(model).logits(tokens()).sub_BE, before.sub_BE)
    assert not torch.allclose(router_of(other).logits(tokens()).sub_BE, before.sub_BE)
    model.resize_token_embeddings(300)
    assert torch.equal(router_of(model).logits(tokens()).sub_BE, before.sub_BE)
    with torch.no_grad():
        model(torch.full((1, 3), 299))


# Generation


@pytest.mark.parametrize("every", [None, 3])
def test_batches_are_as_if_alone(model: TinyONNForCausalLM, every: int | None) -> None:
    """Prompts of different lengths, each with its own experts, with padding between them."""
    model.config.reroute_every = every
    prompts = prompts_that_differ(model)
    ids, mask = left_padded(prompts)
    settings = {**SETTINGS, "max_new_tokens": 8, "min_new_tokens": 8}
    together = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert torch.equal(alone[0, prompt.shape[1] :], together[row])
        assert torch.equal(by_hand(model, prompt, 8, every)[0], together[row])


@pytest.mark.parametrize("every", [None, 2])
def test_beams_and_samples(model: TinyONNForCausalLM, every: int | None) -> None:
    model.config.reroute_every = every
    prompts = prompts_that_differ(model)[:2]
    ids, mask = left_padded(prompts)
    beams = model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=6, **SETTINGS)
    for row, prompt in enumerate(prompts):
        ones = torch.ones_like(prompt)
        alone = model.generate(prompt, attention_mask=ones, num_beams=3, max_new_tokens=6, **SETTINGS)
        length = alone.shape[1] - prompt.shape[1]
        assert torch.equal(beams[row, ids.shape[1] :][:length], alone[0, prompt.shape[1] :])
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=6, **SETTINGS)
    sampled = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, pad_token_id=256,
        do_sample=True, top_k=1, num_return_sequences=2,
    )  # fmt: skip
    assert torch.equal(sampled, greedy.repeat_interleave(2, 0))
    static = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, cache_implementation="static", **SETTINGS
    )
    assert torch.equal(static, greedy)


def test_gates_given_go_first(model: TinyONNForCausalLM) -> None:
    ids = tokens()
    gates = torch.tensor([1.0, 0, 0, 0])
    with torch.no_grad(), model.gates(gates):
        wanted = model(ids, gates=gates).logits
        assert torch.equal(model(ids).logits, wanted)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, wanted)


def test_more_experts_at_run_time(model: TinyONNForCausalLM) -> None:
    ids = tokens()
    with torch.no_grad():
        for top_k in (1, 3, None):
            router_of(model).top_k = top_k
            gates = router_of(model)(ids)
            assert torch.equal(gates.sum(1), torch.full((2,), float(top_k or 4)))
            assert torch.equal(model(ids).logits, model(ids, gates=gates).logits)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **SETTINGS)


def test_training_reaches_the_router(model: TinyONNForCausalLM) -> None:
    model.train()
    ids = tokens()
    router = router_of(model)
    choice = router.choose(router.logits(ids[:, :4]))
    model(ids, labels=ids, gates=choice.gates_BE).loss.backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


# Bad input


@pytest.mark.parametrize(
    ("router", "says"),
    [
        ({**FOUR, "branches": [[0, 1], [2]]}, "branches hold 3 experts but the model has 4"),
        ({**FOUR, "branches": [[0, 1], [1, 2, 3]]}, "expert 1 is there twice"),
        ({**FOUR, "top_k": 5}, "top_k = 5"),
        ({**FOUR, "depth": 2}, "router has 'depth'"),
        ({}, "no branches"),
    ],
)
def test_bad_router(folder: Path, router: dict[str, Any], says: str) -> None:
    _, model = assembled(folder, kept=0.6)
    with pytest.raises(ValueError, match=says):
        model.set_router(router)
    with pytest.raises(ValueError, match=says):
        TinyONNConfig.from_dict({**model.config.to_dict(), "router": router})
    assert model.router is None
