"""``tinyonn cluster``: all scored weights into cells, out of core, exactly.

Data flow: Dask tasks count the distinct rows of every tensor (`histogram`) → k-means over them in this process, on
threads (`kmeans`) → Dask tasks look every weight's label up and write it → one commit, with the centres, the space and
a summary of the cells as attributes. A later call starts from the stored centres.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinyonn.checks import check_kinds
from tinyonn.cluster.features import BUCKETS, Space, space_of
from tinyonn.cluster.histogram import (
    NO_CELL,
    Grid,
    LabelTable,
    Place,
    count_bytes,
    count_tensors,
    label_tensors,
)
from tinyonn.cluster.kmeans import Clustering, KMeans, Rows, match_numbers, stored_centres
from tinyonn.cluster.report import Cell, Churn, ClusterReport, churn_of, reported, summarise
from tinyonn.config import ClusterConfig
from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.errors import CapacityError, InputError
from tinyonn.machine import free_ram, usable_cpus
from tinyonn.places import local_folder, store_location
from tinyonn.plan.demands import codec_bytes
from tinyonn.score.stage import task_groups
from tinyonn.show.pace import Phase
from tinyonn.show.progress import Bar
from tinyonn.show.sizes import MiB, format_size
from tinyonn.store.lock import RunLock
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import THREADS, Call, Compute, EngineOptions, Watch, computing

LOG = logging.getLogger(__name__)

# Of a distinct row: key, score and count, as counted and put together; labels of two passes; two bounds.
ROW_BYTES = 2 * (4 + 1 + 4) + 2 + 8
OWN_BYTES = 415 * MiB  # of the process: Python with the store, Dask, Numba's kernels and scikit-learn
FEW_ITERATIONS = 5  # before which their number cannot be told
MOVED = 1e-7  # share of the weights that moves, below which it counts as none
WAVES = 8  # in which the counting is done, so that what does not fit is found early


@dataclass(frozen=True)
class Tensors:
    """What is clustered: the tensors outside the trunk, their tasks, and the grid of their positions."""

    inside: tuple[Parameter, ...]
    trunk: tuple[Parameter, ...]
    grid: Grid

    @property
    def groups(self) -> list[list[Parameter]]:
        """Of one counting task each."""
        return task_groups(self.inside)


def cluster_run(
    location: str, config: ClusterConfig, options: EngineOptions = THREADS, fresh: bool = False
) -> ClusterReport:
    """Cluster a scored run; may be killed at any moment and called again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : ClusterConfig
    options : EngineOptions
    fresh : bool
        Start anew instead of from the stored centres; cells keep their numbers as far as they match.

    Raises
    ------
    InputError
        No run is there, it is not scored, or it has fewer distinct rows than cells.
    CapacityError
        The memory limit is below what is needed, or the disk is full.
    StoreBusyError
        Another process changes the run, or reads what this would replace (train, evaluate, export).
    StoreDamagedError
        Names tensor and chunk; the labels from before stay.
    """
    _check_scored(Store.open(store_location(location)))
    with RunLock(local_folder(location), what="cluster"):
        store = Store.open(store_location(location), read_only=False)
        scored = _check_scored(store)
        stored = store.reader().stage("labels")
        described = describe_cluster(config, scored)
        if stored is not None and stored["described"] == described and not fresh:
            return reported(location, stored)
        return _Job(store, location, config, options, described, stored, fresh).run()


def _check_scored(store: Store) -> dict[str, Any]:
    scored = store.reader().stage("rows")
    if scored is None:
        raise InputError(f"{store.location} is not scored yet; run `tinyonn score` first")
    return scored


def describe_cluster(config: ClusterConfig, scored: dict[str, Any]) -> dict[str, Any]:
    """What decides the bits of the labels, beside the centres that they start from."""
    return {"config": config.model_dump(mode="json"), "scored": scored}


def tensors_of(parameters: Sequence[Parameter], config: ClusterConfig) -> Tensors:
    """Which tensors are clustered and how finely their positions count.

    Raises
    ------
    InputError
        All tensors belong to the trunk, or none of a kind that it names.
    """
    check_kinds(config, parameters)
    trunk = tuple(p for p in parameters if kind_of(p) in config.trunk)
    inside = tuple(p for p in parameters if kind_of(p) not in config.trunk)
    grid = Grid(BUCKETS if config.features.row > 0 else 1, BUCKETS if config.features.column > 0 else 1)
    return Tensors(inside, trunk, grid)


def _weights(call: Call) -> float:
    """Of a call of `count_tensors` or `label_tensors`."""
    function, arguments = call
    counted: Sequence[Parameter] = (
        arguments[1] if function is count_tensors else [parameter for parameter, _ in arguments[2]]
    )
    return sum(parameter.size for parameter in counted)


class _Settling:
    """Iterations on a bar: how many there will be, by the line that the logarithm of what still moves follows."""

    def __init__(self, bar: Bar, config: ClusterConfig) -> None:
        self._bar, self._most = bar, config.iterations
        self._end = math.log(max(config.tolerance, MOVED))
        self._moved: list[float] = []

    def __call__(self, moved: float) -> None:
        """An iteration is done, in which such a share of the weights changed cell."""
        self._moved.append(math.log(max(moved, MOVED)))
        done = len(self._moved)
        before = self._moved[done // 2]
        slope = (before - self._moved[-1]) / max(1, done - 1 - done // 2)
        more = (self._moved[-1] - self._end) / slope if slope > 0 else self._most
        if done >= FEW_ITERATIONS:
            self._bar.pace.phase.total = min(self._most, done + math.ceil(max(0.0, more)))
        self._bar.update(done, note=f"{moved:.2%} moved")


class _Job:
    """One clustering, from the counts to the commit."""

    def __init__(
        self,
        store: Store,
        location: str,
        config: ClusterConfig,
        options: EngineOptions,
        described: dict[str, Any],
        stored: dict[str, Any] | None,
        fresh: bool,
    ) -> None:
        self.store, self.location, self.config, self.options = store, location, config, options
        self.described, self.stored, self.fresh = described, stored, fresh
        parameters = store.manifest.parameters
        self.tensors = tensors_of(parameters, config)
        slices = list(store.manifest.slices)
        self.space = space_of(self.tensors.inside, parameters, slices, config.features)
        self.fit = options.fit(
            task_needs(task_groups(parameters), self.tensors.grid),
            "counting the weights' rows",
            OWN_BYTES + codec_bytes(parameter.shape for parameter in parameters),
        )
        self.workers, self.planned = self.fit.workers, self.fit.bytes
        limit = free_ram() if options.memory is None else options.memory
        self.row_budget = max(0, limit - self.fit.bytes)

    def run(self) -> ClusterReport:
        """Count, cluster, label, commit."""
        counting, labelling = (
            Phase(name, sum(p.size for p in its), parallel=self.workers)
            for name, its in (
                ("counting", self.tensors.inside),
                ("labelling", self.store.manifest.parameters),
            )
        )
        with (
            Bar("clustering", [counting, Phase("settling", math.inf), labelling]) as bar,
            computing(self.options, self.workers, Watch(bar, _weights)) as compute,
        ):
            started = time.monotonic()
            places = self._count(compute)
            self._state(sum(place.keys.size for its in places.values() for place in its))
            rows = rows_of(self.tensors.inside, places, self.space)
            counted = time.monotonic()
            labelling.expected = counting.rate
            bar.enter("settling")
            clustering, cost, start = self._cluster(rows, _Settling(bar, self.config))
            clustered = time.monotonic()
            bar.enter("labelling")
            cells = tuple(summarise(rows, clustering.last, self.space, self.tensors.inside, places))
            churn = self._label(compute, places, rows, clustering, cells, cost, start)
            labelled = time.monotonic()
        self.store.clean()
        return ClusterReport(
            self.location,
            rows.total,
            sum(parameter.size for parameter in self.tensors.trunk),
            cells,
            clustering.last.inertia,
            clustering.iterations,
            clustering.converged,
            rows.keys.size,
            cost,
            start,
            churn,
            self.workers,
            counted - started,
            clustered - counted,
            labelled - clustered,
            True,
            self.planned,
        )

    def _count(self, compute: Compute) -> dict[str, list[Place]]:
        reader, groups = self.store.reader(), self.tensors.groups
        places: dict[str, list[Place]] = {}
        found, done, total = 0, 0, sum(p.size for p in self.tensors.inside)
        size = max(1, -(-len(groups) // WAVES))
        for begin in range(0, len(groups), size):
            wave = groups[begin : begin + size]
            results = compute([(count_tensors, (reader, tuple(group), self.tensors.grid)) for group in wave])
            for group, result in zip(wave, results, strict=True):
                for parameter, its in zip(group, result, strict=True):
                    places[parameter.name] = its
                    found += sum(place.keys.size for place in its)
                    done += parameter.size
            if found * ROW_BYTES > self.row_budget:
                need = int(found * ROW_BYTES * total / done)
                raise CapacityError(
                    f"the distinct rows of {done:,} of {total:,} weights take {format_size(found * ROW_BYTES)} already "
                    f"and {format_size(self.row_budget)} are left for them; give --memory about {format_size(need)} "
                    "more"
                )
        return places

    def _state(self, rows: int) -> None:
        """What is needed, now that the distinct rows are known."""
        self.planned = self.fit.bytes + rows * ROW_BYTES
        what = f"{rows:,} distinct rows {format_size(rows * ROW_BYTES)}"
        LOG.info("clustering needs %s of RAM at most, %s of it", format_size(self.planned), what)

    def _cluster(self, rows: Rows, settling: _Settling) -> tuple[Clustering, float | None, str]:
        config = self.config
        kmeans = KMeans(rows, self.space, usable_cpus())
        old = None if self.stored is None else stored_centres(self.stored, self.space, config.cells)
        if old is not None and not self.fresh:
            start, centres = "stored centres", old
        else:
            start = "k-means++"
            centres = kmeans.warm_up(kmeans.seed(config.cells, config.seed))
        clustering = kmeans.settle(centres, config.iterations, config.tolerance, settling)
        if old is not None:
            clustering = clustering.renumbered(match_numbers(clustering.centres, old, self.space))
        cost = None
        if config.cap is not None:
            clustering, cost = kmeans.balance(clustering, config.cap)
        return clustering, cost, start

    def _label(
        self,
        compute: Compute,
        places: dict[str, list[Place]],
        rows: Rows,
        clustering: Clustering,
        cells: tuple[Cell, ...],
        cost: float | None,
        start: str,
    ) -> Churn | None:
        """Write the labels and commit them; what has moved since the labels before."""
        tables: dict[str, list[LabelTable]] = {parameter.name: [] for parameter in self.tensors.trunk}
        number = 0
        for parameter in self.tensors.inside:
            its = []
            for place in places[parameter.name]:
                labels = clustering.last.labels[rows.offsets[number] : rows.offsets[number + 1]]
                its.append(LabelTable(place.keys, labels))
                number += 1
            tables[parameter.name] = its
        groups = task_groups(self.store.manifest.parameters)
        reader, old = self.store.reader(), self.stored is not None
        forks = self.store.begin_stage("cluster", len(groups))
        try:
            calls = [
                (
                    label_tensors,
                    (reader, fork, tuple((p, tables[p.name]) for p in group), self.tensors.grid, old),
                )
                for fork, group in zip(forks, groups, strict=True)
            ]
            results = compute(calls)
            moves = {
                parameter.name: table
                for group, (_, its) in zip(groups, results, strict=True)
                for parameter, table in zip(group, its, strict=True)
            }
            churn = churn_of(moves, self.config.cells) if old else None
            attributes = self._attributes(rows, clustering, cells, cost, start, churn)
            self.store.commit_stage("cluster", {"labels": attributes}, [fork for fork, _ in results])
        finally:
            self.store.drop_stage("cluster")
        return churn

    def _attributes(
        self,
        rows: Rows,
        clustering: Clustering,
        cells: tuple[Cell, ...],
        cost: float | None,
        start: str,
        churn: Churn | None,
    ) -> dict[str, Any]:
        return {
            "described": self.described,
            "axes": self.space.names,
            "scale": self.space.scale.tolist(),
            "centres": clustering.centres.tolist(),
            "slices": list(self.space.slices),
            "trunk_label": NO_CELL,
            "cells": [asdict(cell) for cell in cells],
            "weights": rows.total,
            "trunk": sum(parameter.size for parameter in self.tensors.trunk),
            "inertia": clustering.last.inertia,
            "iterations": clustering.iterations,
            "converged": clustering.converged,
            "distinct_rows": int(rows.keys.size),
            "balance_cost": cost,
            "started_from": start,
            "churn": None if churn is None else asdict(churn),
        }


def task_needs(groups: Sequence[Sequence[Parameter]], grid: Grid) -> list[int]:
    """Memory of every task: its largest tensor's."""
    return [max(count_bytes(parameter.shape, grid) for parameter in group) for group in groups]


def rows_of(parameters: Sequence[Parameter], places: dict[str, list[Place]], space: Space) -> Rows:
    """The distinct rows of all places, tensor by tensor."""
    every = [(parameter, place) for parameter in parameters for place in places[parameter.name]]
    offsets = np.zeros(len(every) + 1, np.int64)
    np.cumsum([place.keys.size for _, place in every], out=offsets[1:])
    return Rows(
        np.concatenate([place.keys for _, place in every]),
        np.concatenate([place.scores for _, place in every]),
        np.concatenate([place.counts for _, place in every]),
        offsets,
        np.stack([space.place(parameter, place.row, place.column) for parameter, place in every]),
    )
