"""The router by itself: causal, blind to padding, probabilities that add up, learns what it is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dense.conftest import ModelFactory
from tests.model.assembled import dense_model
from tests.model.routers import decide
from tinyonn.model.configuration_tinyonn import RouterOptions
from tinyonn.model.router_tinyonn import PromptRouter, RouterLogits

BRANCHES = [[4, 0, 2], [1], [3, 5]]
TREE: dict[str, Any] = {"branches": BRANCHES, "width": 16, "top_k": 2}


@pytest.fixture(scope="module")
def base(model_of: ModelFactory) -> Any:
    return dense_model(model_of("qwen2"))


@pytest.fixture
def router(base: Any) -> PromptRouter:
    return decide(PromptRouter(TREE, base))


def tokens(batch: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def made(samples: int = 40, seed: int = 0) -> RouterLogits:
    generator = torch.Generator().manual_seed(seed)
    return RouterLogits(
        torch.randn(samples, 3, generator=generator), torch.randn(samples, 6, generator=generator)
    )


def same(one: RouterLogits, other: RouterLogits) -> None:
    torch.testing.assert_close(one.main_BN, other.main_BN, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.sub_BE, other.sub_BE, rtol=1e-5, atol=1e-5)


# From tokens to logits


def test_a_state_knows_nothing_of_what_follows(router: PromptRouter) -> None:
    ids, other = tokens(), tokens(seed=1)
    for length in range(1, 9):
        mixed = torch.cat([ids[:, :length], other[:, length:]], 1)
        whole, changed = router.states(ids), router.states(mixed)
        torch.testing.assert_close(changed[:, :length], whole[:, :length], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(changed[:, length:], whole[:, length:], atol=1e-2)
        same(router.logits(ids[:, :length]), router._heads(whole[:, length - 1]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(router: PromptRouter, side: str) -> None:
    short, pad = tokens(2, 4), torch.full((2, 5), 256)
    ones, none = torch.ones(2, 4, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    left = side == "left"
    ids = torch.cat([pad, short] if left else [short, pad], 1)
    mask = torch.cat([none, ones] if left else [ones, none], 1)
    same(router.logits(ids, mask), router.logits(short))
    same(router.logits(ids, mask.bool()), router.logits(short))
    alone = router.states(short)
    found = router.states(ids, mask)[:, 5:] if left else router.states(ids, mask)[:, :4]
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_an_empty_prompt_chooses_like_any_other(router: PromptRouter) -> None:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1] = 0
    gates = router(ids, mask)
    assert torch.equal(gates.sum(1), torch.full((3,), 2.0))
    assert torch.equal(gates[1], router(ids[:1, :0])[0])
    assert torch.equal(gates[0], router(ids[:1])[0])
    assert router(ids[:0]).shape == (0, 6)


def test_an_empty_prompt_does_not_drown_the_others(base: Any) -> None:
    router = PromptRouter(TREE, base)
    sizes = []
    for shown in (0, 9):
        router.zero_grad()
        logits = router.logits(tokens(), torch.arange(9).expand(3, 9) < shown)
        logits.sub_BE.sum().backward()
        sizes.append(float(sum(p.grad.norm() for p in router.parameters() if p.grad is not None)))
    assert sizes[0] < 10 * sizes[1]


def test_long_prompts_are_read_in_parts(router: PromptRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = router.logits(tokens())
    monkeypatch.setattr("tinyonn.model.router_tinyonn.CHUNK", 2)
    same(router.logits(tokens()), wanted)


def test_scale_of_embeddings_does_not_matter(router: PromptRouter, base: Any) -> None:
    wanted = router.logits(tokens())
    embedding = base.get_input_embeddings().weight
    embedding.data.mul_(1e-3)
    same(router.logits(tokens()), wanted)
    embedding.data.mul_(1e3)


def test_embeddings_are_the_base_s(router: PromptRouter, base: Any) -> None:
    embedding = base.get_input_embeddings().weight
    assert not any(parameter is embedding for parameter in router.parameters())
    logits = router.logits(tokens())
    (logits.main_BN.square().sum() + logits.sub_BE.square().sum()).backward()
    assert embedding.grad is None
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_low_precision_around_it_changes_nothing(router: PromptRouter) -> None:
    wanted = router.logits(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        found = router.logits(tokens())
    assert found.sub_BE.dtype == torch.float32
    assert torch.equal(found.sub_BE, wanted.sub_BE)


def test_seeds(base: Any) -> None:
    one, same_seed, other = (PromptRouter(TREE, base) for _ in range(3))
    other.reset_parameters(1)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same_seed.state_dict()[name]), name
    assert not torch.equal(one.sub.weight, other.sub.weight)


# Probabilities


def test_probabilities_are_products(router: PromptRouter) -> None:
    logits = made()
    p_BE = router.log_probabilities(logits).exp()
    for number, branch in enumerate(BRANCHES):
        wanted = logits.main_BN.softmax(1)[:, [number]] * logits.sub_BE[:, branch].softmax(1)
        torch.testing.assert_close(p_BE[:, branch], wanted)
    torch.testing.assert_close(p_BE.sum(1), torch.ones(40))
    extreme = RouterLogits(logits.main_BN * 1e4, logits.sub_BE * 1e4)
    assert bool(router.log_probabilities(extreme).isfinite().all())


# Learning


def test_learns_which_tokens_want_which_experts(base: Any) -> None:
    """Prompts of low and of high tokens, each with experts of its own, told by probabilities alone."""
    router = PromptRouter(TREE, base)
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-2)
    target_KE = torch.tensor([[0.5, 0, 0, 0.5, 0, 0], [0, 0.4, 0.6, 0, 0, 0]])
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        kind_B = torch.randint(0, 2, (16,), generator=generator)
        return torch.randint(0, 128, (16, 8), generator=generator) + 128 * kind_B[:, None], kind_B

    for _ in range(60):
        ids, kind_B = batch()
        loss = -(target_KE[kind_B] * router.log_probabilities(router.logits(ids))).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, kind_B = batch()
    assert torch.equal(router(ids), (target_KE[kind_B] > 0).float())


def test_a_reward_of_gates_moves_the_choice(base: Any) -> None:
    """Straight through: an expert that is off comes on because its gate's gradient says so."""
    router = PromptRouter(TREE, base)
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-2)
    worth_E = torch.zeros(6)
    before = router(tokens())
    worth_E[before.sum(0).argsort()[:2]] = 1.0
    assert float((before * worth_E).sum(1).mean()) < 1
    for step in range(40):
        ids = tokens(8, seed=step)
        choice = router.choose(router.logits(ids))
        optimizer.zero_grad()
        (-(choice.gates_BE * worth_E).sum(1).mean()).backward()
        optimizer.step()
    assert torch.equal(router(tokens()), worth_E.expand(3, 6))


