"""Sums by group from whole float64 arrays, in plain NumPy; and groups that lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tinyonn.dense.parameters import Parameter
from tinyonn.profile.groups import Identity
from tinyonn.profile.kernel import Totals
from tinyonn.record.levels import levels
from tinyonn.store.records import UInt8


def totals_of(
    W: np.ndarray, D: np.ndarray, act: np.ndarray, group: UInt8, groups: int, bases: tuple[int, int]
) -> Totals:
    """A tensor's sums: weights, gradient and act of one shape."""
    place = group.reshape(-1)
    inside = place < groups

    def by_group(values: np.ndarray) -> np.ndarray:
        return np.bincount(place[inside], values.reshape(-1)[inside].astype(np.float64), groups)

    product = W.astype(np.float64) * D.astype(np.float64)
    return Totals(
        by_group(levels(act, bases[0])).astype(np.int64),
        by_group(levels(D, bases[1])).astype(np.int64),
        by_group(np.abs(product)),
        by_group(product),
    )


def added(parts: list[Totals]) -> Totals:
    """Of all tensors."""
    return Totals(*(np.sum([getattr(part, name) for part in parts], axis=0) for name in Totals._fields))


@dataclass(frozen=True)
class ArrayGroups:
    """Groups from arrays."""

    arrays: Mapping[str, UInt8]
    tensors: tuple[Parameter, ...]
    identity: Identity

    def read(self, name: str) -> UInt8:
        return self.arrays[name]


def random_group(shape: tuple[int, ...], groups: int, seed: int, kept: float = 0.4) -> UInt8:
    """A group for every weight; 255 for most."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, shape).astype(np.uint8)
    group[rng.random(shape) >= kept] = 255
    return group
