"""What the cells are made of: counts by layer, kind and slice, and mean codes; what has moved; a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numba import njit

from tinyonn.cluster.features import CODE_AXES, Space
from tinyonn.cluster.histogram import NO_CELL, Moved, Place
from tinyonn.cluster.kmeans import Assignment, Rows
from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_count, format_seconds

SHOWN = 20  # cells in the table, the largest


@dataclass(frozen=True)
class Cell:
    """One cell of weights.

    Attributes
    ----------
    number, size : int
        Its label; weights in it.
    score, act, grad, freq : float
        Mean codes, 0 to 15.
    selectivity : float
        Mean selectivity, 0 to 15.
    slices, kinds : dict of str to float
        Share of its weights by dominant slice and by kind of module; shares that are 0 left out.
    layers : list of float
        Share of its weights by layer; what lies outside the layers is left out.
    """

    number: int
    size: int
    score: float
    act: float
    grad: float
    freq: float
    selectivity: float
    slices: dict[str, float]
    kinds: dict[str, float]
    layers: list[float]


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


@dataclass(frozen=True)
class ClusterReport:
    """What a call of `cluster_run` did."""

    location: str
    weights: int
    trunk: int
    cells: tuple[Cell, ...]
    inertia: float
    iterations: int
    converged: bool
    distinct_rows: int
    balance_cost: float | None
    started_from: str
    churn: Churn | None
    workers: int
    seconds_counting: float
    seconds_clustering: float
    seconds_labelling: float
    fresh: bool
    planned_rss_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "cells": [asdict(cell) for cell in self.cells]}

    def table(self) -> Sheet:
        """For people."""
        return _cell_table(self)


def summarise(
    rows: Rows,
    found: Assignment,
    space: Space,
    parameters: Sequence[Parameter],
    places: dict[str, list[Place]],
) -> Iterator[Cell]:
    """Every cell's summary, from whole numbers of weights."""
    cells = found.sizes.size
    by_slice = np.zeros((cells, 16), np.int64)
    by_place = np.zeros((rows.offsets.size - 1, cells), np.int64)
    _count_cells(rows.keys, rows.counts, rows.offsets, found.labels, by_slice, by_place)
    owners = [parameter for parameter in parameters for _ in places[parameter.name]]
    by_layer = np.zeros((space.last_layer + 1, cells), np.int64)
    by_kind = {kind: np.zeros(cells, np.int64) for kind in space.kinds}
    for parameter, counts in zip(owners, by_place, strict=True):
        by_kind[kind_of(parameter)] += counts
        if parameter.layer is not None:
            by_layer[parameter.layer] += counts
    for cell in range(cells):
        size = int(found.sizes[cell])
        means = found.sums[cell, :CODE_AXES] / max(size, 1)
        selectivity = found.sums[cell, CODE_AXES : space.layer_axis].sum() / max(size, 1)
        yield Cell(
            cell,
            size,
            float(means[0]),
            float(means[1]),
            float(means[2]),
            float(means[3]),
            float(selectivity),
            _shares({name: by_slice[cell, number] for number, name in enumerate(space.slices)}, size),
            _shares({kind: counts[cell] for kind, counts in by_kind.items()}, size),
            [float(count / max(size, 1)) for count in by_layer[:, cell]],
        )


def _shares(counts: dict[str, Any], size: int) -> dict[str, float]:
    return {name: float(count / size) for name, count in counts.items() if count}


@njit(nogil=True, cache=True)
def _count_cells(keys: Any, counts: Any, offsets: Any, labels: Any, by_slice: Any, by_place: Any) -> None:
    for place in range(offsets.size - 1):
        for row in range(offsets[place], offsets[place + 1]):
            by_slice[labels[row], keys[row] >> 4 & 15] += counts[row]
            by_place[place, labels[row]] += counts[row]


def _cell_table(report: ClusterReport) -> Sheet:
    """The largest cells, and what the clustering took."""
    sheet = Sheet(f"{len(report.cells)} cells of {whole(report.location)}", list(_notes(report)))
    sheet.number("cell", "weights", "share", "score", "act", "grad", "freq")
    sheet.text("most of it", "layers")
    largest = sorted(report.cells, key=lambda cell: -cell.size)[:SHOWN]
    for cell in largest:
        sheet.add(
            str(cell.number),
            f"{cell.size:,}",
            f"{cell.size / report.weights:.2%}",
            *(f"{mean:.1f}" for mean in (cell.score, cell.act, cell.grad, cell.freq)),
            f"{_top(cell.slices)}, {_top(cell.kinds)}",
            _span(cell.layers),
        )
    return sheet


def _notes(report: ClusterReport) -> Iterator[str]:
    if len(report.cells) > SHOWN:
        yield f"the {SHOWN} largest of {len(report.cells)} cells; --json lists all"
    yield (
        f"{format_count(report.weights)} weights in cells, {format_count(report.trunk)} in the trunk, "
        f"{report.distinct_rows:,} distinct rows; inertia {report.inertia:.6g}"
    )
    settled = "settled" if report.converged else "did not settle"
    yield f"started from {report.started_from}, {settled} after {report.iterations} iterations"
    if report.balance_cost is not None:
        yield f"the cap costs {report.balance_cost - 1:.1%} more inertia"
    if report.churn is not None:
        yield f"{report.churn.share:.2%} of the weights changed cell since the clustering before"
    if report.fresh:
        yield (
            f"counting {format_seconds(report.seconds_counting)}, clustering "
            f"{format_seconds(report.seconds_clustering)}, labelling {format_seconds(report.seconds_labelling)}"
        )
    else:
        yield "nothing to do: clustered already"


def _top(shares: dict[str, float]) -> str:
    """The largest share."""
    if not shares:
        return "-"
    name, share = max(shares.items(), key=lambda item: item[1])
    return whole(f"{name} {share:.0%}")


def _span(layers: Sequence[float]) -> str:
    """Layers that hold the middle nine tenths."""
    below = np.cumsum(layers)
    if not len(below) or below[-1] <= 0:
        return "-"
    first, last = np.searchsorted(below, [0.05 * below[-1], 0.95 * below[-1]])
    return f"{first}-{last}"


def churn_of(moves: Mapping[str, Moved], cells: int) -> Churn:
    """Churn from the weights by old and new label of every tensor."""
    total = np.zeros((256, 256), np.int64)
    for moved in moves.values():
        total += moved.table()

    def share(table: np.ndarray) -> float:
        counted = table.copy()
        counted[NO_CELL, NO_CELL] = 0
        everything = counted.sum()
        return float(1 - np.trace(counted) / everything) if everything else 0.0

    by_cell = []
    for cell in range(cells):
        size = total[cell].sum()
        by_cell.append(float(1 - total[cell, cell] / size) if size else 0.0)
    return Churn(share(total), by_cell, {name: share(moved.table()) for name, moved in moves.items()})


def reported(location: str, stored: dict[str, Any]) -> ClusterReport:
    """What an earlier call has committed."""
    return ClusterReport(
        location=location,
        weights=stored["weights"],
        trunk=stored["trunk"],
        cells=tuple(Cell(**cell) for cell in stored["cells"]),
        inertia=stored["inertia"],
        iterations=stored["iterations"],
        converged=stored["converged"],
        distinct_rows=stored["distinct_rows"],
        balance_cost=stored["balance_cost"],
        started_from=stored["started_from"],
        churn=None if stored["churn"] is None else Churn(**stored["churn"]),
        workers=0,
        seconds_counting=0.0,
        seconds_clustering=0.0,
        seconds_labelling=0.0,
        fresh=False,
    )
