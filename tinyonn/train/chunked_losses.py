"""Losses over tokens and a vocabulary, in chunks of tokens forward and backward.

All are cross entropies of some target distribution p against the student's q = softmax(s), so

    loss_t = -sum_v p_tv log q_tv + constant_t,     d loss_t / d s_tv = mass_t q_tv - p_tv

Autograd would keep log q in float32 for all tokens until the backward pass. Here a chunk's is made, used and dropped,
in forward and again in backward; what is kept are the logits, which the caller holds anyway, and one or two
normalisers (log of a sum of exponentials) a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from tinyonn.plan.training import CHUNK_BYTES


class Targets(Protocol):
    """What a student is measured against; `part` are the tokens of the chunk at hand, n_TM their normalisers."""

    def normalisers(self, s_TV: torch.Tensor, part: slice) -> torch.Tensor:
        """What backward needs besides the logits, [T, M]."""

    def losses(self, s_TV: torch.Tensor, n_TM: torch.Tensor, part: slice) -> torch.Tensor:
        """Of each token, [T]."""

    def gradients(self, s_TV: torch.Tensor, n_TM: torch.Tensor, part: slice) -> torch.Tensor:
        """Of each token's loss with respect to its logits, [T, V]."""


@dataclass(frozen=True)
class Soft:
    """temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature))."""

    teacher_TV: torch.Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")

    def _scaled(self, x_TV: torch.Tensor) -> torch.Tensor:
        return x_TV if self.temperature == 1 else x_TV / self.temperature

    def _pair(self, s_TV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self._scaled(self.teacher_TV[part].to(s_TV)), self._scaled(s_TV)

    def normalisers(self, s_TV: torch.Tensor, part: slice) -> torch.Tensor:
        """The teacher's and the student's."""
        return torch.stack([one.logsumexp(1) for one in self._pair(s_TV, part)], 1)

    def losses(self, s_TV: torch.Tensor, n_TM: torch.Tensor, part: slice) -> torch.Tensor:
        """KL of each token."""
        t_TV, s_TV = self._pair(s_TV, part)
        p_TV = (t_TV - n_TM[:, :1]).exp_()
        # a token that cannot come, by the teacher, adds 0 and not 0 * inf
        apart = (t_TV - s_TV).nan_to_num_(nan=0.0)
        return (p_TV.mul_(apart).sum(1) - n_TM[:, 0] + n_TM[:, 1]) * self.temperature**2

    def gradients(self, s_TV: torch.Tensor, n_TM: torch.Tensor, part: slice) -> torch.Tensor:
        """Temperature * (q - p)."""
        t_TV, s_TV = self._pair(s_TV, part)
        p_TV, q_TV = (t_TV - n_TM[:, :1]).exp_(), (s_TV - n_TM[:, 1:]).exp_()
        return q_TV.sub_(p_TV).mul_(self.temperature)


@dataclass(frozen=True)
class Bucketed:
    """KL of a distribution known at K tokens, all others being one bucket."""

    indices_TK: torch.Tensor
    logs_TK: torch.Tensor  # float64
    rest_T: torch.Tensor  # probability of all others, float64

    @classmethod
    def of(cls, indices_TK: torch.Tensor, logprobs_TK: torch.Tensor, vocabulary: int) -> Bucketed:
        """From a teacher's likeliest tokens and their log probabilities."""
        logs = logprobs_TK.detach().double()
        rest_T = (1 - logs.exp().sum(1)).clamp(min=0)
        if indices_TK.shape[1] == vocabulary:
            rest_T = torch.zeros_like(rest_T)  # there are no others, whatever rounding left
        return cls(indices_TK.long(), logs, rest_T)

    def _known(self, s_TV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Places, teacher's logs there, and its probability elsewhere."""
        return self.indices_TK[part].to(s_TV.device), self.logs_TK[part].to(s_TV), self.rest_T[part].to(s_TV)

    def normalisers(self, s_TV: torch.Tensor, part: slice) -> torch.Tensor:
        """Of all tokens, and of those that are not among the K."""
        outside = s_TV.scatter(1, self.indices_TK[part].to(s_TV.device), -torch.inf)
        return torch.stack([s_TV.logsumexp(1), outside.logsumexp(1)], 1)

    def losses(self, s_TV: torch.Tensor, n_TM: torch.Tensor, part: slice) -> torch.Tensor:
        """KL of each token."""
        places, logs_TK, rest_T = self._known(s_TV, part)
        apart = logs_TK - (s_TV.gather(1, places) - n_TM[:, :1])
        known = (logs_TK.exp() * apart).masked_fill_(logs_TK == -torch.inf, 0).sum(1)
        return known + torch.where(rest_T > 0, rest_T * (rest_T.log() - n_TM[:, 1] + n_TM[:, 0]), 0)

    def gradients(self, s_TV: torch.Tensor, n_TM: torch.Tensor, part: slice) -> torch.Tensor:
        """Mass * q - p, the rest's p dealt out as the student deals it."""
        places, logs_TK, rest_T = self._known(s_TV, part)
        p_TK = logs_TK.exp()
        mass_TV = (s_TV - n_TM[:, :1]).exp_().mul_((p_TK.sum(1) + rest_T)[:, None])
        # at the K places this may be inf or nan; they are written anew
        dealt_TV = (s_TV - n_TM[:, 1:]).exp_().mul_(rest_T[:, None])
        known = mass_TV.gather(1, places) - p_TK
        return mass_TV.sub_(dealt_TV).scatter_(1, places, known)


@dataclass(frozen=True)
class Hard:
    """-log q of the label; 0 where the label is negative."""

    labels_T: torch.Tensor

    def _labels(self, s_TV: torch.Tensor, part: slice) -> torch.Tensor:
        return self.labels_T[part].to(s_TV.device)

    def normalisers(self, s_TV: torch.Tensor, part: slice) -> torch.Tensor:
        """The student's."""
        return s_TV.logsumexp(1, keepdim=True)

    def losses(self, s_TV: torch.Tensor, n_TM: torch.Tensor, part: slice) -> torch.Tensor:
        """Cross entropy of each token."""
        labels = self._labels(s_TV, part)
        chosen = s_TV.gather(1, labels.clamp(min=0)[:, None])
        return (n_TM - chosen).squeeze(1).masked_fill_(labels < 0, 0)

    def gradients(self, s_TV: torch.Tensor, n_TM: torch.Tensor, part: slice) -> torch.Tensor:
        """1 less at the label than q."""
        labels = self._labels(s_TV, part)
        grad = (s_TV - n_TM).exp_()
        grad.scatter_add_(1, labels.clamp(min=0)[:, None], grad.new_full((len(labels), 1), -1))
        return grad.masked_fill_((labels < 0)[:, None], 0)


def token_losses(student_TV: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Losses of all tokens, in chunks."""
    losses: torch.Tensor = _TokenLosses.apply(student_TV, targets)  # type: ignore[no-untyped-call]
    return losses


def entropy_of(logits_TV: torch.Tensor) -> torch.Tensor:
    """Entropy of the softmax of each row, float32 [T] (float64 of float64)."""
    found = [_wide(logits_TV[:0]).sum(1)]
    for part in _parts(logits_TV):
        s_TV = _wide(logits_TV[part])
        n_T = s_TV.logsumexp(1)
        q_TV = (s_TV - n_T[:, None]).exp_()
        found.append(n_T - q_TV.mul_(s_TV).nan_to_num_(nan=0.0).sum(1))
    return torch.cat(found)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_TV: torch.Tensor, targets: Targets) -> torch.Tensor:
        found, kept = [_wide(student_TV[:0]).sum(1)], []
        for part in _parts(student_TV):
            s_TV = _wide(student_TV[part])
            kept.append(targets.normalisers(s_TV, part))
            found.append(targets.losses(s_TV, kept[-1], part))
        ctx.save_for_backward(student_TV, *kept)
        ctx.targets = targets
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor, None]:
        student_TV, *kept = ctx.saved_tensors
        out = torch.empty_like(student_TV)
        for part, n_TM in zip(_parts(student_TV), kept, strict=True):
            gradients = ctx.targets.gradients(_wide(student_TV[part]), n_TM, part)
            out[part] = gradients.mul_(grad_T[part, None])
        return out, None


def _parts(rows: torch.Tensor) -> list[slice]:
    """Chunks of tokens."""
    limit = CHUNK_BYTES.get(rows.device.type, CHUNK_BYTES["cuda"])
    size = max(1, limit // (4 * max(rows.shape[1], 1)))
    return [slice(first, first + size) for first in range(0, len(rows), size)]


def _wide(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
