"""How far hidden states are from a teacher's, token by token: |s - t|^2 / |t|^2, with gradient 2 (s - t) / |t|^2.

Autograd would keep s - t in float32 for every layer until the backward pass; here it is made again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

SMALLEST = 1e-30  # a squared norm below it counts as this one


def relative_squares(s_BTH: torch.Tensor, t_BTH: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Squared distance by squared norm of every token.

    Parameters
    ----------
    s_BTH, t_BTH : float [B, T, H]
        The student's, and the teacher's, which gets no gradient.
    mask_BT : bool [B, T]
        Others are 0 and get a gradient of 0, even where they are not finite.

    Returns
    -------
    float32 [B, T], float64 for float64 states
    """
    ratios: torch.Tensor = _RelativeSquare.apply(s_BTH, t_BTH, mask_BT)  # type: ignore[no-untyped-call]
    return ratios


class _RelativeSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(s, t, mask)
        exact = torch.promote_types(s.dtype, torch.float32)
        wide = t.to(exact)
        ratio = (s.to(exact) - wide).square().sum(-1) / _squares(wide)
        return ratio.masked_fill(~mask, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        s, t, mask = ctx.saved_tensors
        wide = t.to(grad.dtype)
        scale = (2 * grad / _squares(wide)).unsqueeze(-1)
        return (
            ((s.to(grad.dtype) - wide) * scale).masked_fill_(~mask.unsqueeze(-1), 0).to(s.dtype),
            None,
            None,
        )


def _squares(wide: torch.Tensor) -> torch.Tensor:
    return wide.square().sum(-1).clamp(min=SMALLEST)
