"""Values against plain formulas, gradients against finite differences in float64, memory, and sums over workers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.differences import agrees_with_differences
from tinyonn.plan.training import CHUNK_BYTES
from tinyonn.train import losses
from tinyonn.train.losses import Sum

T, V, K, B, E = 7, 13, 4, 6, 10
generator = torch.Generator()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Each test draws the same, whichever ran before."""
    generator.manual_seed(5)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(params=[None, 1, 3])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a chunk: all, one, or some that do not divide the batch."""
    if request.param is not None:
        monkeypatch.setitem(CHUNK_BYTES, "cpu", request.param * V * 4)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logit_kl(temperature: float) -> None:
    student, teacher = 3 * random(T, V), 3 * random(T, V)
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    loss = losses.logit_kl(student, teacher, temperature)
    assert loss.count == T
    torch.testing.assert_close(loss.total, temperature**2 * (p * (p / q).log()).sum())
    agrees_with_differences(lambda s: losses.logit_kl(s, teacher, temperature), student)
    torch.testing.assert_close(losses.logit_kl(teacher, teacher, temperature).total, torch.zeros(()).double())


def test_a_teachers_padding_and_impossible_tokens_add_nothing() -> None:
    student, teacher = random(T, V), random(T, V)
    wide = torch.cat([teacher, random(T, 3)], 1)
    torch.testing.assert_close(losses.logit_kl(student, wide).total, losses.logit_kl(student, teacher).total)
    teacher[:, 2] = -torch.inf
    agrees_with_differences(lambda s: losses.logit_kl(s, teacher), student)
    with pytest.raises(ValueError, match=r"12 columns.*13"):
        losses.logit_kl(student, teacher[:, :12])
    with pytest.raises(ValueError, match="temperature is 0"):
        losses.logit_kl(student, teacher, 0)


def test_logits_that_are_no_numbers_make_no_number_of_a_loss() -> None:
    good, bad, labels = random(T, V), random(T, V), torch.arange(T)
    bad[3, 5] = torch.nan
    logs, indices = good.log_softmax(1).topk(K)
    assert not bool(losses.logit_kl(bad, good).total.isfinite())
    assert not bool(losses.logit_kl(good, bad).total.isfinite())
    assert not bool(losses.topk_kl(bad, indices, logs).total.isfinite())
    assert not bool(losses.cross_entropy(bad, labels).total.isfinite())
    assert not bool(losses.token_entropy(bad)[3].isfinite())


def test_no_tokens_are_a_loss_of_zero() -> None:
    student = random(0, V).requires_grad_()
    for loss in (losses.logit_kl(student, random(0, V)), losses.cross_entropy(student, torch.arange(0))):
        assert (float(loss.mean.detach()), loss.count) == (0, 0)
        loss.mean.backward()


@pytest.mark.usefixtures("chunk")
def test_topk_kl() -> None:
    student, teacher = 3 * random(T, V), 3 * random(T, V)
    logs, indices = teacher.log_softmax(1).topk(K)
    p, q = teacher.softmax(1), student.softmax(1)
    in_top = torch.zeros(T, V).bool().scatter_(1, indices, True)
    expected = 0.0
    for row in range(T):
        top = in_top[row]
        p_known, q_known = torch.cat([p[row][top], p[row][~top].sum()[None]]), None
        q_known = torch.cat([q[row][top], q[row][~top].sum()[None]])
        expected += float((p_known * (p_known / q_known).log()).sum())
    loss = losses.topk_kl(student, indices, logs)
    assert loss.count == T
    assert float(loss.total) == pytest.approx(expected, rel=1e-9)
    assert float(loss.total) < float(losses.logit_kl(student, teacher).total)  # a lower bound
    agrees_with_differences(lambda s: losses.topk_kl(s, indices, logs), student)


def test_topk_kl_of_all_tokens_is_logit_kl() -> None:
    student, teacher = random(T, V), random(T, V)
    logs, indices = teacher.float().log_softmax(1).topk(V)  # rounded: they do not sum to 1
    whole, bucketed = losses.logit_kl(student, teacher), losses.topk_kl(student, indices, logs)
    torch.testing.assert_close(bucketed.total, whole.total, rtol=1e-6, atol=1e-6)
    agrees_with_differences(lambda s: losses.topk_kl(s, indices, logs.double().log_softmax(1)), student)


def test_topk_kl_of_a_certain_teacher_and_a_certain_student() -> None:
    """Where the rest's probability is 0, or rounds to 0 in float32, nothing is nan."""
    student = torch.zeros(2, V)
    student[:, 1] = 200.0
    student.requires_grad_()
    indices = torch.tensor([[0, 1], [1, 0]])
    logs = torch.tensor([[0.0, -torch.inf], [math.log(0.75), math.log(0.125)]])
    total = losses.topk_kl(student, indices, logs).total
    total.backward()
    assert student.grad is not None
    assert bool(total.isfinite())
    assert bool(student.grad.isfinite().all())
    assert float(total.detach()) == pytest.approx(200 + 0.25 * 200 + expected_entropy(), rel=1e-5)


