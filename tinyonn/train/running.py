"""Running means, as plain tensors that a checkpoint keeps."""

from __future__ import annotations

import torch


class RunningMean:
    """Exponential mean of one or more numbers, each over the times that it was seen.

    m <- decay * m + (1 - decay) * x,  w <- decay * w + (1 - decay),  mean = m / w  (as Adam corrects its moments)

    Parameters
    ----------
    size : int
        Numbers.
    decay : float
        0..1; the mean looks back over some 1 / (1 - decay) values.
    """

    def __init__(self, size: int = 1, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of a running mean is {decay}; it lies from 0 to below 1")
        self.decay = decay
        self.moments = torch.zeros(size, dtype=torch.float64)
        self.weights = torch.zeros(size, dtype=torch.float64)

    def update(self, values: torch.Tensor | float, seen: torch.Tensor | None = None) -> None:
        """Take in new values; those that are not finite, or not `seen` (bool [size]), leave their mean alone."""
        new = torch.as_tensor(values, dtype=torch.float64).detach().cpu().reshape(-1)
        taken = new.isfinite() if seen is None else new.isfinite() & seen.cpu()
        step = torch.where(taken, 1 - self.decay, 0.0)
        self.moments += step * (torch.where(taken, new, 0.0) - self.moments)
        self.weights += step * (1 - self.weights)

    @property
    def mean(self) -> torch.Tensor:
        """Float64 [size]; nan where nothing was seen."""
        return self.moments / self.weights

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {"moments": self.moments.clone(), "weights": self.weights.clone()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        ValueError
            Of another number of values.
        """
        for name in ("moments", "weights"):
            if state[name].shape != self.moments.shape:
                raise ValueError(
                    f"a running mean of {state[name].numel()} values does not fit {self.moments.numel()}"
                )
        self.moments = state["moments"].to(torch.float64).clone()
        self.weights = state["weights"].to(torch.float64).clone()
