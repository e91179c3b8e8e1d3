"""The router: the tokens of a prompt decide which experts are on; saved beside exported models.

An encoder of its own reads the base's token embeddings x_t, scaled to a root mean square of 1:

    u_t = U x_t                            H -> width
    a_t = gelu(u_t + sum_j c_j * u_(t-j))  over the latest tokens, channel by channel
    m_t = (a_1 + ... + a_t) / t            the mean of what was read so far
    s_t = norm(m_t + D gelu(F norm(m_t)))  the state; nothing in it lies ahead of t

Two linear heads make of it logits over branches and over the experts of each branch, and the probability of an
expert is the product ``p(e) = p_main(branch of e) * p_sub(e within its branch)``. Everything is computed in float32.

Shape suffixes: B samples, T tokens, H hidden, W width, N branches, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .configuration_tinyonn import RouterOptions

__all__ = ["Choice", "PromptRouter", "RouterLogits", "limit_load"]

TAPS = 4  # tokens that the convolution sees
CHUNK = 2048  # tokens whose embeddings are in float32 at a time
HEAD_STD = 0.02
TINY = 1e-20  # mean square of an embedding that counts as zero
SMALL = 1e-3  # the same of a state; bounds the gradient where nothing was read


@dataclass(frozen=True)
class RouterLogits:
    """What the heads say of each sample.

    Attributes
    ----------
    main_BN : float32 [B, N]
    sub_BE : float32 [B, E]
    """

    main_BN: torch.Tensor
    sub_BE: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """Which experts are on for each sample.

    Attributes
    ----------
    gates_BE : float32 [B, E]
    active_BE : bool [B, E]
        Shared experts included.
    probabilities_BE : float32 [B, E]
        Add up to 1.
    logits : RouterLogits
    """

    gates_BE: torch.Tensor
    active_BE: torch.Tensor
    probabilities_BE: torch.Tensor
    logits: RouterLogits


class _Linear(nn.Linear):
    """Computed in float32 whatever it is held in; called as a module, so that offloaded weights come back for it."""

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(X, self.weight.float(), bias)


class PromptRouter(nn.Module):
    """One main router over branches of experts and one sub-router in each of them.

    Parameters
    ----------
    options : RouterOptions or its plain tree
    base : PreTrainedModel
        Whose token embeddings are read, without a gradient; stays the owner of them.

    Attributes
    ----------
    bias : float32 [E]
        Added to log p for the choice alone; see `update_bias`.
    """

    bias: torch.Tensor

    def __init__(self, options: RouterOptions | Mapping[str, Any], base: Any) -> None:
        super().__init__()
        self.options = options if isinstance(options, RouterOptions) else RouterOptions.read(options)
        self._base = (base,)  # in a tuple, so that its parameters are not the router's
        width, hidden = self.options.width, base.get_input_embeddings().weight.shape[1]
        kind: dict[str, Any] = {"dtype": torch.float32}
        self.embed = _Linear(hidden, width, bias=False, **kind)
        self.mix = nn.Parameter(torch.empty(TAPS, 1, width, **kind))
        self.up = _Linear(width, 2 * width, **kind)
        self.down = _Linear(2 * width, width, **kind)
        self.main = _Linear(width, len(self.options.branches), **kind)
        self.sub = _Linear(width, self.options.experts, **kind)
        self.register_buffer("bias", torch.zeros(self.options.experts, **kind))
        self.reset_parameters()

    def reset_parameters(self, seed: int = 0) -> None:
        """Random weights, the same for the same seed; all experts nearly equally likely."""
        device = self.bias.device
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        for layer in (self.embed, self.up, self.down):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
        nn.init.normal_(self.mix, std=TAPS**-0.5, generator=generator)
        for head in (self.main, self.sub):
            nn.init.normal_(head.weight, std=HEAD_STD, generator=generator)
        for tensor in (self.up.bias, self.down.bias, self.main.bias, self.sub.bias, self.bias):
            nn.init.zeros_(tensor)

    @property
    def top_k(self) -> int | None:
        """Of the options; may be set at any time, and is checked then."""
        return self.options.top_k

    @top_k.setter
    def top_k(self, value: int | None) -> None:
        self.options = dataclasses.replace(self.options, top_k=value)

    # From tokens to logits

    def states(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """What was read up to each token.

        Parameters
        ----------
        ids_BT : int64 [B, T]
        mask_BT : [B, T], optional
            0 at padding, which may stand on either side.

        Returns
        -------
        float32 [B, T, W]
            At t a function of the tokens up to t alone.
        """
        return self._state(self._read(ids_BT, self._real(ids_BT, mask_BT)))

    def logits(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> RouterLogits:
        """Of each sample after its last token that is not padding; of no tokens at all, what an empty prompt says.

        Parameters
        ----------
        ids_BT, mask_BT
            As in `states`. A mask that ends with the prompt hides what comes after it.
        """
        real_BT = self._real(ids_BT, mask_BT)
        means_BTW = functional.pad(self._read(ids_BT, real_BT), (0, 0, 1, 0))  # before the first token, zeros
        places_T = torch.arange(1, real_BT.shape[1] + 1, device=real_BT.device)
        last_B = functional.pad(real_BT * places_T, (1, 0)).amax(1).long()
        mean_BW = means_BTW[torch.arange(len(last_B), device=last_B.device), last_B]
        return self._heads(self._state(mean_BW))

    def log_probabilities(self, logits: RouterLogits) -> torch.Tensor:
        """Log p of each expert, float32 [B, E]."""
        return product(logits.main_BN, logits.sub_BE, self.options.branch_of())

    def _real(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        real_BT = ids_BT.new_ones(ids_BT.shape[:2]) if mask_BT is None else mask_BT != 0
        return real_BT.to(self.bias.device, torch.float32)

    def _read(self, ids_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        """The running mean, float32 [B, T, W]."""
        with torch.autocast(real_BT.device.type, enabled=False):
            parts = [self._embedded(part) for part in ids_BT.split(CHUNK, 1)]
            U_BTW = torch.cat(parts, 1) * real_BT[..., None]
            A_BTW = U_BTW
            for back in range(TAPS):
                before_BTW = functional.pad(U_BTW, (0, 0, back, 0))[:, : U_BTW.shape[1]]
                A_BTW = A_BTW + self.mix[back].float() * before_BTW
            A_BTW = functional.gelu(A_BTW) * real_BT[..., None]
            return A_BTW.cumsum(1) / real_BT.cumsum(1).clamp(min=1)[..., None]

    def _embedded(self, ids_BT: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            given = ids_BT.is_floating_point()
            X_BTH = ids_BT if given else self._base[0].get_input_embeddings()(ids_BT)
            X_BTH = _normalised(X_BTH.detach().to(self.bias.device).float(), TINY)
        embedded: torch.Tensor = self.embed(X_BTH)
        return embedded

    def _state(self, mean_W: torch.Tensor) -> torch.Tensor:
        with torch.autocast(mean_W.device.type, enabled=False):
            hidden = functional.gelu(self.up(_normalised(mean_W, SMALL)))
            return _normalised(mean_W + self.down(hidden), SMALL)

    def _heads(self, state_BW: torch.Tensor) -> RouterLogits:
        with torch.autocast(state_BW.device.type, enabled=False):
            return RouterLogits(self.main(state_BW), self.sub(state_BW))

    # From logits to gates

    def choose(
        self,
        logits: RouterLogits,
        k: int | torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
        capacity: float | None = None,
    ) -> Choice:
        """The best experts of each sample by ``log p + bias``, of equal ones the lower number.

        Parameters
        ----------
        logits : RouterLogits
        k : int or int64 [B], optional
            Experts per sample, as many as there are if more; None is as the options say.
        noise : float32 [B, E], optional
            Added for the choice.
        dropped : bool [E], optional
            Experts that are not to choose from now; shared ones stay on.
        capacity : float, optional
            No expert for more samples than so many times the even load; see `limit_load`.

        Returns
        -------
        Choice
            Every gate has a gradient, chosen or not; see `slopes`.

        Raises
        ------
        ValueError
            A negative k, or one for another number of samples.
        """
        log_p_BE = self.log_probabilities(logits)
        shared_E = torch.zeros_like(self.bias, dtype=torch.bool)
        shared_E[list(self.options.shared)] = True
        free_E = ~shared_E if dropped is None else ~(shared_E | dropped.to(shared_E.device))
        scores_BE = log_p_BE.detach() + self.bias.float()
        scores_BE = scores_BE if noise is None else scores_BE + noise.to(scores_BE.device)
        scores_BE = torch.where(free_E, scores_BE, -torch.inf)
        k_B = counts(self.top_k if k is None else k, scores_BE)
        chosen_BE = select(scores_BE, k_B) if capacity is None else limit_load(scores_BE, k_B, capacity)
        active_BE = chosen_BE | shared_E
        q_BE = slopes(scores_BE, log_p_BE, k_B)
        gates_BE = active_BE + (q_BE - q_BE.detach())
        return Choice(gates_BE, active_BE, log_p_BE.exp(), logits)

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Gates of each prompt, float32 [B, E]; without gradients.

        `input_ids` may be embeddings instead, float [B, T, H].
        """
        return self.choose(self.logits(input_ids, attention_mask)).gates_BE

    @torch.no_grad()
    def update_bias(self, load_E: torch.Tensor, rate: float) -> None:
        """Make experts with little load more likely to be chosen: ``bias += rate * sign(mean(load) - load)``.

        Auxiliary-loss-free balance (Wang et al. 2024, arXiv:2408.15664, algorithm 1). Shared experts stay out of it.

        Parameters
        ----------
        load_E : [E]
            Samples that each expert was on for, of all workers.
        rate : float
        """
        free = [expert for expert in range(self.options.experts) if expert not in self.options.shared]
        load = load_E.to(self.bias.device, torch.float64)[free]
        if len(free):
            self.bias[free] += rate * torch.sign(load.mean() - load).to(self.bias.dtype)


def _normalised(X: torch.Tensor, least: float) -> torch.Tensor:
    """Root mean square 1 over the last dimension; zeros stay zeros."""
    return X * torch.rsqrt(X.square().mean(-1, keepdim=True) + least)


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
