"""Held-out loss: the mean negative log-likelihood of the labelled tokens, slice by slice.

For a slice with labelled tokens t, ``loss = -1/n Σ_t ln p(token_t | tokens before it)``, in nats; its perplexity is
``exp(loss)``. Over several slices the mean of their losses counts, each slice once however many tokens it has, and the
perplexity is ``exp`` of that mean. Samples of like lengths run in one batch, padded at the end: in a causal model no
token sees what stands behind it.

Where experts are chosen from a sample's prompt (`evaluate_routed`), gates hold for the whole sample and what counts
are the labelled tokens after the prompt, so that the choice has seen none of them. Models without a router are then
measured on exactly these tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from tinyonn.corpus.file import Sample
from tinyonn.corpus.tokens import UNLABELLED
from tinyonn.dense.head import head_of
from tinyonn.dense.passes import decoder_states
from tinyonn.errors import InputError
from tinyonn.train.data import Batch as PromptedBatch

BATCH_TOKENS = 2048  # of a batch, padding counted; larger ones leave the caches
HEAD_BYTES = 64 << 20  # of logits held at a time, in float32


@dataclass(frozen=True)
class Losses:
    """Loss by slice.

    Attributes
    ----------
    by_slice : dict of str to float
        Nats per labelled token.
    tokens : dict of str to int
        Labelled tokens that each is the mean of.
    documents : dict of str to list of [float, int]
        By slice of every sample its nats together and its labelled tokens, in the order of the batches; may be empty.
    """

    by_slice: dict[str, float]
    tokens: dict[str, int]
    documents: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean over the slices, nats."""
        return math.fsum(self.by_slice.values()) / len(self.by_slice)

    @property
    def perplexity(self) -> float:
        """Of the mean; infinite beyond what a float holds."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


@dataclass(frozen=True)
class Batch:
    """Padded samples: `ids_BT` int64, `labels_BT` int64 with -100 where nothing is labelled, slice of each row."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    slices: tuple[str, ...]


def batches_of(samples: Sequence[Sample], tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Put samples of like lengths together; the same batches for the same samples in any order."""
    usable = [sample for sample in samples if (sample.labels[1:] != -100).any()]
    if not usable:
        raise InputError(
            f"none of the {len(samples)} samples has a labelled token to predict; give evaluate.data longer texts"
        )
    groups: list[list[Sample]] = []
    for sample in sorted(usable, key=lambda sample: (-sample.input_ids.size, sample.slice, sample.index)):
        full = not groups or (len(groups[-1]) + 1) * groups[-1][0].input_ids.size > tokens
        if full:
            groups.append([])
        groups[-1].append(sample)
    return [_batch(group) for group in groups]


def _batch(group: list[Sample]) -> Batch:
    longest = group[0].input_ids.size
    ids = np.zeros((len(group), longest), np.int64)
    labels = np.full((len(group), longest), -100, np.int64)
    for row, sample in enumerate(group):
        ids[row, : sample.input_ids.size] = sample.input_ids
        labels[row, : sample.labels.size] = sample.labels
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), tuple(sample.slice for sample in group))


@torch.inference_mode()
def losses(model: Any, batches: Iterable[Batch]) -> Losses:
    """Loss of a model on every slice.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Causal, dense.
    batches : iterable of Batch
        From `batches_of`.

    Returns
    -------
    Losses
        A loss that is not finite comes out as it is.
    """
    head = head_of(model)
    device = head.weight.device
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    documents: dict[str, list[list[float]]] = {}
    for batch in batches:
        names = sorted(set(batch.slices))
        places = torch.tensor([names.index(name) for name in batch.slices])
        hidden = model.base_model(input_ids=batch.ids_BT.to(device), use_cache=False).last_hidden_state
        wanted = batch.labels_BT[:, 1:] != -100
        of_token = places[:, None].expand_as(wanted)[wanted]
        found = token_losses(head, hidden[:, :-1], batch.labels_BT[:, 1:]).cpu()
        for number, name in enumerate(names):
            own = found[of_token == number]
            sums[name] = sums.get(name, 0.0) + float(own.double().sum())
            counts[name] = counts.get(name, 0) + own.numel()
        tokens_B = wanted.sum(1).tolist()
        for name, losses_T in zip(batch.slices, found.double().split(tokens_B), strict=True):
            documents.setdefault(name, []).append([float(losses_T.sum()), losses_T.numel()])
    order = sorted(sums)
    return Losses(
        {name: sums[name] / counts[name] for name in order},
        {name: counts[name] for name in order},
        {name: documents[name] for name in order},
    )


def token_losses(head: Any, hidden_BTH: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Loss of every labelled token, float32 [labelled], row by row; logits come and go in chunks of tokens.

    Parameters
    ----------
    head : Head, or another callable with a weight [vocabulary, H]
    hidden_BTH : Tensor [B, T, H]
        What predicts the label at the same place.
    labels_BT : int64 [B, T]
    """
    labels = labels_BT.to(hidden_BTH.device)
    wanted = labels != -100
    hidden, labels = hidden_BTH[wanted], labels[wanted]
    chunk = max(16, HEAD_BYTES // (4 * head.weight.shape[0]))
    parts = [
        torch.nn.functional.cross_entropy(head(some).float(), label, reduction="none")
        for some, label in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


Experts = int | Literal["all"] | None


@torch.no_grad()
def evaluate_routed(
    model: Any,
    batches: Iterable[PromptedBatch],
    k: Experts = None,
    slice_gates: Mapping[str, torch.Tensor] | None = None,
) -> Losses:
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
    slice_gates : mapping of str to float32 [E], optional
        Gates of every slice's samples, in place of those that would be chosen.

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
        if slice_gates is None:
            gates = gates_of(model, own, k)
        else:
            gates = torch.stack([slice_gates[name] for name in batch.slices]).to(device)
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


def gates_of(model: Any, batch: PromptedBatch, k: Experts = None) -> torch.Tensor | None:
    """Gates of every sample, float32 [B, E] (or [E] for all); None for a model without experts, or its own rule."""
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
