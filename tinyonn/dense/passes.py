"""Passes of the dense model: with the token-mean loss of a sample, and what meets on the way.

The head is run apart from the decoder and only on the labelled tokens, so that the logits of a long sample with a
large vocabulary are never held whole: they come and go in chunks of tokens. Nothing here waits for a GPU.

A module's input X and the gradient G of its output meet in the backward pass, in a tap: an autograd function behind the
module's output. It saves the input with the graph's own saved tensors, so that gradient checkpointing recomputes it and
nothing is kept twice, and in the backward pass it has X and G in hand.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from tinyonn.dense.head import REMEDY, Head, head_of
from tinyonn.dense.parameters import Use, looked_up
from tinyonn.errors import InputError

OnBackward = Callable[[torch.Tensor, torch.Tensor], None]
Meeting = tuple[Use, torch.Tensor, torch.Tensor]  # a use of a tensor, X and G [tokens, out] of its module
CHUNK_BYTES = 256 << 20  # of logits and their gradients
VALUE_BYTES = 14  # a logit, in the dtype of the head, in float32, and their gradients
FORM_BYTES = 16  # the same of a scaled or capped one's steps


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, X: torch.Tensor, on_backward: OnBackward) -> torch.Tensor:
        ctx.save_for_backward(X)
        ctx.on_backward = on_backward
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (X,) = ctx.saved_tensors
        ctx.on_backward(
            X.detach().reshape(-1, X.shape[-1]) if X.is_floating_point() else X.reshape(-1), gradients[0]
        )
        return gradients[0], None, None


def attach(module: torch.nn.Module, on_backward: OnBackward, is_active: Callable[[], bool]) -> Any:
    """Put a tap behind a module.

    Parameters
    ----------
    module : torch.nn.Module
        Takes one tensor first: activations [..., I]; an embedding takes what its rows come from.
    on_backward : callable
        Called once per use in the backward pass with X [T, I] (or ids [T]) and the gradient G of the output.
    is_active : callable
        Asked at every forward pass; a module that is not active is left alone.

    Returns
    -------
    A handle whose ``remove()`` takes the tap away.
    """
    is_embedding = isinstance(module, torch.nn.Embedding)

    def hook(
        _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], options: dict[str, Any], out: torch.Tensor
    ) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if not out.requires_grad:  # the embeddings, with all weights frozen: gradients start here
            out = out.detach().requires_grad_()
        if not is_active():
            return out
        X = looked_up(module, inputs, options) if is_embedding else inputs[0]
        tapped: torch.Tensor = _Tap.apply(out, X.detach(), on_backward)  # type: ignore[no-untyped-call]
        return tapped

    return module.register_forward_hook(hook, with_kwargs=True)


class Taps:
    """Behind every module whose tensors are asked for: what a use of a tensor met is fed at once, or kept in `late`.

    Parameters
    ----------
    uses : mapping of str to list of Use
        By tensor.
    head : torch.nn.Module
        Its tokens come in chunks, so that what it met is late, as for tensors of several modules.
    feed : callable
        Takes a use, X and G [tokens, out].
    active : callable
        Whether a tensor, by its name, is asked for now.
    done : str
        What cannot be done with a model that calls a module twice: ``recorded``.

    Attributes
    ----------
    late : dict of str to list of (Use, X, G)
        By tensor, since `clear`.
    """

    def __init__(
        self,
        uses: Mapping[str, list[Use]],
        head: torch.nn.Module,
        feed: Callable[[Use, torch.Tensor, torch.Tensor], None],
        active: Callable[[str], bool],
        done: str,
    ) -> None:
        self.late: dict[str, list[Meeting]] = defaultdict(list)
        self._uses, self._head, self._feed, self._active, self._done = uses, head, feed, active, done
        self._seen: set[tuple[str, str]] = set()
        modules: dict[str, list[Use]] = defaultdict(list)
        for own in uses.values():
            for use in own:
                modules[use.module_name].append(use)
        for own in modules.values():
            names = {use.parameter_name for use in own}
            attach(own[0].module, partial(self._meet, own), partial(self._any_active, names))

    def clear(self) -> None:
        """Begin a new sample."""
        self.late.clear()
        self._seen.clear()

    def _any_active(self, names: set[str]) -> bool:
        return any(self._active(name) for name in names)

    def _meet(self, uses: list[Use], X: torch.Tensor, G: torch.Tensor) -> None:
        """X and G of a module have met."""
        G = G.detach()
        G_TO = G.reshape(-1, G.shape[-1])
        for use in uses:
            name = use.parameter_name
            if not self._active(name):
                continue
            if len(self._uses[name]) > 1 or use.module is self._head:
                self.late[name].append((use, X, G_TO))
                continue
            if (name, use.module_name) in self._seen:
                raise InputError(
                    f"{use.module_name} is called more than once in a forward pass, which cannot be {self._done}; "
                    "the model's code must call each module once"
                )
            self._seen.add((name, use.module_name))
            self._feed(use, X, G_TO)


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
    options: Any = torch.utils.deterministic
    filled, options.fill_uninitialized_memory = options.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        options.fill_uninitialized_memory = filled


def head_backward(head: Head, hidden: torch.Tensor, sample: Labelled) -> torch.Tensor:
    """Loss of a sample, and its gradient on what the head reads."""
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
    # The first token's, by its number: of a slice Torch would multiply a copy of the whole head for every sample.
    first = torch.zeros(1, dtype=torch.int64, device=ids_BT.device)
    options |= {"input_ids": ids_BT, "use_cache": False, "logits_to_keep": first}
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
