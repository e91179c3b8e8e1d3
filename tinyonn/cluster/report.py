"""What the cells are: which slices need their weights, layers and kinds; what has moved; a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinyonn.cluster.features import Space
from tinyonn.cluster.labels import NO_CELL, Labelled, Moved
from tinyonn.cluster.needs import HEIGHT
from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_count, format_seconds

SHOWN = 20  # cells in the table


@dataclass(frozen=True)
class Cell:
    """One cell of weights.

    Attributes
    ----------
    number, size : int
        Its label; weights in it.
    needed : int
        Those of them that some slice needs within the budget.
    needs : dict of str to float
        By slice: the budget under which it would keep the needed ones, as a multiple of the budget that was clustered
        for, geometric mean; e without any.
    slices, kinds : dict of str to float
        Share of its weights by dominant slice, on which they stand higher than on others (affinity), and by kind of
        module; shares that are 0 left out.
    layers : list of float
        Share of its weights by layer; what lies outside the layers is left out.
    """

    number: int
    size: int
    needed: int
    needs: dict[str, float]
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
    budget: float
    cells: tuple[Cell, ...]
    inertia: float
    even_cost: float
    points: int
    started_from: str
    churn: Churn | None
    workers: int
    seconds_looking: float
    seconds_centres: float
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
    labelled: Mapping[str, Labelled],
    parameters: Sequence[Parameter],
    space: Space,
    slices: Sequence[str],
    cells: int,
) -> Iterator[Cell]:
    """Every cell's summary, from whole numbers of weights and, for the needs, sums of logarithms; `slices` are those of
    the run, as affinities number them.
    """
    found = [(parameter, labelled[parameter.name]) for parameter in parameters]
    filled = len(found[0][1].sizes_K)
    by_layer = np.zeros((1 + max((p.layer or 0 for p in parameters), default=0), filled), np.int64)
    by_kind = {kind_of(parameter): np.zeros(filled, np.int64) for parameter in parameters}
    for parameter, its in found:
        by_kind[kind_of(parameter)] += its.sizes_K
        if parameter.layer is not None:
            by_layer[parameter.layer] += its.sizes_K
    needed_K = np.sum([its.needed_K for _, its in found], axis=0)
    sums_KS = np.sum([its.needs_KS for _, its in found], axis=0) / space.weights.need
    logs_KS = np.where(needed_K[:, None] > 0, sums_KS / np.maximum(needed_K, 1)[:, None], HEIGHT)
    sizes_K = np.sum([its.sizes_K for _, its in found], axis=0)
    slices_KD = np.sum([its.slices_KD for _, its in found], axis=0)
    for cell in range(cells):
        if cell >= filled:
            nothing = dict.fromkeys(space.slices, float(np.exp(HEIGHT)))
            yield Cell(cell, 0, 0, nothing, {}, {}, [0.0] * len(by_layer))
            continue
        size = int(sizes_K[cell])
        yield Cell(
            cell,
            size,
            int(needed_K[cell]),
            dict(zip(space.slices, np.exp(logs_KS[cell]).tolist(), strict=True)),
            {name: float(slices_KD[cell, d] / size) for d, name in enumerate(slices) if slices_KD[cell, d]},
            {kind: float(counts[cell] / size) for kind, counts in by_kind.items() if counts[cell]},
            [float(count / max(size, 1)) for count in by_layer[:, cell]],
        )


def _cell_table(report: ClusterReport) -> Sheet:
    """The cells that are needed most, and what the clustering took."""
    sheet = Sheet(f"{len(report.cells)} cells of {whole(report.location)}", list(_notes(report)))
    sheet.number("cell", "weights", "share", "needed")
    sheet.text("most by", "least by", "most of it", "layers")
    for cell in report.cells[:SHOWN]:
        order = sorted(cell.needs, key=lambda name: cell.needs[name])
        sheet.add(
            str(cell.number),
            f"{cell.size:,}",
            f"{cell.size / report.weights:.2%}",
            f"{cell.needed / max(cell.size, 1):.0%}",
            *(whole(f"{name} {cell.needs[name]:.2f}") for name in (order[0], order[-1])),
            f"{_top(cell.slices)}, {_top(cell.kinds)}",
            _span(cell.layers),
        )
    return sheet


def _notes(report: ClusterReport) -> Iterator[str]:
    if len(report.cells) > SHOWN:
        yield f"{SHOWN} of {len(report.cells)} cells; --json lists all"
    yield (
        f"{format_count(report.weights)} weights in cells, {format_count(report.trunk)} in the trunk; needed: by some "
        f"slice within the budget of {report.budget:.1%}; 0.50 beside a slice: it would keep them under half of it"
    )
    yield (
        f"centres of {report.points:,} weights, started from {report.started_from}; mean squared distance "
        f"{report.inertia:.4g}, even sizes cost {report.even_cost - 1:.1%} of it"
    )
    if report.churn is not None:
        yield f"{report.churn.share:.2%} of the weights changed cell since the clustering before"
    if report.fresh:
        yield (
            f"looking {format_seconds(report.seconds_looking)}, centres {format_seconds(report.seconds_centres)}, "
            f"labelling {format_seconds(report.seconds_labelling)}"
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
        budget=stored["budget"],
        cells=tuple(Cell(**cell) for cell in stored["cells"]),
        inertia=stored["inertia"],
        even_cost=stored["even_cost"],
        points=stored["points"],
        started_from=stored["started_from"],
        churn=None if stored["churn"] is None else Churn(**stored["churn"]),
        workers=0,
        seconds_looking=0.0,
        seconds_centres=0.0,
        seconds_labelling=0.0,
        fresh=False,
    )
