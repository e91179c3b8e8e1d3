"""Gradients held to a limit, and those that stand out named."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clipped:
    """What became of the gradients.

    Attributes
    ----------
    norm : float
        Before clipping; nan or inf if any gradient is.
    scale : float
        That all gradients were multiplied by, 1 if they were within the limit.
    """

    norm: float
    scale: float

    @property
    def finite(self) -> bool:
        """Whether every gradient is a number."""
        return self.norm < float("inf")


def clip_gradients(parameters: Iterable[torch.Tensor], limit: float | None) -> Clipped:
    """Scale gradients together, in place, so that their joint norm is at most `limit`.

    Pascanu et al. 2013, algorithm 1. The norm is summed in float64, in the order of the parameters, so that it neither
    overflows nor depends on their sizes.

    Parameters
    ----------
    parameters : iterable of tensor
        Those without ``grad`` are passed over.
    limit : float, optional
        None measures only.

    Returns
    -------
    Clipped
        If the norm is not finite, the gradients are left as they are: see `first_non_finite`.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return Clipped(0.0, 1.0)
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
    norm = float(torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms])))
    if limit is None or not limit < norm < float("inf"):
        return Clipped(norm, 1.0)
    scale = limit / norm
    for grad in grads:
        grad.mul_(scale)
    return Clipped(norm, scale)


def first_non_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first parameter whose gradient is not finite; None if there is none."""
    for name, parameter in named:
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return name
    return None


class SpikeWatch:
    """Tells norms (or losses) that stand out from the last ones.

    Parameters
    ----------
    factor : float
        A spike is above `factor` times the median of the window.
    window : int
        Values looked back on; while there are fewer than a quarter of it, nothing is a spike.
    """

    def __init__(self, factor: float = 10.0, window: int = 64) -> None:
        self.factor, self.window = factor, window
        self._last: deque[float] = deque(maxlen=window)

    def observe(self, value: float) -> bool:
        """Whether the value is a spike; it joins the window in any case, unless it is not finite (always a spike)."""
        if not abs(value) < float("inf"):
            return True
        ready = len(self._last) >= max(1, self.window // 4)
        spike = ready and value > self.factor * statistics.median(self._last)
        self._last.append(value)
        return spike

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {"last": torch.tensor(list(self._last), dtype=torch.float64)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint."""
        self._last = deque(state["last"].tolist(), maxlen=self.window)
