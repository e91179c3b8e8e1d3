"""Where a weight lies for the clustering: its coordinates, from integers that are read band by band.

================ =================================================================================
feature          coordinate, before its weight
================ =================================================================================
need             one axis per slice: natural logarithm of the slice's need over the budget, from
                 -3.5 to 1 (`tinyonn.cluster.needs`)
score, act,      code of the merged record, 0..15, over 15; codes have equal mass in a tensor, so
grad, freq       they are ranks
row, column      sixteenth of the tensor's rows or columns, 0..15, over 15
layer            number of the layer over the last one's
kind             one axis per kind of module: 1 / sqrt 2
================ =================================================================================

All but the last two differ from weight to weight: each is a *bin* of the weight and a table from bins to coordinates.
Layer and kind are a tensor's.

Shape suffixes: ``F`` features that differ within a tensor, ``A`` axes of features of the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinyonn.cluster.needs import BINS, Float32, NeedData
from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.score.source import Band
from tinyonn.store.records import SHIFTS, STATISTICS, UInt16

if TYPE_CHECKING:
    from tinyonn.config import FeatureWeights

BUCKETS = 16
HALF = 2**-0.5  # distance between two kinds becomes 1
CODED = ("score", *STATISTICS)
PLACED = ("row", "column")


@dataclass(frozen=True)
class Space:
    """The axes, those with a weight above 0 alone.

    Attributes
    ----------
    slices : tuple of str
        That have samples.
    coded : tuple of str
        Those of `CODED`, then those of `PLACED`.
    kinds : tuple of str
        None where kinds do not count.
    last_layer : int
    weights : FeatureWeights
    """

    slices: tuple[str, ...]
    coded: tuple[str, ...]
    kinds: tuple[str, ...]
    last_layer: int
    weights: FeatureWeights

    @property
    def names(self) -> list[str]:
        """Of all axes: those of F, then those of A."""
        layer = ["layer"] if self.weights.layer > 0 else []
        return [
            *(f"need {name}" for name in self.slices),
            *self.coded,
            *layer,
            *(f"kind {kind}" for kind in self.kinds),
        ]

    @property
    def own(self) -> int:
        """How many axes differ within a tensor."""
        return len(self.slices) + len(self.coded)

    @property
    def reads(self) -> frozenset[str]:
        """What of a band the bins are made of."""
        return frozenset({"weights", "records"} if set(self.coded) & set(CODED) else {"weights"})

    def table(self, needs_SB: Float32) -> Float32:
        """Coordinates of a tensor's bins, float32 [F, bins], from the logs of its needs by slice and bin."""
        out_FB = np.zeros((self.own, BINS), np.float32)
        out_FB[: len(self.slices)] = self.weights.need * needs_SB
        for number, name in enumerate(self.coded, len(self.slices)):
            out_FB[number, :BUCKETS] = getattr(self.weights, name) * np.arange(BUCKETS) / (BUCKETS - 1)
        return out_FB

    def place(self, parameter: Parameter) -> Float32:
        """A tensor's own coordinates: float32 [A]."""
        depth = parameter.layer if parameter.layer is not None else self.last_layer
        layer = [self.weights.layer * depth / max(self.last_layer, 1)] if self.weights.layer > 0 else []
        kind = kind_of(parameter)
        return np.array(
            [*layer, *(self.weights.kind * HALF * (name == kind) for name in self.kinds)], np.float32
        )


def space_of(parameters: Sequence[Parameter], slices: Sequence[str], weights: FeatureWeights) -> Space:
    """The space for some tensors.

    Parameters
    ----------
    parameters : sequence of Parameter
        Those that are clustered.
    slices : sequence of str
        That have samples.
    weights : FeatureWeights
    """
    kinds = tuple(dict.fromkeys(map(kind_of, parameters))) if weights.kind > 0 else ()
    last = max((parameter.layer or 0 for parameter in parameters), default=0)
    coded = tuple(name for name in (*CODED, *PLACED) if getattr(weights, name) > 0)
    return Space(tuple(slices), coded, kinds, last, weights)


class TensorBins:
    """Bins of a tensor's weights on all axes that differ within it, band by band."""

    def __init__(self, data: NeedData, space: Space, parameter: Parameter) -> None:
        self._needs, self._space, self._shape = data.tensor(parameter.name), space, parameter.shape

    def of(self, band: Band) -> UInt16:
        """Of a band that was read with the space's `reads`: uint16 [F, rows, columns]."""
        assert band.weights is not None
        needs_SOI = self._needs.bins(band.first, band.first + len(band.weights), band.weights)
        if not self._space.coded:
            return needs_SOI
        out = np.empty((self._space.own, *band.weights.shape), np.uint16)
        out[: len(needs_SOI)] = needs_SOI
        for number, name in enumerate(self._space.coded, len(needs_SOI)):
            out[number] = self._coded(band, name)
        return out

    def _coded(self, band: Band, name: str) -> np.ndarray:
        if name in CODED:
            assert band.records is not None
            return (band.records >> SHIFTS[name]) & 15
        rows, columns = self._shape
        if name == "row":
            rows_O = np.arange(band.first, band.first + len(band.weights))  # type: ignore[arg-type]
            return np.asarray(rows_O * BUCKETS // rows)[:, None]
        return np.asarray(np.arange(columns) * BUCKETS // columns)[None]
