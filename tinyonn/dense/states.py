"""Hidden states of any causal language model, without the logits of tokens that nobody asks for."""

from __future__ import annotations

from typing import Any

import torch


def decoder_states(
    model: Any, ids_BT: torch.Tensor, layers: bool = True, **options: Any
) -> tuple[torch.Tensor, ...]:
    """What the layers put out, the last of them normed, as the head reads it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, sparse or not. Run as a whole, so that gates apply, with the logits of one token.
    ids_BT : int64 [B, T]
    layers : bool
        Give all layers; else the last alone, and the others are not kept.
    **options
        Of the model's forward pass, such as gates.

    Returns
    -------
    tuple of Tensor [B, T, H]
    """
    options |= {"input_ids": ids_BT, "use_cache": False, "logits_to_keep": 1}
    if layers:
        hidden: tuple[torch.Tensor, ...] = model(output_hidden_states=True, **options).hidden_states[1:]
        return hidden
    seen: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    try:
        model(**options)
    finally:
        hook.remove()
    return (seen[-1],)
