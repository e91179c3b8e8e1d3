"""k-means over weighted distinct rows: exactly k-means over all of them.

Rows that look the same are counted once, with their number (`Rows`). The squared distance of a row to centre c splits
into its code part and its place part,

    d = sum_axes scale^2 (x - c)^2 = code[upper 12 bits of the key] + slice[affinity] + place

so that one pass needs a table row per 12-bit code, a table row per affinity and an addition and a comparison per
centre. Sums over rows are integers, hence exact in any order, on any number of threads; centres are float64. Float32
centres drift at billions of rows: a centre that already stands for 4e7 rows no longer moves as it should.

Distances are compared as integers, the largest possible one being 2**49, with the cell's number in the lowest 8 bits:
the least of them is distance and label at once, ties go to the lowest number, and every machine finds the same.
Between full passes a row is looked at again only if its bounds allow another label (Hamerly, SDM 2010): the distance to
its own centre may have grown by as much as that has moved, the distance to any other may have shrunk by as much as any
of them has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from scipy.optimize import linear_sum_assignment

from tinyonn.cluster.features import CODE_AXES, Space
from tinyonn.cluster.passes import (
    NUMBER_BITS,
    Bounds,
    Distances,
    PlaceRows,
    Sums,
    advance_place,
    assign_place,
)
from tinyonn.store.records import Float64, UInt8

SEEDING_ROWS = 1 << 14  # drawn in proportion to their number, that k-means++ chooses among
BATCHES = 16  # of the mini-batch pass
BALANCING_ROUNDS = 200
ROOM = 2.0**49  # of comparable distances; prices may take eight times as much

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Distinct rows with their numbers, place by place.

    Attributes
    ----------
    keys : uint32 [n]
        Increasing within a place; see `tinyonn.cluster.features`.
    scores : uint8 [n]
    counts : uint32 [n]
    offsets : int64 [places + 1]
        Rows of place p are [offsets[p], offsets[p + 1]).
    places : int64 [places, place axes]
        From `Space.place`.
    """

    keys: np.ndarray
    scores: UInt8
    counts: np.ndarray
    offsets: np.ndarray
    places: np.ndarray

    @property
    def total(self) -> int:
        """Weights they stand for."""
        return int(self.counts.sum(dtype=np.int64))

    def matrix(self, space: Space, chosen: np.ndarray) -> Float64:
        """Integer features of some rows: float64 [rows, axes]."""
        out = np.zeros((chosen.size, space.axes))
        keys = self.keys[chosen].astype(np.int64)
        out[:, 0] = self.scores[chosen]
        out[:, 1], out[:, 2], out[:, 3] = keys >> 16 & 15, keys >> 12 & 15, keys >> 8 & 15
        out[np.arange(chosen.size), CODE_AXES + (keys >> 4 & 15)] = keys & 15
        place = np.searchsorted(self.offsets, chosen, side="right") - 1
        out[:, space.layer_axis :] = self.places[place]
        return out


@dataclass(frozen=True)
class Assignment:
    """What one pass found.

    Attributes
    ----------
    labels : uint8 [rows]
    sizes : int64 [k]
        Weights in each cell.
    sums : int64 [k, axes]
        Of the integer features over a cell's weights.
    inertia : float
        Sum over all weights of the squared distance to the nearest centre, without `extra`.
    farthest : int64 [places]
        The row of each place that is farthest from its centre.
    distances : float64 [places]
        Its squared distance.
    """

    labels: UInt8
    sizes: np.ndarray
    sums: np.ndarray
    inertia: float
    farthest: np.ndarray
    distances: Float64


@dataclass(frozen=True)
class Clustering:
    """The result: centres in integer features, float64 [k, axes], and the last pass with exactly those centres."""

    centres: Float64
    last: Assignment
    iterations: int
    converged: bool

    def renumbered(self, numbers: np.ndarray) -> Clustering:
        """The same with cell ``c`` called ``numbers[c]``, a permutation."""
        order = np.argsort(numbers)
        last = replace(
            self.last,
            labels=numbers.astype(np.uint8)[self.last.labels],
            sizes=self.last.sizes[order],
            sums=self.last.sums[order],
        )
        return Clustering(self.centres[order], last, self.iterations, self.converged)


