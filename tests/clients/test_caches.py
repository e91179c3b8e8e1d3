"""Gates belong to a call's cache: sequences on one model do not see each other, whatever is done to their caches."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.clients.models import GREEDY, model_of, prompts_that_differ, router_of
from tinyonn.experts import TinyONNForCausalLM

STEPS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models") / "qwen2"


@pytest.fixture(params=[None, 2])
def model(folder: Path, request: pytest.FixtureRequest) -> TinyONNForCausalLM:
    """Routed; with and without new choices along the way."""
    torch.set_num_threads(1)
    return model_of(folder, router=True, reroute_every=request.param)


def step(model: Any, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """The next tokens and the cache."""
    with torch.no_grad():
        result = model(ids, past_key_values=cache, use_cache=True)
    return result.logits[:, -1:].argmax(-1), result.past_key_values


def along(model: Any, prompt: torch.Tensor, cache: Any = None) -> Iterator[torch.Tensor]:
    """Greedy decoding by hand, a step at a time; gives all tokens so far."""
    ids = fed = prompt
    while True:
        fed, cache = step(model, fed, cache)
        ids = torch.cat([ids, fed], 1)
        yield ids


def greedy(model: Any, prompt: torch.Tensor, count: int = STEPS, **options: Any) -> Any:
    ones = torch.ones_like(prompt)
    found: torch.Tensor = model.generate(
        prompt, attention_mask=ones, max_new_tokens=count, **GREEDY, **options
    )
    return found


@pytest.mark.parametrize("kind", [None, DynamicCache, StaticCache])
def test_interleaved(model: TinyONNForCausalLM, kind: Any) -> None:
    prompts = prompts_that_differ(model)
    wanted = [greedy(model, prompt) for prompt in prompts]
    config = model.config.base_config
    options = {"config": config, **({"max_cache_len": 32} if kind is StaticCache else {})}
    caches = [None if kind is None else kind(**options) for _ in prompts]
    runs = [along(model, prompt, cache) for prompt, cache in zip(prompts, caches, strict=True)]
    for _ in range(STEPS):
        last = [next(run) for run in runs]
    for found, one in zip(last, wanted, strict=True):
        assert torch.equal(found, one)


def test_a_generation_within_another(model: TinyONNForCausalLM) -> None:
    first, second, third = prompts_that_differ(model)
    wanted = [greedy(model, prompt) for prompt in (first, second, third)]
    inner = []

    def between(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inner.append(greedy(model, second))
        with torch.no_grad():
            model(third)
        return scores

    for options in ({}, {"use_cache": False}):
        assert torch.equal(greedy(model, first, logits_processor=[between], **options), wanted[0])
    assert all(torch.equal(found, wanted[1]) for found in inner)


def test_threads(model: TinyONNForCausalLM) -> None:
    prompts = prompts_that_differ(model) * 3
    wanted = [greedy(model, prompt) for prompt in prompts]
    wanted += [greedy(model, prompts[0], gates=gates) for gates in ([1.0, 0, 0, 0], [0, 0, 1.0, 0])]
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(greedy, model, prompt) for prompt in prompts]
        found += [
            pool.submit(greedy, model, prompts[0], gates=gates) for gates in ([1.0, 0, 0, 0], [0, 0, 1.0, 0])
        ]
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.result(), other)


def test_a_copy_goes_its_own_way(model: TinyONNForCausalLM) -> None:
    prompt = prompts_that_differ(model)[0]
    fed, cache = step(model, prompt, None)
    wanted = [next(along(model, fed, copy.deepcopy(cache))) for _ in range(2)]
    assert torch.equal(*wanted)
    other = pickle.loads(pickle.dumps(cache))
    assert type(other) is type(cache)
    assert isinstance(other, DynamicCache)
    for copied in (copy.deepcopy(cache), other):
        step(model, (fed + 1) % 256, copied)
        step(model, fed, copied)
    ids, rest = torch.cat([prompt, fed], 1), along(model, fed, cache)
    for _ in range(STEPS - 1):
        ids = next(rest)
    assert torch.equal(torch.cat([prompt, ids], 1), greedy(model, prompt))


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
)
def test_rows_move(model: TinyONNForCausalLM, change: Callable[[Any], None], rows: list[int]) -> None:
    """What is done to a cache's rows is done to their gates."""
    prompts = torch.cat(prompts_that_differ(model))
    fed, cache = step(model, prompts, None)
    change(cache)
    ids, run = prompts[rows], along(model, fed[rows], cache)
    for _ in range(4):
        ids = next(run)
    for row, number in enumerate(rows):
        assert torch.equal(ids[row], greedy(model, prompts[number : number + 1], 5)[0, prompts.shape[1] :])


