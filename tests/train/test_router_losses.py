"""The router's losses: known values, and gradients against finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.train.differences import agrees_with_differences
from tinyonn.train import losses

B, E = 6, 10
generator = torch.Generator()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Each test draws the same, whichever ran before."""
    generator.manual_seed(5)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def probabilities() -> torch.Tensor:
    return (2 * random(B, E)).softmax(1)


def test_balance() -> None:
    p_BE = probabilities()
    even, all_on_one = torch.full((E,), 1 / E), torch.eye(E)[3]
    assert float(losses.balance(p_BE, even).mean) == pytest.approx(1)
    assert float(losses.balance(torch.eye(E)[[3] * B], all_on_one).mean) == pytest.approx(E)
    share = losses.shares(torch.tensor([4.0] + [1.0] * (E - 1)))
    assert float(share.sum()) == pytest.approx(1)
    torch.testing.assert_close(losses.balance(p_BE, share).mean, E * (share * p_BE.mean(0)).sum())
    agrees_with_differences(lambda p: losses.balance(p, share), p_BE)
    torch.testing.assert_close(losses.shares(torch.zeros(4)), torch.full((4,), 0.25).double())


def test_z_loss() -> None:
    logits = random(B, E)
    branches = [[0, 5, 2], [1, 3], [4, 6, 7, 8, 9], []]
    torch.testing.assert_close(losses.z_loss(logits).mean, logits.logsumexp(1).square().mean())
    apart = [logits[:, branch].logsumexp(1).square().mean() for branch in branches[:3]]
    torch.testing.assert_close(losses.z_loss(logits, branches).mean, torch.stack(apart).mean())
    agrees_with_differences(lambda x: losses.z_loss(x), logits)
    agrees_with_differences(lambda x: losses.z_loss(x, branches), logits)


def test_profile_targets() -> None:
    contribution = random(B, E).abs()
    even = losses.profile_targets(contribution, 0)
    torch.testing.assert_close(even, torch.full((B, E), 1 / E))
    plain = losses.profile_targets(contribution)
    torch.testing.assert_close(
        plain.double(), contribution / contribution.sum(1, keepdim=True), rtol=1e-6, atol=0
    )
    sharp = losses.profile_targets(contribution, 3.0)
    torch.testing.assert_close(sharp, functional.normalize(plain**3, 1, 1))
    assert bool((sharp.max(1).values > plain.max(1).values).all())
    relative = losses.profile_targets(contribution * torch.arange(E), 1.0, torch.arange(E))
    assert torch.equal(relative[:, 0], torch.zeros(B))  # an expert of no weights is wanted nowhere
    torch.testing.assert_close(relative[:, 1:], losses.profile_targets(contribution[:, 1:]))
    nothing = losses.profile_targets(torch.zeros(2, E), 2.0)
    torch.testing.assert_close(nothing, torch.full((2, E), 1 / E))
    large = losses.profile_targets(contribution * 1e200, 8.0)
    torch.testing.assert_close(large, losses.profile_targets(contribution, 8.0))


def test_profile_kl() -> None:
    p_BE, contribution = probabilities(), random(B, E).abs()
    contribution[:, 2] = 0
    targets = losses.profile_targets(contribution, 2.0)
    expected = functional.kl_div(p_BE.log(), targets.double(), reduction="batchmean")
    torch.testing.assert_close(losses.profile_kl(targets, p_BE).mean, expected)
    agrees_with_differences(lambda x: losses.profile_kl(targets, x.softmax(1)), p_BE.log())
    assert float(losses.profile_kl(targets, targets.double()).mean) == pytest.approx(0, abs=1e-6)
