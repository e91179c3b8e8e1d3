"""Taps: a module's input X and the gradient G of its output, met in the backward pass.

A tap is an autograd function behind a module's output. It saves the input with the graph's own saved tensors, so that
gradient checkpointing recomputes it and nothing is kept twice, and in the backward pass it has X and G in hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tinyonn.dense.parameters import looked_up

OnBackward = Callable[[torch.Tensor, torch.Tensor], None]


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