# Options


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"branches": [[0, 1], [1, 2]]}, "expert 1 is there twice"),
        ({"branches": [[0, 1], [3]]}, "expert 2 is in none"),
        ({"branches": [[0, 1], []]}, "empty branch"),
        ({"branches": []}, "empty branch"),
        ({"branches": 3}, "wrong kind"),
        ({"top_k": 7}, r"top_k = 7; give from 0 to 6"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 2.5}, "top_k = 2.5; give a whole number"),
        ({"top_k": 5, "shared": [0, 1]}, "top_k = 5; give from 0 to 4"),
        ({"threshold": 0.5}, r"threshold = 0\.5 was removed: router\.top_k says"),
        ({"gate": "probability"}, "gate = 'probability' was removed: a chosen expert"),
        ({"shared": [6]}, "shared = "),
        ({"shared": [1, 1]}, "at most once"),
        ({"width": 0}, "width = 0"),
        ({"prompt_tokens": 0}, "prompt_tokens = 0"),
        ({"experts": 6}, "router has 'experts'; it knows branches"),
    ],
)
def test_bad_options(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RouterOptions.read({**TREE, **change})


def test_options_are_plain_and_may_change(router: PromptRouter) -> None:
    options = RouterOptions.read({**TREE, "shared": [1]})
    assert RouterOptions.read(options.tree()) == options
    assert list(options.branch_of()) == [0, 1, 0, 2, 0, 2]
    assert (
        RouterOptions.read({**options.tree(), "threshold": None, "max_k": 4, "gate": "one"}) == options
    )  # of an older model
    with pytest.raises(ValueError, match="no branches"):
        RouterOptions.read({})
    router.top_k = 4
    assert torch.equal(router(tokens()).sum(1), torch.full((3,), 4.0))
    router.top_k = None
    assert bool(router(tokens()).all())
    with pytest.raises(ValueError, match="top_k = 9"):
        router.top_k = 9
