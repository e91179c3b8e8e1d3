"""Held-out loss of models whose experts are chosen from a sample's prompt, and of all others on the same tokens.

Gates are chosen from the prompt and hold for the whole sample; what counts are the labelled tokens after the prompt, so
that the choice has seen none of them. Models without a router are measured on exactly these tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from tinyonn.corpus.tokens import UNLABELLED
from tinyonn.dense.head import head_of
from tinyonn.dense.passes import decoder_states
from tinyonn.errors import InputError
from tinyonn.evaluate.perplexity import Losses, token_losses
from tinyonn.train.data import Batch

Experts = int | Literal["all"] | None


@torch.no_grad()
def evaluate_routed(model: Any, batches: Iterable[Batch], k: Experts = None) -> Losses:
    """Loss of a model on every slice, on the labelled tokens after the prompts.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Sparse with a router, sparse without one, or any other causal language model. One that is being trained, its
        weights in float32 beside a bfloat16 trunk, runs in bfloat16.
    batches : iterable of Batch
        From `tinyonn.train.data.held_out_batches`.
    k : int, "all" or None
        Experts on for each sample; None is as the model is set. Without a router those of the largest prior.

    Returns
    -------
    Losses
        A loss that is not finite comes out as it is.

    Raises
    ------
    InputError
        More experts than there are, or experts of a model that has none; no batches.
    """
    head = head_of(model)
    device = head.weight.device
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in batches:
        own = batch.to(device)
        gates = gates_of(model, own, k)
        targets_BT = own.targets()
        options = {} if gates is None else {"gates": gates}
        with _computing(model, device):
            (hidden_BTH,) = decoder_states(model, own.ids_BT, layers=False, **options)
            found = token_losses(head, hidden_BTH[:, :-1], targets_BT).double().cpu()
        tokens_B = (targets_BT != UNLABELLED).sum(1).tolist()
        for name, losses_T in zip(batch.slices, found.split(tokens_B), strict=True):
            sums[name] = sums.get(name, 0.0) + float(losses_T.sum())
            counts[name] = counts.get(name, 0) + losses_T.numel()
    order = sorted(name for name in sums if counts[name])
    if not order:
        raise InputError("no labelled token after any prompt; give longer texts, or a smaller prompt_tokens")
    return Losses({name: sums[name] / counts[name] for name in order}, {name: counts[name] for name in order})


def gates_of(model: Any, batch: Batch, k: Experts = None) -> torch.Tensor | None:
    """Gates of every sample, float32 [B, E] (or [E] for all); None for a model without experts, or its own rule.

    Parameters
    ----------
    model, k
        As of `evaluate_routed`.
    batch : Batch
        On the model's device.
    """
    if not hasattr(model, "sparse_layers"):
        if k is not None:
            raise InputError(f"k = {k!r} but {type(model).__name__} has no experts; leave k out")
        return None
    experts = int(model.config.experts)
    if isinstance(k, int) and not 0 <= k <= experts:
        raise InputError(f"k = {k}; from 0 to {experts} experts can be on")
    if k == "all":
        return torch.ones(experts, device=batch.ids_BT.device)
    if model.router is None:
        if k is None:
            return None
        prior = model.config.expert_prior
        gates_E = torch.zeros(experts, device=batch.ids_BT.device)
        gates_E[sorted(range(experts), key=lambda expert: (-prior[expert], expert))[:k]] = 1
        return gates_E
    choice = model.router.choose(model.router.logits(*batch.prompt()), k)
    gates_BE: torch.Tensor = choice.gates_BE.detach()
    return gates_BE


def _computing(model: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast for a model of several dtypes, as one in training is."""
    kinds = {
        parameter.dtype for name, parameter in model.named_parameters() if "router" not in name.split(".")
    }
    return nullcontext() if len(kinds) == 1 else torch.autocast(device.type, torch.bfloat16)
