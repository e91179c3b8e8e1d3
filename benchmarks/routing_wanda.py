"""Masks by Wanda for each prompt: the mu-MoE of Koike-Akino et al. (2025), https://arxiv.org/abs/2505.18451.

Every linear layer keeps in each row the weights of the highest |W| times the norm of their input over the prompt's
tokens, and computes the whole sample with them. The next layer sees the cut one's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tinyonn.corpus.tokens import UNLABELLED
from tinyonn.dense.head import head_of
from tinyonn.dense.passes import decoder_states
from tinyonn.errors import InputError
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.loss import Losses, token_losses
from tinyonn.train.data import Batch


@torch.no_grad()
def evaluate_prompt_masks(
    dense: DenseWeights, batches: Sequence[Batch], shares: Mapping[str, float]
) -> Losses:
    """Held-out loss on the tokens after the prompts.

    Parameters
    ----------
    dense : DenseWeights
    batches : sequence of Batch
    shares : mapping of str to float
        Of every tensor: what it keeps in each row.
    """
    if dense.transposed:
        raise InputError(f"{min(dense.transposed)} has a row for each input, which these masks do not know")
    head = head_of(dense.model)
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in batches:
        for row, name in enumerate(batch.slices):
            sample = batch.rows([row])
            targets_BT = sample.targets()
            with _masking(dense, shares, int(sample.prompts_B[0])):
                (hidden_BTH,) = decoder_states(dense.model, sample.ids_BT, layers=False)
            found = token_losses(head, hidden_BTH[:, :-1], targets_BT).double()
            sums[name] = sums.get(name, 0.0) + float(found.sum())
            counts[name] = counts.get(name, 0) + int((targets_BT != UNLABELLED).sum())
    return Losses({name: sums[name] / counts[name] for name in sorted(sums)}, dict(sorted(counts.items())))


@contextmanager
def _masking(dense: DenseWeights, shares: Mapping[str, float], prompt: int) -> Iterator[None]:
    """Layers cut themselves as their input comes, and are whole again afterwards."""
    handles: list[Any] = []
    whole: dict[str, torch.Tensor] = {}

    def cut(name: str) -> Any:
        def before(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            weight = module.get_parameter("weight")
            whole[name] = weight.data
            norm_I = inputs[0].reshape(-1, inputs[0].shape[-1])[:prompt].float().norm(dim=0)
            weight.data = weight.data * row_mask(weight.data.float().abs() * norm_I, shares[name])

        def after(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            module.get_parameter("weight").data = whole.pop(name)

        return before, after

    try:
        for parameter in dense.parameters:
            module = dense.module(parameter.name)
            before, after = cut(parameter.name)
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in whole.items():
            dense.module(name).get_parameter("weight").data = weight


def row_mask(score_OI: torch.Tensor, share: float) -> torch.Tensor:
    """The highest of every row: so many in all as the share says, one more in the first rows; bool [O, I]."""
    out, inputs = score_OI.shape
    kept = min(out * inputs, round(share * out * inputs))
    order_OI = score_OI.argsort(dim=1, descending=True, stable=True)
    counts_O = torch.full((out,), kept // out)
    counts_O[: kept % out] += 1
    among_OI = torch.arange(inputs) < counts_O[:, None]
    return torch.zeros_like(score_OI, dtype=torch.bool).scatter(1, order_OI, among_OI)
