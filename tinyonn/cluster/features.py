"""What a weight looks like to the clustering, and the space that its features span.

A weight has a *code part*, its record and affinity, and a *place part*, the tensor (and buckets of rows and columns)
that it lies in. All features are integers, so that their sums over weights are exact:

======== ============================================ ==================
group    feature                                      scaled to
======== ============================================ ==================
score    code of S, 0..15                             code / 15
act      code of the mean act level, 0..15            code / 15
grad     code of the mean grad level, 0..15           code / 15
freq     code of the share, 0..15                     code / 15
slice    selectivity on the dominant slice's axis     selectivity / 15
layer    number of the layer, one axis                layer / last layer
kind     one axis per kind of module, 0 or 1          1 / sqrt 2
row      bucket of the row, 0..15                     bucket / 15
column   bucket of the column, 0..15                  bucket / 15
======== ============================================ ==================

each times the group's weight. Codes have equal mass in a tensor, so a code is a rank: tensors are comparable
whatever the size of their numbers. A weight's *key* is ``record's upper 12 bits << 8 | affinity``, 20 bits; its score
is a function of the tensor and of the upper 12 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.store.records import Float64

if TYPE_CHECKING:
    from tinyonn.config import FeatureWeights

BUCKETS = 16
KEYS = 1 << 20
CODE_AXES = 4  # score, act, grad, freq
HALF = 2**-0.5  # distance between two kinds becomes 1


@dataclass(frozen=True)
class Space:
    """The axes of the features and their scale.

    Axes, in order: score, act, grad, freq; one per slice; layer; one per kind; row, column.

    Attributes
    ----------
    slices, kinds : tuple of str
    last_layer : int
    scale : float64 [axes]
        What one unit of an integer feature is worth in the distance.
    """

    slices: tuple[str, ...]
    kinds: tuple[str, ...]
    last_layer: int
    scale: Float64

    @property
    def axes(self) -> int:
        """How many there are."""
        return int(self.scale.size)

    @property
    def largest_distance(self) -> float:
        """A bound of the squared distance between two weights."""
        units = self.scale.copy()
        units[: self.layer_axis] *= 15
        units[self.layer_axis] *= max(self.last_layer, 1)
        units[-2:] *= BUCKETS - 1
        squares = units**2
        one_of = slice(CODE_AXES, self.layer_axis), slice(self.layer_axis + 1, -2)
        alone = [*range(CODE_AXES), self.layer_axis, self.axes - 2, self.axes - 1]
        pairs = sum(2 * float(squares[axes].max(initial=0.0)) for axes in one_of)
        return max(float(squares[alone].sum()) + pairs, 1e-12)

    @property
    def layer_axis(self) -> int:
        """Place of the layer; kinds follow, then row and column."""
        return CODE_AXES + len(self.slices)

    @property
    def names(self) -> list[str]:
        """Of the axes."""
        return [
            *("score", "act", "grad", "freq"),
            *(f"slice {name}" for name in self.slices),
            "layer",
            *(f"kind {name}" for name in self.kinds),
            *("row", "column"),
        ]

    def place(self, parameter: Parameter, row: int, column: int) -> np.ndarray:
        """Integer features of a place: int64 [axes after the slices]."""
        features = np.zeros(self.axes - self.layer_axis, np.int64)
        features[0] = _depth(parameter, self.last_layer)
        features[1 + self.kinds.index(kind_of(parameter))] = 1
        features[-2:] = row, column
        return features


def space_of(
    parameters: Sequence[Parameter],
    every: Sequence[Parameter],
    slices: Sequence[str],
    weights: FeatureWeights,
) -> Space:
    """The space for some tensors.

    Parameters
    ----------
    parameters : sequence of Parameter
        Those that are clustered.
    every : sequence of Parameter
        All of the model, which say how many layers there are.
    slices : sequence of str
    weights : FeatureWeights
    """
    kinds = tuple(dict.fromkeys(kind_of(parameter) for parameter in parameters))
    last = max((parameter.layer or 0 for parameter in every), default=0)
    scale = np.array(
        [
            *(weight / 15 for weight in (weights.score, weights.act, weights.grad, weights.freq)),
            *([weights.slice / 15] * len(slices)),
            weights.layer / max(last, 1),
            *([weights.kind * HALF] * len(kinds)),
            *(weight / (BUCKETS - 1) for weight in (weights.row, weights.column)),
        ]
    )
    return Space(tuple(slices), kinds, last, scale)


def _depth(parameter: Parameter, last: int) -> int:
    """Layer number; what lies before the layers counts as the first, what lies behind as the last."""
    if parameter.layer is not None:
        return parameter.layer
    return 0 if parameter.kind == "embedding" else last


def bucket_edges(extent: int, buckets: int) -> list[tuple[int, int]]:
    """Half-open ranges that cut an axis into at most so many buckets of like size."""
    buckets = min(buckets, extent)
    edges = [extent * i // buckets for i in range(buckets + 1)]
    return list(pairwise(edges))


def bucket_number(index: int, count: int) -> int:
    """Feature of the bucket with this index among `count`, 0..15."""
    return 0 if count == 1 else round(index * (BUCKETS - 1) / (count - 1))
