"""Gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tinyonn.train.losses import Sum


def agrees_with_differences(loss: Callable[[torch.Tensor], Sum], at: torch.Tensor) -> None:
    """The gradient of a loss's mean is its central difference, coordinate by coordinate, to 1e-7."""
    point = at.clone().requires_grad_()
    mean = loss(point).mean
    assert mean.dtype == torch.float64
    mean.backward()
    assert point.grad is not None
    step, moved = 1e-5, at.flatten()
    for place in range(moved.numel()):
        low, high = moved.clone(), moved.clone()
        low[place] -= step
        high[place] += step
        slope = (loss(high.view_as(at)).mean - loss(low.view_as(at)).mean) / (2 * step)
        assert float(point.grad.flatten()[place]) == pytest.approx(float(slope), rel=1e-6, abs=1e-8)
