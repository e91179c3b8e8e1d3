"""Going on from an earlier clustering: its centres as the start, its numbers for the cells, and what has moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from tinyonn.cluster.features import Space
from tinyonn.cluster.histogram import Moved
from tinyonn.store.records import Float64


def stored_centres(stored: dict[str, Any], space: Space, cells: int) -> Float64 | None:
    """Centres of an earlier clustering in today's space, or None if it had another number of cells.

    Axes are matched by name; on one that is new, such as that of a new slice, all centres are at 0.
    """
    if len(stored["centres"]) != cells:
        return None
    old = {name: number for number, name in enumerate(stored["axes"])}
    centres = np.asarray(stored["centres"], dtype=np.float64)
    out = np.zeros((cells, space.axes))
    for axis, name in enumerate(space.names):
        if name in old:
            out[:, axis] = centres[:, old[name]]
    return out


def match_numbers(centres: Float64, old: Float64, space: Space) -> np.ndarray:
    """The old number for every new cell, so that the centres' squared distances sum to the least (Hungarian method).

    Returns
    -------
    int64 [k]
        New cell ``c`` gets number ``result[c]``.
    """
    scaled, before = centres * space.scale, old * space.scale
    cost = ((scaled[:, None, :] - before[None, :, :]) ** 2).sum(2)
    new, numbers = linear_sum_assignment(cost)
    out = np.empty(len(centres), np.int64)
    out[new] = numbers
    return out


@dataclass(frozen=True)
class Churn:
    """Share of weights that changed cell since the clustering before.

    Attributes
    ----------
    share : float
        Of all weights that are in a cell now or were.
    cells : list of float
        By old cell.
    tensors : dict of str to float
    """

    share: float
    cells: list[float]
    tensors: dict[str, float]


def churn_of(moves: Mapping[str, Moved], cells: int) -> Churn:
    """Churn from the weights by old and new label of every tensor."""
    total = np.zeros((256, 256), np.int64)
    for moved in moves.values():
        total += moved.table()

    def share(table: np.ndarray) -> float:
        counted = table.copy()
        counted[255, 255] = 0
        everything = counted.sum()
        return float(1 - np.trace(counted) / everything) if everything else 0.0

    by_cell = []
    for cell in range(cells):
        size = total[cell].sum()
        by_cell.append(float(1 - total[cell, cell] / size) if size else 0.0)
    return Churn(share(total), by_cell, {name: share(moved.table()) for name, moved in moves.items()})
