"""Held-out loss counts the same tokens, behind the prompts, for models of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.dense.architectures import make_model
from tests.model.assembled import assembled, dense_model
from tests.train.trained import make_corpus, make_models
from tinyonn.corpus.file import Sample
from tinyonn.dense.passes import decoder_states
from tinyonn.errors import InputError
from tinyonn.evaluate.loss import evaluate_routed
from tinyonn.train.data import held_out_batches

PROMPT = 4


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    corpus = make_corpus(tmp_path / "corpus.arrow")
    return corpus.range("code", 0, 9) + corpus.range("prose", 0, 7)


@torch.no_grad()
def one_by_one(model: Any, samples: list[Sample], **options: Any) -> dict[str, float]:
    """Sample by sample, with the gates that the model chooses for the prompt alone."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids.astype("int64"))[None]
        prompt = 5 if sample.labels[0] == -100 else min(PROMPT, ids.shape[1] // 2)
        if getattr(model, "router", None) is not None:
            options["gates"] = model.router(ids[:, :prompt])
        logits = model(input_ids=ids, **options).logits[0, prompt - 1 : -1]
        losses = cross_entropy(logits.double(), ids[0, prompt:], reduction="none")
        found.setdefault(sample.slice, []).extend(losses.tolist())
    return {name: sum(losses) / len(losses) for name, losses in found.items()}


def test_a_routed_model_is_measured_as_it_would_run(tmp_path: Path, samples: list[Sample]) -> None:
    _, model = make_models(tmp_path / "model")
    router: Any = model.router
    with torch.no_grad():
        router.sub.weight.mul_(200)  # choices that differ
    found = evaluate_routed(model, held_out_batches(samples, tokens=64, prompt_tokens=PROMPT))
    assert found.by_slice == pytest.approx(one_by_one(model, samples), rel=1e-5)
    assert sum(found.tokens.values()) == sum(
        s.input_ids.size - (5 if s.labels[0] == -100 else min(PROMPT, s.input_ids.size // 2)) for s in samples
    )
    router.top_k = 1
    fewer = evaluate_routed(model, held_out_batches(samples, tokens=64, prompt_tokens=PROMPT))
    assert fewer.by_slice == pytest.approx(one_by_one(model, samples), rel=1e-5)
    router.top_k = 5
    assert evaluate_routed(model, held_out_batches(samples, tokens=64, prompt_tokens=PROMPT), 1) == fewer


def test_hidden_states_do_not_cost_a_copy_of_the_head_for_every_sample(
    tmp_path: Path, samples: list[Sample]
) -> None:
    """As Torch makes them where the one token's states, for which there are logits, do not lie together."""
    batch = held_out_batches(samples, tokens=64, prompt_tokens=PROMPT)[0]
    assert len(batch) > 1
    for model in make_models(tmp_path / "model"):
        met: list[torch.Tensor] = []
        head: Any = model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, args, met=met: met.append(args[0]))
        with torch.no_grad():
            (hidden,) = decoder_states(model, batch.ids_BT, layers=False)
        hook.remove()
        assert [states.shape[:2] for states in met] == [(len(batch), 1)]
        assert met[0].is_contiguous()
        torch.testing.assert_close(met[0][:, 0], hidden[:, 0])


def test_gates_may_be_given_for_every_slice(tmp_path: Path, samples: list[Sample]) -> None:
    _, model = make_models(tmp_path / "model")
    names = sorted({sample.slice for sample in samples})
    experts = int(model.config.experts)
    gates = {name: (torch.arange(experts) % 2 == number % 2).float() for number, name in enumerate(names)}
    batches = held_out_batches(samples, tokens=64, prompt_tokens=PROMPT)
    found = evaluate_routed(model, batches, slice_gates=gates)
    model.router = None
    for name in names:
        own = [sample for sample in samples if sample.slice == name]
        wanted = one_by_one(model, own, gates=gates[name][None])
        assert found.by_slice[name] == pytest.approx(wanted[name], rel=1e-5)


def test_all_experts_of_a_whole_model_have_the_dense_loss_on_the_same_tokens(
    tmp_path: Path, samples: list[Sample]
) -> None:
    base, model = assembled(make_model("qwen2", tmp_path / "model"), 6)
    model.set_router({"branches": [[0, 1, 2], [3, 4, 5]], "width": 16, "top_k": 2})
    batches = held_out_batches(samples, tokens=64, prompt_tokens=PROMPT)
    dense = evaluate_routed(base, batches)
    assert dense.by_slice == pytest.approx(one_by_one(base, samples), rel=1e-5)
    assert evaluate_routed(model, batches, "all").by_slice == pytest.approx(dense.by_slice, rel=1e-5)
    assert evaluate_routed(model, batches).mean != pytest.approx(dense.mean, rel=1e-3)


def test_a_model_without_a_router_takes_experts_by_their_prior(tmp_path: Path, samples: list[Sample]) -> None:
    _, model = make_models(
        tmp_path / "model", router=False, expert_prior=[0.1, 0.9, 0.2, 0.0, 0.8, 0.3], experts_top_k=3
    )
    batches = held_out_batches(samples, tokens=64, prompt_tokens=PROMPT)
    gates = torch.tensor([0.0, 1, 0, 0, 1, 0])
    assert evaluate_routed(model, batches, 2).by_slice == pytest.approx(
        one_by_one(model, samples, gates=gates), rel=1e-5
    )
    assert evaluate_routed(model, batches).by_slice == evaluate_routed(model, batches, 3).by_slice


def test_a_model_in_training_runs_with_its_masters(tmp_path: Path, samples: list[Sample]) -> None:
    _, model = make_models(tmp_path / "model")
    batches = held_out_batches(samples, tokens=64, prompt_tokens=PROMPT)
    whole = evaluate_routed(model, batches, "all")
    model.bfloat16()
    for layer in model.sparse_layers.values():
        layer.values.data = layer.values.data.float()
    assert evaluate_routed(model, batches, "all").by_slice == pytest.approx(whole.by_slice, rel=2e-2)


def test_experts_that_are_not_there_are_refused(tmp_path: Path, samples: list[Sample]) -> None:
    _, model = make_models(tmp_path / "model")
    batches = held_out_batches(samples, tokens=64, prompt_tokens=PROMPT)
    with pytest.raises(InputError, match="from 0 to 6"):
        evaluate_routed(model, batches, 7)
    with pytest.raises(InputError, match="has no experts"):
        evaluate_routed(dense_model(tmp_path / "model"), batches, 2)