def expected_entropy() -> float:
    """Minus the teacher's own entropy, and the log of the 11 tokens that share the rest."""
    known = sum(p * math.log(p) for p in (0.75, 0.125, 0.125))
    return known - 0.125 * math.log(11)


@pytest.mark.usefixtures("chunk")
def test_cross_entropy() -> None:
    student, labels = 3 * random(T, V), torch.tensor([0, 12, -100, 3, 3, -100, 7])
    loss = losses.cross_entropy(student, labels)
    assert loss.count == 5
    torch.testing.assert_close(loss.mean, functional.cross_entropy(student, labels))
    each = losses.cross_entropy_tokens(student, labels)
    torch.testing.assert_close(each, functional.cross_entropy(student, labels, reduction="none"))
    agrees_with_differences(lambda s: losses.cross_entropy(s, labels), student)
    assert float(losses.cross_entropy(student, torch.full((T,), -100)).mean) == 0


@pytest.mark.usefixtures("chunk")
def test_token_entropy() -> None:
    logits = 3 * random(T, V)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(losses.token_entropy(logits), expected)
    logits[0, 1:] = -torch.inf
    assert float(losses.token_entropy(logits)[0]) == 0


class LargestOf(TorchDispatchMode):
    """The size of the largest float32 tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor) and one.dtype == torch.float32:
                self.size = max(self.size, one.numel())
        return made


@pytest.mark.parametrize("kind", ["kl", "topk", "ce"])
def test_no_copy_of_the_logits_is_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens in chunks of 8: no float32 tensor above a chunk, forward or backward; one gradient in bfloat16."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 8 * V * 4)
    student = random(64, V, dtype=torch.bfloat16).requires_grad_()
    teacher = random(64, V, dtype=torch.bfloat16)
    logs, indices = teacher.float().log_softmax(1).topk(K)
    with LargestOf() as largest:  # type: ignore[no-untyped-call]
        made = {
            "kl": lambda: losses.logit_kl(student, teacher),
            "topk": lambda: losses.topk_kl(student, indices, logs),
            "ce": lambda: losses.cross_entropy(student, indices[:, 0]),
        }[kind]()
        made.total.backward()
    assert largest.size <= max(8 * V, 64 * K)
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_square_head() -> None:
    student = [random(2, 3, 5) for _ in range(3)]
    teacher = [random(2, 3, 5) for _ in range(3)]
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = sum(
        ((s[mask] - t[mask]).square().sum(1) / t[mask].square().sum(1)).sum()
        for s, t in zip(student, teacher, strict=True)
    )
    loss = losses.square_head(student, teacher, mask)
    assert loss.count == 3
    torch.testing.assert_close(loss.total, expected / 3)
    stacked = torch.stack(student)
    agrees_with_differences(lambda s: losses.square_head(s.unbind(), teacher, mask), stacked)
    with pytest.raises(ValueError, match=r"2 layers.*3 of the teacher"):
        losses.square_head(student[:2], teacher, mask)


def test_square_head_uses_nothing_of_padding() -> None:
    student, teacher = random(2, 3, 5), random(2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    plain = losses.square_head([student], [teacher], mask).total
    student[~mask], teacher[~mask] = torch.nan, torch.inf
    student.requires_grad_()
    total = losses.square_head([student], [teacher], mask).total
    total.backward()
    assert torch.equal(total.detach(), plain)
    assert student.grad is not None
    assert torch.equal(student.grad[~mask], torch.zeros(3, 5).double())
    assert bool(student.grad.isfinite().all())


def test_two_workers_have_the_loss_and_gradient_of_one() -> None:
    """Samples dealt unevenly; totals and counts added, the batch's statistics given to both."""
    logits, contribution = random(B, E), random(B, E).abs()
    student, labels = random(T, V), torch.tensor([1, -100, 2, 3, -100, -100, 4])
    share = losses.shares(torch.arange(E))
    targets = losses.profile_targets(contribution)

    def parts(samples: slice, tokens: slice, x: torch.Tensor, s: torch.Tensor) -> list[Sum]:
        p_BE = x[samples].softmax(1)
        return [
            losses.balance(p_BE, share),
            losses.z_loss(x[samples]),
            losses.profile_kl(targets[samples], p_BE),
            losses.cross_entropy(s[tokens], labels[tokens]),
        ]

    found = []
    for dealt in ([slice(None)], [slice(0, 1), slice(1, None)]):
        x, s = logits.clone().requires_grad_(), student.clone().requires_grad_()
        made = [parts(part, part, x, s) for part in dealt]
        counts = [sum(one.count for one in column) for column in zip(*made, strict=True)]
        totals = [torch.stack([one.total for one in column]).sum() for column in zip(*made, strict=True)]
        means = torch.stack([total / count for total, count in zip(totals, counts, strict=True)])
        means.sum().backward()
        found.append((means.detach(), x.grad, s.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