def test_rejected_tokens(model: TinyONNForCausalLM) -> None:
    """A cropped cache goes on as if the tokens had never been there; below the prompt, it is another prompt."""
    prompt = prompts_that_differ(model)[0]
    wanted = greedy(model, prompt, 4)
    fed, cache = step(model, prompt, None)
    with torch.no_grad():
        model(torch.cat([fed, (fed + torch.arange(1, 4)) % 256], 1), past_key_values=cache)
    cache.crop(-3)
    fed = wanted[:, prompt.shape[1] + 1 : prompt.shape[1] + 2]
    for _ in range(2):
        fed, cache = step(model, fed, cache)
    assert torch.equal(fed, wanted[:, -1:])
    cache.crop(-6)
    kept = int(cache.get_seq_length())
    assert kept < prompt.shape[1]
    tail = (prompt[:, kept:] + 1) % 256
    with torch.no_grad():
        logits = model(tail, past_key_values=copy.deepcopy(cache)).logits
        gates = router_of(model)(torch.cat([prompt[:, :kept], tail], 1))
        assert torch.equal(model(tail, past_key_values=cache, gates=gates).logits, logits)


def test_speculation_is_greedy(model: TinyONNForCausalLM, folder: Path) -> None:
    """Candidates are no part of the prompt, and a choice among them is that of each one's own place."""
    draft = model_of(folder)
    for prompt in prompts_that_differ(model):
        prompt = torch.cat([prompt, prompt, prompt[:, :5]], 1)
        wanted = greedy(model, prompt, 12)
        assert torch.equal(greedy(model, prompt, 12, prompt_lookup_num_tokens=4), wanted)
        assert torch.equal(greedy(model, prompt, 12, assistant_model=draft), wanted)
        assert torch.equal(greedy(model, prompt, 12, assistant_model=copy.deepcopy(model)), wanted)


def test_however_a_prompt_is_read(model: TinyONNForCausalLM) -> None:
    for prompt in prompts_that_differ(model):
        wanted = greedy(model, prompt)
        assert torch.equal(greedy(model, prompt, use_cache=False), wanted)
        assert torch.equal(greedy(model, prompt, prefill_chunk_size=4), wanted)
        assert torch.equal(greedy(model, prompt, cache_implementation="static"), wanted)
        beams = greedy(model, prompt, num_beams=3)
        assert torch.equal(greedy(model, prompt, num_beams=3, prefill_chunk_size=4), beams)


def test_a_conversation_goes_on(model: TinyONNForCausalLM) -> None:
    """Given whole or the new tokens alone, the router reads all of it."""
    prompt, more, _ = prompts_that_differ(model)
    first = greedy(model, prompt, return_dict_in_generate=True)
    whole = torch.cat([first.sequences, more], 1)
    settings = {"max_new_tokens": STEPS, "attention_mask": torch.ones_like(whole), **GREEDY}
    cache = first.past_key_values
    wanted = model.generate(whole, past_key_values=copy.deepcopy(cache), **settings)
    new = whole[:, int(cache.get_seq_length()) :]
    found = model.generate(new, past_key_values=cache, **settings)
    assert torch.equal(found, wanted[:, -STEPS - new.shape[1] :])


def test_a_cache_of_another_model_is_refused(model: TinyONNForCausalLM) -> None:
    prompt = prompts_that_differ(model)[0]
    with torch.no_grad():
        cache = model.base(prompt, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="has to see the 9 tokens in the cache but saw none"):
            model(prompt[:, :1], past_key_values=cache)
        model(prompt[:, :1], past_key_values=cache, gates=[1.0, 0, 0, 0])
