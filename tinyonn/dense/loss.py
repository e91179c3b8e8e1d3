"""One forward and one backward pass of the dense model, with the token-mean loss of a sample.

The head is run apart from the decoder and only on the labelled tokens, so that the logits of a long sample with a
large vocabulary are never held whole: they come and go in chunks of tokens. Nothing here waits for a GPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from tinyonn.dense.head import REMEDY, Head, head_of
from tinyonn.errors import InputError

CHUNK_BYTES = 256 << 20  # of logits and their gradients
VALUE_BYTES = 14  # a logit, in the dtype of the head, in float32, and their gradients
FORM_BYTES = 16  # the same of a scaled or capped one's steps


class Labelled(Protocol):
    """A sample: token ids and labels, both int32 [tokens], -100 where nothing is to be predicted."""

    @property
    def input_ids(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """What is read."""

    @property
    def labels(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """What is to be predicted."""


def forward_backward(
    decoder: Any, head: Head, sample: Labelled, on_loss: Callable[[torch.Tensor], None] = lambda loss: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a sample; taps behind the modules meet inputs and gradients on the way.

    Parameters
    ----------
    decoder : torch.nn.Module
        Of a causal language model.
    head : Head
    sample : Labelled
    on_loss : callable
        Called with the loss before the decoder's backward pass.

    Returns
    -------
    loss : float64 []
        Mean cross entropy of the labelled tokens, in nats; on the device.
    hidden_TH : [T, H]
        What the head reads, all tokens.
    """
    device = head.weight.device
    ids = torch.from_numpy(sample.input_ids.astype(np.int64)).to(device, non_blocking=True)[None]
    with torch.enable_grad(), repeatable(device):
        hidden = head.read(decoder(input_ids=ids, use_cache=False).last_hidden_state)
        leaf = hidden.detach().requires_grad_()
        loss = head_backward(head, leaf, sample)
        on_loss(loss)
        hidden.backward(leaf.grad)
    return loss, leaf.detach()[0]


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU, backward passes of attention that add in a fixed order: the same sample, the same bits."""
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def head_backward(head: Head, hidden: torch.Tensor, sample: Labelled) -> torch.Tensor:
    """Loss of a sample, and its gradient on what the head reads.

    Parameters
    ----------
    head : Head
    hidden : [1, T, H]
        What its output embeddings read: a leaf that requires a gradient; its ``grad`` is filled.
    sample : Labelled

    Returns
    -------
    float64 []
        Mean cross entropy of the labelled tokens, in nats; on the device.
    """
    following = sample.labels[1:].astype(np.int64)
    places = np.flatnonzero(following != -100)
    labels = torch.from_numpy(following[places]).to(hidden.device, non_blocking=True)
    labelled = torch.from_numpy(places).to(hidden.device, non_blocking=True)
    chunk = min(len(places), CHUNK_BYTES // (VALUE_BYTES * head.weight.shape[0]))
    if not head.plain:  # no more bytes than are planned for a plain head
        chunk = chunk * VALUE_BYTES // (VALUE_BYTES + FORM_BYTES)
    chunk = max(16, chunk)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part, wanted in zip(labelled.split(chunk), labels.split(chunk), strict=True):
        logits = head.finish(head.module(hidden[:, part])[0].float())
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / len(places)
        loss.backward()
        total += loss.detach()
    return total


def checked_head(model: Any) -> Head:
    """A loaded model's head, after a check that it and the decoder give the model's own logits.

    Raises
    ------
    InputError
        They do not, so that the recorder would miss something.
    """
    head, decoder = head_of(model), model.base_model
    ids = torch.arange(4, device=head.weight.device)[None]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits.float()
        parts = head(decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        raise InputError(
            f"{type(model).__name__} does something to its logits after its head that cannot be recorded; "
            f"{REMEDY}"
        )
    return head
