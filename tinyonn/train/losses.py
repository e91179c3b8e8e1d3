"""The losses of training, as pure functions of tensors.

Every loss is a `Sum`: a total that carries the gradient, and what it is to be divided by. So the same loss is had
from one worker or many: add totals, add counts, divide. Where a loss is no sum over samples (balance), the
statistic of the batch that it needs (`share_E`) is given, taken over all workers.

Shape suffixes: T tokens, V vocabulary, K the teacher's kept tokens, H hidden, B samples, E experts, N the main
router's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tinyonn.train.chunked_losses import Bucketed, Hard, Soft, entropy_of, token_losses

IGNORED = -100  # the label of a token that is not predicted
SMALLEST = 1e-30  # a probability, or a squared norm, below it counts as this one


@dataclass(frozen=True)
class Sum:
    """A loss before it is divided.

    Attributes
    ----------
    total : float32 [], float64 for float64 input
        With gradient.
    count : int
        Tokens, or samples: the total's number of terms.
    """

    total: torch.Tensor
    count: int

    @property
    def mean(self) -> torch.Tensor:
        """Total by count; 0 of nothing."""
        return self.total / max(self.count, 1)


def logit_kl(student_TV: torch.Tensor, teacher_TV: torch.Tensor, temperature: float = 1.0) -> Sum:
    """Distillation of logits: temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature)).

    Hinton et al. 2015, section 2. Computed in chunks of tokens, forward and backward, so that no copy of the logits in
    float32 is ever whole; what stays is the gradient, in the student's dtype.

    Parameters
    ----------
    student_TV, teacher_TV : float [T, V]
        Logits of the tokens that count. The teacher may have another dtype, and more columns (padding of its head),
        which are left out.
    temperature : float
        Above 0.

    Returns
    -------
    Sum
        Nats, over T tokens. The teacher gets no gradient.

    Raises
    ------
    ValueError
        The teacher has fewer columns, or a temperature of 0 or below.
    """
    columns, wanted = teacher_TV.shape[1], student_TV.shape[1]
    if columns < wanted:
        raise ValueError(
            f"the teacher has logits of {columns} columns but the student {wanted}; they need one vocabulary"
        )
    targets = Soft(teacher_TV.detach()[:, :wanted], temperature)
    return Sum(token_losses(student_TV, targets).sum(), len(student_TV))


def topk_kl(student_TV: torch.Tensor, indices_TK: torch.Tensor, logprobs_TK: torch.Tensor) -> Sum:
    """Distillation from the teacher's K likeliest tokens, all others being one bucket.

    sum_k p_k log(p_k / q_k) + p_r log(p_r / q_r), with p_r = 1 - sum_k p_k and q_r likewise: the KL of the
    distributions after the rest has been put together, and so a lower bound of the whole KL.

    Parameters
    ----------
    student_TV : float [T, V]
    indices_TK : integer [T, K]
        Distinct in a row.
    logprobs_TK : float [T, K]
        The teacher's, at temperature 1.

    Returns
    -------
    Sum
        Nats, over T tokens.
    """
    targets = Bucketed.of(indices_TK, logprobs_TK, student_TV.shape[1])
    return Sum(token_losses(student_TV, targets).sum(), len(student_TV))


def cross_entropy(student_TV: torch.Tensor, labels_T: torch.Tensor) -> Sum:
    """Cross entropy of the true next tokens; those labelled -100 do not count.

    Parameters
    ----------
    student_TV : float [T, V]
    labels_T : int64 [T]

    Returns
    -------
    Sum
        Nats, over the labelled tokens.
    """
    return Sum(cross_entropy_tokens(student_TV, labels_T).sum(), int((labels_T != IGNORED).sum()))


def cross_entropy_tokens(student_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """The same, token by token, for sums by sample: float [T], with gradient, 0 where there is no label."""
    return token_losses(student_TV, Hard(labels_T))


def token_entropy(logits_TV: torch.Tensor) -> torch.Tensor:
    """Entropy of the predicted distributions in nats, float [T], without gradient, in chunks of tokens."""
    return entropy_of(logits_TV.detach())


def square_head(
    hidden_s: Sequence[torch.Tensor], hidden_t: Sequence[torch.Tensor], mask_BT: torch.Tensor
) -> Sum:
    """Distillation of hidden states: mean over layers of |s - t|^2 / |t|^2, for each token.

    SquareHead (Kurtic et al. 2023, section 3) divides sums over all tokens of a batch. Here every token is divided by
    its own |t|^2: the few tokens of huge norm, such as a text's first, would else hide all others, and a loss over
    tokens is the same however they are dealt to workers.

    Parameters
    ----------
    hidden_s, hidden_t : sequence of float [B, T, H]
        One of each layer; the teacher's get no gradient.
    mask_BT : bool [B, T]
        Tokens that count; nothing of the others is used, whatever they are.

    Returns
    -------
    Sum
        Over the mask's tokens; each one's term is a mean over layers.

    Raises
    ------
    ValueError
        Other numbers of layers.
    """
    if len(hidden_s) != len(hidden_t) or not hidden_s:
        raise ValueError(
            f"{len(hidden_s)} layers of the student do not pair with {len(hidden_t)} of the teacher"
        )
    parts = [
        relative_squares(s, t.detach().to(s.device), mask_BT) for s, t in zip(hidden_s, hidden_t, strict=True)
    ]
    return Sum(torch.stack(parts).mean(0).sum(), int(mask_BT.sum()))


def balance(probabilities_BE: torch.Tensor, share_E: torch.Tensor) -> Sum:
    """Load balance: E * sum_e f_e P_e; 1 if all experts are used alike.

    Switch Transformers (Fedus et al. 2022, equation 4), with the shares of all choices in the place of the top-1's.

    Parameters
    ----------
    probabilities_BE : float [B, E]
        Of the router; rows sum to 1.
    share_E : float [E]
        Each expert's share f_e of the batch's choices, over all workers; it gets no gradient. See `shares`.

    Returns
    -------
    Sum
        Over B samples.
    """
    return Sum(
        (probabilities_BE * share_E.detach().to(probabilities_BE)).sum() * probabilities_BE.shape[1],
        len(probabilities_BE),
    )


def shares(load_E: torch.Tensor) -> torch.Tensor:
    """Shares of a load, float64 [E], the sum 1; even ones of no load at all."""
    load = load_E.detach().double()
    total = load.sum()
    return load / total if float(total) > 0 else torch.full_like(load, 1 / max(load.numel(), 1))


def z_loss(logits_BN: torch.Tensor, branches: Sequence[Sequence[int]] | None = None) -> Sum:
    """Keeps a router's logits small: logsumexp(logits)^2, ST-MoE (Zoph et al. 2022, equation 5).

    Parameters
    ----------
    logits_BN : float [B, N]
    branches : sequence of sequences of int, optional
        Columns that are softmaxed apart; then the mean over branches.

    Returns
    -------
    Sum
        Over B samples.
    """
    parts = [logits_BN] if branches is None else [logits_BN[:, list(branch)] for branch in branches if branch]
    logs = torch.stack([part.logsumexp(1) for part in parts])
    return Sum(logs.square().mean(0).sum(), len(logits_BN))


def profile_targets(
    contribution_BE: torch.Tensor, sharpness: float = 1.0, per_E: torch.Tensor | None = None
) -> torch.Tensor:
    """What the router shall choose by: shares of contribution^sharpness.

    Parameters
    ----------
    contribution_BE : float [B, E]
        Not negative: sum |w g| of each expert in the dense model on each sample.
    sharpness : float
        0 is even, 1 in proportion, more favours the strongest.
    per_E : float [E], optional
        What contributions are divided by: with the experts' weights, what does most for its size is wanted first; with
        their means in the profile, an expert is wanted where it does more than usual.

    Returns
    -------
    float32 [B, E]
        Rows sum to 1; even where a sample has no contribution at all.
    """
    wide = contribution_BE.double()
    if per_E is not None:
        per = per_E.double()
        wide = torch.where(per > 0, wide / per.clamp(min=SMALLEST), 0)
    top = wide.amax(1, keepdim=True)
    power = torch.where(top > 0, wide / top.clamp(min=1e-300), 1) ** sharpness
    return (power / power.sum(1, keepdim=True)).float()


def profile_kl(targets_BE: torch.Tensor, probabilities_BE: torch.Tensor) -> Sum:
    """Router's supervision: KL(targets || probabilities).

    Parameters
    ----------
    targets_BE : float [B, E]
        Of `profile_targets`.
    probabilities_BE : float [B, E]

    Returns
    -------
    Sum
        Nats, over B samples; 0 where the router gives the targets.
    """
    targets = targets_BE.detach().to(probabilities_BE)
    log = probabilities_BE.clamp(min=SMALLEST).log()
    return Sum((torch.xlogy(targets, targets) - targets * log).sum(), len(probabilities_BE))


def relative_squares(s_BTH: torch.Tensor, t_BTH: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Squared distance by squared norm of every token.

    Parameters
    ----------
    s_BTH, t_BTH : float [B, T, H]
        The student's, and the teacher's, which gets no gradient.
    mask_BT : bool [B, T]
        Others are 0 and get a gradient of 0, even where they are not finite.

    Returns
    -------
    float32 [B, T], float64 for float64 states
    """
    ratios: torch.Tensor = _RelativeSquare.apply(s_BTH, t_BTH, mask_BT)  # type: ignore[no-untyped-call]
    return ratios


class _RelativeSquare(torch.autograd.Function):
    """The gradient is 2 (s - t) / |t|^2; autograd would keep s - t in float32 of every layer, here it is made again."""

    @staticmethod
    def forward(ctx: Any, s: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(s, t, mask)
        exact = torch.promote_types(s.dtype, torch.float32)
        wide = t.to(exact)
        ratio = (s.to(exact) - wide).square().sum(-1) / _squares(wide)
        return ratio.masked_fill(~mask, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        s, t, mask = ctx.saved_tensors
        wide = t.to(grad.dtype)
        scale = (2 * grad / _squares(wide)).unsqueeze(-1)
        return (
            ((s.to(grad.dtype) - wide) * scale).masked_fill_(~mask.unsqueeze(-1), 0).to(s.dtype),
            None,
            None,
        )


def _squares(wide: torch.Tensor) -> torch.Tensor:
    return wide.square().sum(-1).clamp(min=SMALLEST)
