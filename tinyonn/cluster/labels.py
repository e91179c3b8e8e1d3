"""The pass over all weights: each gets the number of the cell whose centre is nearest.

Shape suffixes: ``N`` weights of a band, ``K`` cells, ``S`` slices, ``F`` features that differ within a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from tinyonn.cluster.centres import Centres
from tinyonn.cluster.features import Space, TensorBins
from tinyonn.cluster.needs import Counts, Float32, NeedData
from tinyonn.dense.parameters import Parameter
from tinyonn.store.arrays import BandWriter, band_rows, bands, read_chunks
from tinyonn.store.records import Float64, UInt8

if TYPE_CHECKING:
    from icechunk import ForkSession

NO_CELL = 255  # label of the trunk's weights
BLOCK = 512  # weights at a time, which stay in the first cache
AT_A_TIME = 4  # features


@dataclass(frozen=True)
class LabelData:
    """What labels are made of; sent to the workers.

    Attributes
    ----------
    needs : NeedData
    space : Space
    centres : Centres
    old : bool
        Whether there are labels from before, to compare with.
    """

    needs: NeedData
    space: Space
    centres: Centres
    old: bool


@dataclass(frozen=True)
class Moved:
    """Weights of a tensor by old and new label, of the pairs that there are: a table of 512 KiB in a few numbers.

    Attributes
    ----------
    pairs : uint16 [n]
        Old label << 8 | new label.
    counts : int64 [n]
    """

    pairs: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, table: np.ndarray) -> Moved:
        """From the table, int64 [256, 256]."""
        pairs = np.flatnonzero(table)
        return cls(pairs.astype(np.uint16), table.reshape(-1)[pairs])

    def table(self) -> np.ndarray:
        """Int64 [256, 256]."""
        out = np.zeros(1 << 16, np.int64)
        out[self.pairs] = self.counts
        return out.reshape(256, 256)


@dataclass(frozen=True, eq=False)
class Labelled:
    """What the labels of a tensor come to.

    Attributes
    ----------
    sizes_K : int64 [K]
        Weights of each cell.
    needed_K : int64 [K]
        Those of them that some slice needs within the budget.
    needs_KS : float64 [K, S]
        Sums, over these, of the need's logarithm on each slice.
    slices_KD : int64 [K, 16]
        Weights by dominant slice, of the run's slices, from their affinity.
    inertia : float
        Sum of the squared distances to the centres.
    moved : Moved
        Since the labels before; empty without any.
    """

    sizes_K: Counts
    needed_K: Counts
    needs_KS: Float64
    slices_KD: Counts
    inertia: float
    moved: Moved


def label_tensors(
    data: LabelData, fork: ForkSession, tensors: tuple[tuple[Parameter, Float32 | None], ...]
) -> tuple[ForkSession, list[Labelled]]:
    """A task: write the labels of some tensors.

    Parameters
    ----------
    data : LabelData
    fork : icechunk.ForkSession
    tensors : tuple of (Parameter, float32 [F, bins])
        With the table of its coordinates, or None for a tensor of the trunk.

    Returns
    -------
    fork : icechunk.ForkSession
    labelled : list of Labelled
        For each tensor.
    """
    return fork, [_label(data, fork, parameter, table_FB) for parameter, table_FB in tensors]


def _label(data: LabelData, fork: ForkSession, parameter: Parameter, table_FB: Float32 | None) -> Labelled:
    name, shape = parameter.name, parameter.shape
    writer = BandWriter(fork, f"labels/{name}", shape, "uint8", {})
    reader = data.needs.reader
    before = (reader.output("labels", name), reader.what("labels", name)) if data.old else None
    cells, slices = len(data.centres.means_KA), len(data.space.slices)
    sums = np.zeros((2, cells), np.int64), np.zeros((cells, slices)), np.zeros(1)
    moves, slices_KD = np.zeros((256, 256), np.int64), np.zeros((cells, 16), np.int64)
    affinity = reader.output("affinity", name), reader.what("affinity", name)
    nearest = None if table_FB is None else Nearest(data, parameter, table_FB)
    for first, last in bands(shape):
        labels = np.full((last - first, *shape[1:]), NO_CELL, np.uint8)
        if nearest is not None:
            nearest.write(first, last, labels, sums)
            (compared,) = read_chunks([affinity], first, last)
            _count_slices(compared.reshape(-1), labels.reshape(-1), slices_KD)
        if before is not None:
            (old,) = read_chunks([before], first, last)
            _count_moves(old.reshape(-1), labels.reshape(-1), moves)
        writer.write(first, labels)
    counts_2K, needs_KS, inertia = sums
    return Labelled(counts_2K[0], counts_2K[1], needs_KS, slices_KD, float(inertia[0]), Moved.of(moves))


class Nearest:
    """The nearest centres to a tensor's weights.

    ``|x - c|² = |x|² - 2 x·c + |c|²``, of which the last, what the tensor's own coordinates add and the handicap are
    one number for each cell. Distances are above 0, so their bits order as they do, and the lowest eight hold the
    cell's number: one minimum finds both, to 2**-15 of the distance.
    """

    def __init__(self, data: LabelData, parameter: Parameter, table_FB: Float32) -> None:
        self._data, self._parameter, self._table_FB = data, parameter, table_FB
        self._bins = TensorBins(data.needs, data.space, parameter)
        means_KA, own = data.centres.means_KA.astype(np.float64), data.space.own
        self._away_K = np.square(means_KA[:, own:] - data.space.place(parameter)).sum(1)
        handicaps_K = data.centres.handicaps_K
        fixed_K = np.square(means_KA[:, :own]).sum(1) + self._away_K + handicaps_K
        self._fixed_K = (fixed_K + 1 - handicaps_K.min()).astype(np.float32)
        self._means_FK = np.zeros((own + -own % AT_A_TIME, len(means_KA)), np.float32)
        self._means_FK[:own] = means_KA[:, :own].T

    def write(self, first: int, last: int, labels: UInt8, sums: tuple[Counts, Float64, Float64]) -> None:
        """Labels of rows [first, last); adds up what `Labelled` says."""
        data = self._data
        band = data.needs.source.band(self._parameter.name, first, last, data.space.reads)
        bins_FN = self._bins.of(band).reshape(data.space.own, -1)
        centres = self._means_FK, self._fixed_K, self._away_K
        find_nearest(bins_FN, self._table_FB, centres, len(data.space.slices), labels.reshape(-1), sums)


def label_bytes(shape: tuple[int, ...], space: Space) -> int:
    """Memory of a task that labels a tensor: a band's weights, records, levels, bins, affinity and labels, old and
    new and as they are stored, and a chunk while it is decoded.
    """
    return band_rows(shape) * prod(shape[1:]) * (8 + 4 + 2 + 2 + 4 + 2 * space.own + 4) + (1 << 20)


@njit(nogil=True, cache=True)
def find_nearest(bins_FN: Any, table_FB: Any, centres: Any, slices: Any, labels_N: Any, sums: Any) -> None:
    """Labels of a band's weights from their bins, and what they come to; centres as `Nearest` prepares them."""
    means_FK, fixed_K, away_K = centres
    counts_2K, needs_KS, inertia = sums
    (padded, cells), own = means_FK.shape, bins_FN.shape[0]
    doubled_FK = np.float32(-2) * means_FK
    x_FN = np.zeros((padded, BLOCK), np.float32)
    square_N, far_N = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    best_N, bits_N = np.empty(BLOCK, np.int32), far_N.view(np.int32)
    total = 0.0
    for begin in range(0, labels_N.size, BLOCK):
        count = min(BLOCK, labels_N.size - begin)
        square_N[:] = 0
        for f in range(own):
            for i in range(count):
                x_FN[f, i] = table_FB[f, bins_FN[f, begin + i]]
            for i in range(count):
                square_N[i] += x_FN[f, i] * x_FN[f, i]
        best_N[:] = 0x7FFFFFFF
        for k in range(cells):
            for i in range(count):
                far_N[i] = square_N[i] + fixed_K[k]
            for f in range(0, padded, AT_A_TIME):
                a, b, c, d = (
                    doubled_FK[f, k],
                    doubled_FK[f + 1, k],
                    doubled_FK[f + 2, k],
                    doubled_FK[f + 3, k],
                )
                xa_N, xb_N, xc_N, xd_N = x_FN[f], x_FN[f + 1], x_FN[f + 2], x_FN[f + 3]
                for i in range(count):
                    far_N[i] += (xa_N[i] * a + xb_N[i] * b) + (xc_N[i] * c + xd_N[i] * d)
            for i in range(count):
                best_N[i] = min(best_N[i], (bits_N[i] & np.int32(-256)) | np.int32(k))
        for i in range(count):
            k = best_N[i] & np.int32(255)
            labels_N[begin + i] = k
            counts_2K[0, k] += 1
            needed = False
            total += away_K[k]
            for f in range(own):
                away = np.float64(x_FN[f, i] - means_FK[f, k])
                total += away * away
                needed |= f < slices and x_FN[f, i] <= 0
            if needed:
                counts_2K[1, k] += 1
                for s in range(slices):
                    needs_KS[k, s] += x_FN[s, i]
    inertia[0] += total


@njit(nogil=True, cache=True)
def _count_slices(affinity_N: Any, labels_N: Any, slices_KD: Any) -> None:
    for i in range(labels_N.size):
        slices_KD[labels_N[i], affinity_N[i] >> 4] += 1


@njit(nogil=True, cache=True)
def _count_moves(old: Any, new: Any, moves: Any) -> None:
    for i in range(old.size):
        moves[old[i], new[i]] += 1
