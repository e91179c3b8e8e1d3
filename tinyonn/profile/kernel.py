"""One sample's statistics, summed over the weights of each group.

With a weight ``w_ij``, its gradient ``g_ij`` and the rms ``r`` of the input that it meets, a group's sums over its
weights are

- ``act``: levels of ``|w_ij| r``, ``grad``: levels of ``|g_ij|`` (`tinyonn.record.levels`), integers;
- ``contribution``: ``Σ |w_ij g_ij|``, to the first order what the loss would move by if each weight were left out
  alone (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771);
- ``pull``: ``Σ w_ij g_ij``, the gradient of the loss with respect to a gate of 1 on the group; minus that is, to the
  first order, by how much the loss would grow if the group were left out.

Gradients come in bands of rows (`tinyonn.record.gradients.product_bands`) and are gone when the next one comes. The
sums do not depend on chance: on a CPU a band is added row by row, on a GPU in fixed point, where order does not matter.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from tinyonn.plan.profiling import CHUNK
from tinyonn.record.device import on_host
from tinyonn.record.levels import FLOAT32_SHIFT, LEVELS, levels_torch
from tinyonn.store.records import Float64

TABLE = 256  # a uint8 can tell so many groups apart
LANES = 4  # tables that take turns, so that an addition need not wait for the one before

FIXED_BITS = 30  # of a product in fixed point: CHUNK of them add up to less than the 2^53 that a float64 counts exactly
PARALLEL_WEIGHTS = 1 << 17

Int64 = np.ndarray[Any, np.dtype[np.int64]]
Top = int | torch.Tensor  # largest half octave seen, on the host or still on the device


class Totals(NamedTuple):
    """A sample's sums by group.

    Attributes
    ----------
    act, grad : int64 [G]
    contribution, pull : float64 [G]
    """

    act: Int64
    grad: Int64
    contribution: Float64
    pull: Float64


class GroupSums:
    """Sums of one sample, on the gradients' device.

    Parameters
    ----------
    groups : int
        At most 255; numbers from there on are in no group.
    device : torch.device
    pool : Executor, optional
        Takes half of every large band on a second CPU thread; the halves are added in a fixed order.
    """

    def __init__(self, groups: int, device: torch.device, pool: Executor | None = None) -> None:
        self.groups, self._pool = groups, pool
        self._levels = torch.zeros((2, groups), dtype=torch.int64, device=device)  # act, grad
        self._on_host = on_host(self._levels)
        self._sums = torch.zeros((2, groups), dtype=torch.float64, device=device)  # contribution, pull

    def add(
        self,
        W: torch.Tensor,
        D: torch.Tensor,
        group: torch.Tensor,
        rms: torch.Tensor,
        by_row: bool,
        bases: tuple[int, int],
    ) -> Top:
        """Add a band of whole rows.

        Parameters
        ----------
        W, D : float [rows, columns]
            Weights and their gradient.
        group : uint8 [rows, columns]
            Number of each weight's group.
        rms : float32 [rows] or [columns]
            Of the inputs.
        by_row : bool
            Whether inputs belong to rows.
        bases : (int, int)
            Of the levels of act and grad.

        Returns
        -------
        Top
            Largest half octave of the gradients, those in no group too: from 510 on, one was not finite.
        """
        if not self._on_host:
            return self._add_in_chunks(W, D, group, rms, by_row, bases)
        known = W.float().numpy(), D.float().numpy(), group.numpy()
        inputs = rms.numpy()

        def part(first: int, last: int) -> tuple[int, Int64, Float64]:
            levels, sums = np.zeros((2, self.groups), np.int64), np.zeros((2, self.groups))
            here = inputs[first:last] if by_row else inputs
            top = _add(*(array[first:last] for array in known), here, by_row, bases, levels, sums)
            return int(top), levels, sums

        rows = D.shape[0]
        if self._pool is None or D.numel() < PARALLEL_WEIGHTS:
            found = [part(0, rows)]
        else:
            other = self._pool.submit(part, rows // 2, rows)
            found = [part(0, rows // 2), other.result()]
        for _, levels, sums in found:
            self._levels += torch.from_numpy(levels)
            self._sums += torch.from_numpy(sums)
        return max(top for top, _, _ in found)

    def _add_in_chunks(
        self,
        W: torch.Tensor,
        D: torch.Tensor,
        group: torch.Tensor,
        rms: torch.Tensor,
        by_row: bool,
        bases: tuple[int, int],
    ) -> Top:
        height = max(1, CHUNK // D.shape[1])
        tops = []
        for first in range(0, D.shape[0], height):
            rows = slice(first, first + height)
            here = rms[rows, None] if by_row else rms[None, :]
            levels, sums, top = sums_torch(W[rows], D[rows], group[rows], here, bases)
            self._levels += levels[:, : self.groups]
            self._sums += sums[:, : self.groups]
            tops.append(top)
        return torch.stack(tops).max()

    def totals(self) -> Totals:
        """The sums, on the host."""
        act, grad = self._levels.cpu().numpy()
        contribution, pull = self._sums.cpu().numpy()
        return Totals(act, grad, contribution, pull)


def sums_torch(
    W: torch.Tensor, D: torch.Tensor, group: torch.Tensor, rms: torch.Tensor, bases: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A chunk's sums in Torch operations, on any device; the order of additions does not matter.

    Products are rounded to multiples of ``2^-30`` times the power of two above the largest; sums of such multiples are
    exact in float64.

    Parameters
    ----------
    W, D, group
        As of `GroupSums.add`, at most ``CHUNK`` weights.
    rms : float32, broadcast to their shape
    bases : (int, int)

    Returns
    -------
    levels : int64 [2, 256]
        Act, grad.
    sums : float64 [2, 256]
        Contribution, pull.
    top : int32 scalar
    """
    W, D, place = W.float(), D.float(), group.reshape(-1).int()
    steps = torch.arange(LEVELS, device=D.device)
    levels = []
    for values, base in zip((W.abs() * rms, D), bases, strict=True):
        both = place * LEVELS + levels_torch(values, base).reshape(-1)
        counts = torch.bincount(both, minlength=TABLE * LEVELS).view(TABLE, LEVELS)
        levels.append((counts * steps).sum(1))
    product = (W.double() * D.double()).reshape(-1)
    largest = product.abs().max()
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - FIXED_BITS)
    fixed = torch.round(product / unit)
    sums = [torch.bincount(place, weights, TABLE) * unit for weights in (fixed.abs(), fixed)]
    top = (D.abs().view(torch.int32) >> FLOAT32_SHIFT).max()
    return torch.stack(levels), torch.stack(sums), top


