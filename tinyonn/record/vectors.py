"""Norms and biases: small, many, and therefore recorded together.

Their gradients and inputs are gathered during a sample and added in one go at its end, to sums that lie side by side.
`act` and `freq` are summed per weight as `grad` is, since a vector has as many inputs as weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit

from tinyonn.record.device import on_host
from tinyonn.record.levels import FLOAT32_SHIFT, LEVELS
from tinyonn.record.sites import Site, weight_of


class VectorSums:
    """uint8 sums of all open vectors, in one piece.

    Parameters
    ----------
    sites : sequence of Site
        Vectors with their calibration set; their sums become views of this object's.
    device : torch.device
    """

    def __init__(self, sites: Sequence[Site], device: torch.device) -> None:
        self.sites = sites
        sizes = [site.parameter.size for site in sites]
        self._sums = torch.zeros((3, sum(sizes)), dtype=torch.uint8, device=device)
        for site, sums in zip(sites, self._sums.split(sizes, dim=1), strict=True):
            site.act, site.grad, site.freq = (part[None] for part in sums)
        calibration = [site.calibration for site in sites]
        assert all(calibration)
        known = [(c.act_base, c.grad_base, 2.0 ** (c.freq_threshold / 8)) for c in calibration if c]
        table = np.array(known, dtype=np.float32).reshape(-1, 3).T
        self._known = torch.from_numpy(np.repeat(table, sizes, axis=1)).to(device)  # [3, weights]
        weights = [weight_of(site.uses[0]).detach().abs().float().reshape(-1) for site in sites]
        self._weights = torch.cat(weights) if weights else torch.zeros(0, device=device)
        self._gradients: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}

    def clear(self) -> None:
        """Forget what was gathered of a sample."""
        self._gradients.clear()
        self._squares.clear()

    def gather(self, name: str, gradient: torch.Tensor, square: torch.Tensor) -> None:
        """Keep a vector's gradient and the mean square of its inputs, float32 [n], until `add`."""
        self._gradients[name], self._squares[name] = gradient, square

    def add(self) -> bool | torch.Tensor:
        """Add the sample that was gathered; returns whether all of it was finite."""
        if not self.sites:
            return True
        names = [site.parameter.name for site in self.sites]
        gradients = torch.cat([self._gradients[name] for name in names])
        values = torch.cat([self._squares[name] for name in names]).sqrt_().mul_(self._weights)
        self.clear()
        if on_host(gradients):
            known, sums = self._known.numpy(), self._sums.numpy()
            return bool(_add(values.numpy(), gradients.numpy(), known, sums))
        act_base, grad_base, threshold = self._known
        self._sums[0] += _levels(values, act_base)
        self._sums[1] += _levels(gradients, grad_base)
        self._sums[2] += (values > threshold).to(torch.uint8)
        return torch.isfinite(values).all() & torch.isfinite(gradients).all()


def _levels(values: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    bits = values.abs().view(torch.int32) >> FLOAT32_SHIFT
    return (bits - base.to(torch.int32)).clamp_(0, LEVELS - 1).to(torch.uint8)


@njit(nogil=True, cache=True)
def _add(values: Any, gradients: Any, known: Any, sums: Any) -> bool:
    value_bits, gradient_bits = values.view(np.int32), gradients.view(np.int32)
    finite = True
    for i in range(values.size):
        act = (value_bits[i] & 0x7FFFFFFF) >> 22
        grad = (gradient_bits[i] & 0x7FFFFFFF) >> 22
        finite &= act < 510 and grad < 510
        sums[0, i] += np.uint8(min(max(act - int(known[0, i]), 0), 15))
        sums[1, i] += np.uint8(min(max(grad - int(known[1, i]), 0), 15))
        sums[2, i] += np.uint8(values[i] > known[2, i])
    return finite