class KMeans:
    """Passes over rows, on threads.

    Parameters
    ----------
    rows : Rows
    space : Space
    threads : int
    """

    def __init__(self, rows: Rows, space: Space, threads: int = 1) -> None:
        self.rows, self.space, self.threads = rows, space, threads
        self._spans = _even_spans(rows.offsets, 8 * threads)
        self._unit = 2.0 ** math.floor(math.log2(ROOM / space.largest_distance))

    def assign(
        self, centres: Float64, extra: Float64 | None = None, first: int = 0, step: int = 1
    ) -> Assignment:
        """One full pass: the nearest centre of every row.

        Parameters
        ----------
        centres : float64 [k, axes]
            In integer features.
        extra : float64 [k], optional
            Added to the squared distances when centres are compared: a price of being in a cell.
        first, step : int
            Look at every `step`-th row from `first` on, alone.
        """
        rows, k = self.rows, centres.shape[0]
        places = rows.offsets.size - 1
        labels = np.zeros(rows.keys.size, np.uint8)
        inertia, far = np.zeros(places), np.zeros(places)
        farthest = np.zeros(places, np.int64)
        tables = self._tables(centres, np.zeros(k) if extra is None else np.asarray(extra, np.float64))
        price = np.zeros(k) if extra is None else np.asarray(extra, np.float64)

        def work(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
            sizes, sums = np.zeros(k, np.int64), np.zeros((k, self.space.axes), np.int64)
            for place in range(*span):
                distances = tables._replace(near=self._near(centres, place))
                its = Sums(labels, sizes, sums, rows.places[place], self.space.layer_axis)
                found = assign_place(self._rows_of(place), distances, price, first, step, its)
                inertia[place], farthest[place], far[place] = found
            return sizes, sums

        parts = self._on_threads(work)
        return Assignment(
            labels,
            np.sum([part[0] for part in parts], axis=0),
            np.sum([part[1] for part in parts], axis=0),
            float(inertia.sum()),
            farthest,
            far,
        )

    def _rows_of(self, place: int) -> PlaceRows:
        rows = self.rows
        begin, end = int(rows.offsets[place]), int(rows.offsets[place + 1])
        return PlaceRows(rows.keys, rows.scores, rows.counts, begin, end)

    def _on_threads(self, work: Callable[[tuple[int, int]], T]) -> list[T]:
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(work, self._spans))

    def _tables(self, centres: Float64, price: Float64) -> Distances:
        """Comparable distances (see the module) but for the place's."""
        scale = self.space.scale
        codes = [
            (scale[axis] * (np.arange(16)[:, None] - centres[:, axis])) ** 2 for axis in range(CODE_AXES)
        ]
        codes[0] = codes[0] + price
        score, act, grad, freq = (self._comparable(table) for table in codes)
        affinity = self._comparable(self._affinity_table(centres))
        return Distances(score, act, grad, freq, affinity, np.zeros(0, np.int64), self._unit)

    def _comparable(self, distances: Float64) -> np.ndarray:
        """Squared distances as integers with room for a cell's number: int64."""
        return np.asarray(np.round(distances * self._unit).astype(np.int64) << NUMBER_BITS)

    def _near(self, centres: Float64, place: int) -> np.ndarray:
        """Comparable distances of the place part, with the cells' numbers: int64 [k]."""
        axis = self.space.layer_axis
        off = self.space.scale[axis:] * (self.rows.places[place] - centres[:, axis:])
        return np.asarray(self._comparable((off**2).sum(1)) + np.arange(centres.shape[0]))

    def _affinity_table(self, centres: Float64) -> Float64:
        """Squared distance on the slices' axes, by affinity: float64 [256, k]."""
        space = self.space
        on = centres[:, CODE_AXES : space.layer_axis]  # [k, slices]
        scale = space.scale[CODE_AXES] if space.slices else 0.0
        table = np.zeros((256, centres.shape[0]))
        base = (on**2).sum(1)
        for number in range(len(space.slices)):
            selectivity = np.arange(16)[:, None]
            table[number * 16 : number * 16 + 16] = (
                base - on[:, number] ** 2 + (selectivity - on[:, number]) ** 2
            ) * scale**2
        return table

    def seed(self, cells: int, seed: int) -> Float64:
        """Centres by greedy k-means++ (scikit-learn's) among rows drawn in proportion to their number.

        Raises
        ------
        InputError
            Fewer distinct rows than cells.
        """
        from sklearn.cluster import kmeans_plusplus
        from threadpoolctl import threadpool_limits

        from tinyonn.errors import InputError

        rows = self.rows
        if rows.keys.size < cells:
            raise InputError(
                f"cluster.cells = {cells}, but the weights have only {rows.keys.size} distinct rows; use fewer cells"
            )
        below = np.cumsum(rows.counts, dtype=np.int64)
        drawn = min(SEEDING_ROWS, rows.keys.size)
        start = np.random.default_rng(seed).random()
        picked = np.searchsorted(below, (np.arange(drawn) + start) * (below[-1] / drawn), side="right")
        chosen, times = np.unique(np.minimum(picked, rows.keys.size - 1), return_counts=True)
        if chosen.size < cells:
            chosen, times = np.arange(rows.keys.size), rows.counts
        scaled = rows.matrix(self.space, chosen) * self.space.scale
        with threadpool_limits(1):
            _, indices = kmeans_plusplus(
                scaled, cells, sample_weight=times.astype(np.float64), random_state=seed
            )
        return rows.matrix(self.space, chosen[np.asarray(indices)])

    def warm_up(self, centres: Float64) -> Float64:
        """One mini-batch pass: every 16th row in turn, centres moved by their running means in float64."""
        seen = np.zeros(centres.shape[0])
        for batch in range(BATCHES):
            found = self.assign(centres, first=batch, step=BATCHES)
            seen += found.sizes
            share = 1.0 / np.maximum(seen, 1)
            centres = centres + (found.sums - found.sizes[:, None] * centres) * share[:, None]
        return centres

    def settle(
        self,
        centres: Float64,
        iterations: int,
        tolerance: float,
        observe: Callable[[float], None] = lambda moved: None,
    ) -> Clustering:
        """Full k-means (Lloyd) until the labels settle.

        Parameters
        ----------
        centres : float64 [k, axes]
        iterations : int
            At most.
        tolerance : float
            Share of the weights that may still change cell in the last iteration; 0 asks for a fixed point.
        observe : callable
            Gets the share that changed cell in each iteration.
        """
        rows = self.rows
        found = self.assign(centres)
        labels, sizes, sums = found.labels.copy(), found.sizes, found.sums
        upper = np.full(rows.keys.size, np.inf, np.float32)  # of the distance to the own centre
        lower = np.zeros(rows.keys.size, np.float32)  # of that to any other
        done, converged = 0, False
        while done < iterations and not converged:
            done += 1
            if sizes.min() == 0:
                found = self.assign(centres)
            target = self._moved(sizes, sums, found)
            moved = np.sqrt((((target - centres) * self.space.scale) ** 2).sum(1))
            centres = target
            changed, size_change, sum_change = self._advance(centres, moved, labels, upper, lower)
            sizes, sums = sizes + size_change, sums + sum_change
            observe(changed / rows.total)
            converged = changed <= tolerance * rows.total and bool(sizes.min() > 0)
        return Clustering(centres, self.assign(centres), done, converged)

    def _advance(
        self, centres: Float64, moved: Float64, labels: UInt8, upper: Any, lower: Any
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """Move the labels on to new centres; weights that changed cell, and the change of sizes and of sums."""
        rows, k = self.rows, centres.shape[0]
        tables = self._tables(centres, np.zeros(k))
        order = np.argsort(-moved, kind="stable")
        others = np.full(k, moved[order[0]])
        others[order[0]] = moved[order[1]]  # the farthest that any other centre has moved

        def work(span: tuple[int, int]) -> tuple[int, np.ndarray, np.ndarray]:
            sizes, sums = np.zeros(k, np.int64), np.zeros((k, self.space.axes), np.int64)
            changed = 0
            for place in range(*span):
                distances = tables._replace(near=self._near(centres, place))
                its = Sums(labels, sizes, sums, rows.places[place], self.space.layer_axis)
                bounds = Bounds(upper, lower, moved, others)
                changed += advance_place(self._rows_of(place), distances, bounds, its)
            return changed, sizes, sums

        parts = self._on_threads(work)
        return (
            sum(part[0] for part in parts),
            np.sum([part[1] for part in parts], axis=0),
            np.sum([part[2] for part in parts], axis=0),
        )

    def _moved(self, sizes: np.ndarray, sums: np.ndarray, found: Assignment) -> Float64:
        """Means of the cells; an empty one goes to the row that is farthest from its centre, in another place each."""
        centres = sums / np.maximum(sizes, 1)[:, None]
        empty = np.flatnonzero(sizes == 0)
        if empty.size:
            order = np.argsort(-found.distances, kind="stable")
            rows = np.resize(found.farthest[order], empty.size)
            centres[empty] = self.rows.matrix(self.space, rows)
        return np.asarray(centres)

    def balance(self, clustering: Clustering, cap: float) -> tuple[Clustering, float]:
        """Bring every cell to at most `cap` times the mean size, by a price on crowded cells; centres stay.

        Returns
        -------
        clustering : Clustering
            Its labels are of the nearest centre after the prices; as near to the cap as was found.
        cost : float
            Inertia over that without the cap.
        """
        free = clustering.last
        limit = math.ceil(cap * self.rows.total / free.sizes.size)
        price, best, found = np.zeros(free.sizes.size), free, free
        for round_ in range(BALANCING_ROUNDS):
            if best.sizes.max() <= limit:
                break
            step = free.inertia / self.rows.total / (2 + round_ / 10)
            price = np.maximum(price + step * np.log(np.maximum(found.sizes / limit, 0.05)), 0)
            found = self.assign(clustering.centres, extra=price)
            if found.sizes.max() < best.sizes.max():
                best = found
        cost = best.inertia / free.inertia if free.inertia > 0 else 1.0
        return Clustering(clustering.centres, best, clustering.iterations, clustering.converged), cost


def _even_spans(offsets: np.ndarray, parts: int) -> list[tuple[int, int]]:
    """Cut places into ranges with a like number of rows."""
    places = offsets.size - 1
    cuts = np.searchsorted(offsets, np.arange(1, parts) * (offsets[-1] / parts))
    edges = np.unique(np.concatenate([[0], np.clip(cuts, 0, places), [places]]))
    return [(int(a), int(b)) for a, b in pairwise(edges)]


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
    """The old number for every new cell, so that the centres' squared distances sum to the least (Hungarian method)."""
    scaled, before = centres * space.scale, old * space.scale
    cost = ((scaled[:, None, :] - before[None, :, :]) ** 2).sum(2)
    new, numbers = linear_sum_assignment(cost)
    out = np.empty(len(centres), np.int64)
    out[new] = numbers
    return out