@njit(nogil=True, cache=True)
def _add(
    W: Any, D: Any, group: Any, rms: Any, by_row: bool, bases: tuple[int, int], levels: Any, sums: Any
) -> int:
    """Add a band row by row: what each weight adds, vectorised; which are in a group; then their groups' entries."""
    rows, columns = D.shape
    groups = levels.shape[1]
    act_low, grad_low, highest = np.int32(bases[0]), np.int32(bases[1]), np.int32(LEVELS - 1)
    act = np.empty(columns, np.float32)
    act_bits = act.view(np.int32)
    both = np.empty(columns, np.int64)
    product = np.empty(columns, np.float64)
    kept = np.empty(columns, np.int32)
    both_by = np.zeros((LANES, groups), np.int64)
    contribution_by = np.zeros((LANES, groups), np.float64)
    pull_by = np.zeros((LANES, groups), np.float64)
    top = np.int32(0)
    for i in range(rows):
        bits = D[i].view(np.int32)
        if by_row:
            for j in range(columns):
                act[j] = abs(W[i, j]) * rms[i]
        else:
            for j in range(columns):
                act[j] = abs(W[i, j]) * rms[j]
        for j in range(columns):
            grad = (bits[j] & np.int32(0x7FFFFFFF)) >> np.int32(FLOAT32_SHIFT)
            top = max(top, grad)
            grad = min(max(grad - grad_low, np.int32(0)), highest)
            level = min(max((act_bits[j] >> np.int32(FLOAT32_SHIFT)) - act_low, np.int32(0)), highest)
            both[j] = (np.int64(grad) << 32) + np.int64(level)  # a band's sums stay far below 2^32
            product[j] = np.float64(W[i, j]) * np.float64(D[i, j])
        count = 0
        for j in range(columns):
            kept[count] = j
            count += int(group[i, j] < groups)
        whole = count // LANES * LANES
        for place in range(0, whole, LANES):
            for k in range(LANES):
                j = kept[place + k]
                g = group[i, j]
                both_by[k, g] += both[j]
                contribution_by[k, g] += abs(product[j])
                pull_by[k, g] += product[j]
        for place in range(whole, count):
            j = kept[place]
            g = group[i, j]
            both_by[0, g] += both[j]
            contribution_by[0, g] += abs(product[j])
            pull_by[0, g] += product[j]
    for k in range(LANES):
        for g in range(groups):
            levels[0, g] += both_by[k, g] & 0xFFFFFFFF
            levels[1, g] += both_by[k, g] >> 32
            sums[0, g] += contribution_by[k, g]
            sums[1, g] += pull_by[k, g]
    return int(top)
