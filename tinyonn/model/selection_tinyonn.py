"""Scores of experts become a choice, and a choice becomes gates: pure functions; saved beside exported models.

Shape suffixes: B samples, N branches, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def product(main_BN: torch.Tensor, sub_BE: torch.Tensor, branch_of: Sequence[int]) -> torch.Tensor:
    """Log of p(e) = p_main(branch of e) * p_sub(e within its branch), float32 [B, E].

    Parameters
    ----------
    main_BN, sub_BE : float [B, N], [B, E]
        Logits.
    branch_of : sequence of int, E
        No branch is empty.
    """
    branch_E = torch.tensor(branch_of, device=sub_BE.device)
    member_NE = branch_E == torch.arange(main_BN.shape[1], device=branch_E.device)[:, None]
    own_BNE = torch.where(member_NE, sub_BE[:, None].float(), -torch.inf)
    share_BN = main_BN.float().log_softmax(1) - own_BNE.logsumexp(2)
    return sub_BE.float() + (share_BN[:, :, None] * member_NE).sum(1)


def counts(k: int | torch.Tensor | None, scores_BE: torch.Tensor) -> torch.Tensor:
    """Experts to choose for each sample, int64 [B]; at most all, which None is too.

    Raises
    ------
    ValueError
        A negative k, or one for another number of samples.
    """
    samples, experts = scores_BE.shape
    k_B = torch.as_tensor(experts if k is None else k, device=scores_BE.device)
    if k_B.numel() and int(k_B.min()) < 0:
        raise ValueError(f"k = {int(k_B.min())} experts cannot be chosen; give a number from 0 on")
    if k_B.dim() and len(k_B) != samples:
        raise ValueError(f"k for {len(k_B)} samples does not fit a batch of {samples}; give one for each")
    return k_B.long().clamp(max=experts).expand(samples)


def ranked(scores_BE: torch.Tensor) -> torch.Tensor:
    """Experts from the highest score down, of equal ones the lower number first; int64 [B, E]."""
    return scores_BE.argsort(dim=1, descending=True, stable=True)


def select(scores_BE: torch.Tensor, k_B: torch.Tensor) -> torch.Tensor:
    """The k best of each sample; never one whose score is -inf.

    Parameters
    ----------
    scores_BE : float32 [B, E]
    k_B : int64 [B]

    Returns
    -------
    bool [B, E]
    """
    places_E = torch.arange(scores_BE.shape[1], device=scores_BE.device)
    among_BE = places_E < k_B[:, None]
    active_BE = torch.zeros_like(among_BE).scatter(1, ranked(scores_BE), among_BE)
    return active_BE & (scores_BE > -torch.inf)


def limit_load(scores_BE: torch.Tensor, k: int | torch.Tensor, factor: float) -> torch.Tensor:
    """The k best of each sample, but no expert for more samples than its share; the next best takes over.

    Every sample asks its k best; an expert that too many ask keeps those with the highest scores and is lost to
    the others, who ask again (deferred acceptance, Gale and Shapley 1962: the result does not depend on the order
    of samples, but for equal scores, of which the first samples come first).

    Parameters
    ----------
    scores_BE : float32 [B, E]
        An expert with -inf for all samples is not to choose from.
    k : int or int64 [B]
    factor : float
        Share of the even load, ``ceil(factor * sum(k) / experts to choose from)`` samples; from 1 on.

    Returns
    -------
    bool [B, E]
        A sample has fewer than k experts only where all that it does not have are full.

    Raises
    ------
    ValueError
        A factor below 1.
    """
    if not factor >= 1:
        raise ValueError(f"a load of {factor} times the even one cannot be met; give a factor from 1 on")
    samples, experts = scores_BE.shape
    k_B = torch.as_tensor(k, device=scores_BE.device).expand(samples)
    choices = int((scores_BE > -torch.inf).any(0).sum())
    room = math.ceil(factor * int(k_B.clamp(max=choices).sum()) / max(choices, 1))
    left_BE = scores_BE.clone()
    while True:
        active_BE = select(left_BE, k_B)
        if not active_BE.numel() or int(active_BE.sum(0).max()) <= room:
            return active_BE
        wanted_EB = torch.where(active_BE, left_BE, -torch.inf).T
        room_E = torch.full((experts,), room, device=left_BE.device)
        left_BE[active_BE & ~select(wanted_EB, room_E).T] = -torch.inf


def slopes(scores_BE: torch.Tensor, log_p_BE: torch.Tensor, k_B: torch.Tensor) -> torch.Tensor:
    """How far inside the choice each expert stands, 0..1: the gradient of gates that are 0 or 1.

    ``q_e = sigmoid(log p_e - log p*)`` where p* lies between the last that is chosen and the first that is not,
    counted in scores: q is half at the edge of the choice, where its slope in log p is largest, 1/4, and flat far
    from it. p* has no gradient.

    Parameters
    ----------
    scores_BE : float32 [B, E]
        What was chosen by: log p with what is added to it; -inf is not to choose from.
    log_p_BE : float32 [B, E]
        May need a gradient.
    k_B : int64 [B]

    Returns
    -------
    float32 [B, E]
        0, without gradient, for what is not to choose from.
    """
    free_BE = scores_BE > -torch.inf
    if not scores_BE.shape[1]:
        return log_p_BE
    sorted_BE = scores_BE.sort(dim=1, descending=True).values
    last_B = (free_BE.sum(1) - 1).clamp(min=0)
    inside_B = (k_B - 1).clamp(min=0).minimum(last_B)
    outside_B = k_B.minimum(last_B)
    edges_B2 = sorted_BE.gather(1, torch.stack([inside_B, outside_B], 1))
    edge_B1 = edges_B2.mean(1, keepdim=True)
    moved_BE = torch.where(free_BE, log_p_BE + (scores_BE - log_p_BE).detach(), 0.0)
    edge_B1 = torch.where(edge_B1 > -torch.inf, edge_B1, 0.0)
    return torch.where(free_BE, torch.sigmoid(moved_BE - edge_B1), 0.0)
