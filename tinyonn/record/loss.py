"""The token-mean loss of a sample, with the head run apart from the decoder and only on the labelled tokens.

So the logits of a long sample with a large vocabulary are never held whole: they come and go in chunks of tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tinyonn.base.corpus_file import Sample
from tinyonn.errors import InputError

CHUNK_BYTES = 256 << 20  # of logits and their gradients, 14 bytes a value


def head_backward(head: Any, hidden: torch.Tensor, sample: Sample) -> float:
    """Loss of a sample, and its gradient on the hidden states.

    Parameters
    ----------
    head : torch.nn.Module
        The output embeddings, [H] -> [vocabulary].
    hidden : [1, T, H]
        A leaf that requires a gradient; its ``grad`` is filled.
    sample : Sample

    Returns
    -------
    float
        Mean cross entropy of the labelled tokens, in nats.
    """
    labels = torch.from_numpy(sample.labels[1:].astype(np.int64)).to(hidden.device)
    labelled = (labels != -100).nonzero().squeeze(1)
    chunk = max(16, CHUNK_BYTES // (14 * head.weight.shape[0]))
    total = 0.0
    for part in labelled.split(chunk):
        logits = head(hidden[:, part])[0].float()
        loss = torch.nn.functional.cross_entropy(logits, labels[part], reduction="sum") / labelled.numel()
        loss.backward()
        total += float(loss.detach())
    return total


def check_head(model: Any) -> None:
    """Check that a model's logits are its head's output.

    Raises
    ------
    InputError
        They are changed afterwards, which the recorder would miss.
    """
    head, decoder = model.get_output_embeddings(), model.base_model
    ids = torch.arange(4, device=head.weight.device)[None]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits.float()
        parts = head(decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        raise InputError(
            f"{type(model).__name__} changes its logits after the head (soft-capping or scaling), which cannot be "
            "recorded; use a model whose logits are the head's output"
        )
