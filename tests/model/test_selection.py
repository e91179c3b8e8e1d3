"""From logits to gates: choices as a plain loop makes them, gates and their gradients, even loads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.dense.conftest import ModelFactory
from tests.model.assembled import dense_model
from tinyonn.model.router_tinyonn import PromptRouter, RouterLogits, limit_load, slopes

BRANCHES = [[4, 0, 2], [1], [3, 5]]


@pytest.fixture(scope="module")
def base(model_of: ModelFactory) -> Any:
    return dense_model(model_of("qwen2"))


def routed(base: Any, **options: Any) -> PromptRouter:
    return PromptRouter({"branches": BRANCHES, "width": 8, "top_k": 2, **options}, base)


def made(samples: int = 40, seed: int = 0) -> RouterLogits:
    random = torch.Generator().manual_seed(seed)
    return RouterLogits(torch.randn(samples, 3, generator=random), torch.randn(samples, 6, generator=random))


def best(scores_E: torch.Tensor, k: int, allowed: set[int]) -> set[int]:
    """The k best by a plain loop, of equal ones the lower number."""
    order = sorted(allowed, key=lambda expert: (-float(scores_E[expert]), expert))
    return set(order[:k])


def on(active_E: torch.Tensor) -> set[int]:
    return set(active_E.nonzero().flatten().tolist())


# Which


@pytest.mark.parametrize("k", [None, 0, 1, 3, 6, 50, "each"])
def test_the_best_are_chosen(base: Any, k: Any) -> None:
    router, logits = routed(base), made()
    router.bias.copy_(torch.tensor([0.0, 2, -2, 0.5, 0, 0]))
    noise_BE = torch.randn(40, 6, generator=torch.Generator().manual_seed(7))
    ks = torch.arange(40) % 7 if k == "each" else k
    choice = router.choose(logits, ks, noise_BE)
    scores_BE = router.log_probabilities(logits) + router.bias + noise_BE
    for sample in range(40):
        count = sample % 7 if k == "each" else 2 if k is None else k
        assert on(choice.active_BE[sample]) == best(scores_BE[sample], count, set(range(6)))
    assert torch.equal(choice.gates_BE.detach(), choice.active_BE.float())
    torch.testing.assert_close(choice.probabilities_BE.sum(1), torch.ones(40))


def test_shared_are_on_and_dropped_are_off(base: Any) -> None:
    router, logits = routed(base, shared=[1, 5]), made()
    dropped_E = torch.tensor([True, True, False, False, True, False])  # 1 is shared, so it stays
    choice = router.choose(logits, dropped=dropped_E)
    assert all(on(active_E) == {1, 2, 3, 5} for active_E in choice.active_BE)
    free = router.choose(logits)
    scores_BE = router.log_probabilities(logits)
    for sample in range(40):
        assert on(free.active_BE[sample]) == {1, 5} | best(scores_BE[sample], 2, {0, 2, 3, 4})
    everything = router.choose(logits, dropped=torch.ones(6, dtype=torch.bool))
    assert all(on(active_E) == {1, 5} for active_E in everything.active_BE)


def test_equal_scores_go_by_number(base: Any) -> None:
    router = PromptRouter({"branches": [[2, 3], [0, 1]], "width": 8, "top_k": 3}, base)
    logits = RouterLogits(torch.zeros(2, 2), torch.zeros(2, 4))
    assert router.choose(logits).active_BE.tolist() == [[True, True, True, False]] * 2


def test_bad_k(base: Any) -> None:
    router = routed(base)
    with pytest.raises(ValueError, match="k = -1"):
        router.choose(made(), -1)
    with pytest.raises(ValueError, match="k for 3 samples does not fit a batch of 40"):
        router.choose(made(), torch.ones(3, dtype=torch.long))


# How strongly


def test_every_logit_has_a_gradient(base: Any) -> None:
    """Chosen or not: gates are 0 and 1, and still say how they want to move."""
    router, logits = routed(base), made(5)
    sub_BE = logits.sub_BE.requires_grad_()
    main_BN = logits.main_BN.requires_grad_()
    for expert in range(6):
        gates_BE = router.choose(RouterLogits(main_BN, sub_BE)).gates_BE
        own, branch = torch.autograd.grad(gates_BE[:, expert].sum(), [sub_BE, main_BN])
        assert bool((branch[:, router.options.branch_of()[expert]] > 0).all())
        alone = expert == 1  # the only one of its branch: nothing to compete with
        assert alone or bool((own[:, expert] > 0).all())


def test_slopes_are_steepest_at_the_edge() -> None:
    log_p_BE = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.04, 0.01]]).log().requires_grad_()
    scores_BE = log_p_BE.detach().clone()
    scores_BE[0, 5] = -torch.inf
    q_BE = slopes(scores_BE, log_p_BE, torch.tensor([2]))
    edge = (math.log(0.2) + math.log(0.15)) / 2
    torch.testing.assert_close(q_BE[0, :5], torch.sigmoid(log_p_BE[0, :5] - edge))
    assert float(q_BE[0, 5].detach()) == 0
    (slope_E,) = torch.autograd.grad(q_BE.sum(), log_p_BE)[0]
    assert float(slope_E.max()) <= 0.25
    assert set(slope_E.argsort(descending=True)[:2].tolist()) == {1, 2}
    assert float(slope_E[5]) == 0
    for k in (0, 5, 6):  # nothing is inside, or nothing outside
        q_BE = slopes(scores_BE, log_p_BE, torch.tensor([k]))
        assert bool(q_BE.isfinite().all())


# Even loads


def test_bias_evens_the_load_and_leaves_gates_alone(base: Any) -> None:
    router = routed(base, shared=[1])
    random = torch.Generator().manual_seed(0)
    preference_E = torch.tensor([3.0, 0, 0, -2, 0, 1])
    loads = []
    for _ in range(400):
        sub_BE = torch.randn(64, 6, generator=random) + preference_E
        choice = router.choose(RouterLogits(torch.randn(64, 3, generator=random), sub_BE))
        load_E = choice.active_BE.sum(0)
        loads.append(load_E[[0, 2, 3, 4, 5]].double())
        router.update_bias(load_E, 0.02)
        assert set(choice.gates_BE.detach().unique().tolist()) <= {0.0, 1.0}

    def uneven(part: list[torch.Tensor]) -> float:
        mean = torch.stack(part).mean(0)
        return float(mean.std() / mean.mean())

    assert uneven(loads[:20]) > 0.4
    assert uneven(loads[-100:]) < 0.1
    assert float(router.bias[1]) == 0


def test_a_step_of_bias(base: Any) -> None:
    router = routed(base)
    router.update_bias(torch.tensor([5, 1, 3, 3, 0, 6]), 0.5)
    assert router.bias.tolist() == [-0.5, 0.5, 0, 0, 0.5, -0.5]


@pytest.mark.parametrize("factor", [1.0, 1.25, 2.0])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_no_expert_takes_more_than_its_share(factor: float, k: int) -> None:
    random = torch.Generator().manual_seed(0)
    scores_BE = torch.randn(48, 8, generator=random) + torch.arange(8) * 0.7
    scores_BE[:, 3] = -torch.inf
    active_BE = limit_load(scores_BE, k, factor)
    room = math.ceil(factor * 48 * k / 7)
    load_E = active_BE.sum(0)
    assert int(load_E.max()) <= room
    assert int(load_E[3]) == 0
    for sample, expert in (~active_BE & (scores_BE > -torch.inf)).nonzero().tolist():
        weakest = scores_BE[sample][active_BE[sample]]
        better = len(weakest) < k or bool((weakest < scores_BE[sample, expert]).any())
        if better:  # then the expert is full, of samples that it rates higher
            assert int(load_E[expert]) == room
            assert bool((scores_BE[active_BE[:, expert], expert] > scores_BE[sample, expert]).all())
    order = torch.randperm(48, generator=random)
    assert torch.equal(limit_load(scores_BE[order], k, factor), active_BE[order])


def test_load_of_a_batch_is_limited_when_asked(base: Any) -> None:
    router = routed(base)
    router.bias[0] = 10
    logits = made(60)
    assert int(router.choose(logits).active_BE.sum(0).max()) == 60
    ks = torch.arange(60) % 3
    for k, total in ((2, 120), (ks, 60)):
        active_BE = router.choose(logits, k, capacity=1.5).active_BE
        assert int(active_BE.sum(0).max()) == math.ceil(1.5 * total / 6)
        assert int(active_BE.sum()) == total
    with pytest.raises(ValueError, match=r"load of 0\.5 times"):
        limit_load(torch.zeros(2, 2), 1, 0.5)
