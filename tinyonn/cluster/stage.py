"""``tinyonn cluster``: all weights that can be cut into cells, by which slices need them, out of core.

Data flow: Dask tasks look at some weights of every tensor (`look`) → allocation, tables and a sample of what will be
kept → k-means over it in this process (`centres`) → Dask tasks write every weight's label (`labels`) → one commit, with
the centres and a summary of the cells as attributes. A later call starts from the stored centres. The cells are the
experts: ``tinyonn assemble`` reads them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

from tinyonn.cluster.centres import Centres, find_centres, match_numbers, stored_means
from tinyonn.cluster.features import Space, space_of
from tinyonn.cluster.labels import NO_CELL, LabelData, Labelled, label_bytes, label_tensors
from tinyonn.cluster.look import (
    DRAWN,
    POINTS,
    Look,
    LookData,
    Shares,
    curves_of,
    look_at,
    look_bytes,
    looked_at,
    points_of,
    share_drawn,
    tables_of,
)
from tinyonn.cluster.needs import BINS, Curves, Float32, NeedData
from tinyonn.cluster.report import Cell, ClusterReport, churn_of, reported, summarise
from tinyonn.config import Config
from tinyonn.dense.parameters import Parameter
from tinyonn.dense.weights import BaseWeights
from tinyonn.errors import InputError
from tinyonn.places import local_folder, store_location
from tinyonn.plan.demands import codec_bytes
from tinyonn.record.identity import check_base
from tinyonn.run import Run
from tinyonn.score.scores import name_of
from tinyonn.score.source import RunSource, tensors_outside
from tinyonn.score.stage import task_groups
from tinyonn.select.selection import SelectOptions, all_searched_shares, select_options
from tinyonn.show.pace import Phase
from tinyonn.show.progress import Bar
from tinyonn.show.sizes import MiB
from tinyonn.store.lock import RunLock
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import THREADS, Call, Compute, EngineOptions, Watch, computing

LOG = logging.getLogger(__name__)

FORMAT = 1  # of needs, look and centres: another one gives other labels
OWN_BYTES = 760 * MiB  # of the process: Python with the store, Dask, Torch, Numba's kernels and scikit-learn


def cluster_run(
    location: str, config: Config, options: EngineOptions = THREADS, fresh: bool = False
) -> ClusterReport:
    """Cluster a scored run; may be killed at any moment and called again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : Config
        Its model, which must be the recorded one; of its experts the budget, score, core and allocation.
    options : EngineOptions
    fresh : bool
        Start anew instead of from the stored centres; cells keep their numbers as far as they match.

    Raises
    ------
    InputError
        No run is there, it is not scored, or the base model is not the recorded one.
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
        job = Job(store, location, config, source_of(store, location, config), options, fresh)
        if job.stored is not None and job.stored["described"] == job.described and not fresh:
            return reported(location, job.stored)
        return job.run()


def _check_scored(store: Store) -> dict[str, Any]:
    scored = store.reader().stage("rows")
    if scored is None:
        raise InputError(f"{store.location} is not scored yet; run `tinyonn score` first")
    return scored


def describe_cluster(
    config: Config, choice: SelectOptions, searched: Shares, scored: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides the bits of the labels, beside the centres that they start from."""
    return {
        "format": FORMAT,
        "config": config.cluster.model_dump(mode="json"),
        "selection": choice.tree(),
        "searched": {str(budget): dict(shares) for budget, shares in sorted(searched.items())},
        "scored": dict(scored),
    }


def source_of(store: Store, location: str, config: Config) -> RunSource:
    """Rows of the run and weights of its base model; refuses another model than the recorded one."""
    _check_scored(store)
    run, base = Run(store), BaseWeights(config.model)
    check_base(store, location, config.model)
    return RunSource(run, base.recorded_rows, base.recorded_across, labels=False)


class Job:
    """One clustering, from the look to the commit.

    Parameters
    ----------
    store : Store
    location : str
    config : Config
    source : RunSource
        Of the store's rows, without labels.
    options : EngineOptions
    fresh : bool
    """

    def __init__(
        self,
        store: Store,
        location: str,
        config: Config,
        source: RunSource,
        options: EngineOptions = THREADS,
        fresh: bool = False,
    ) -> None:
        self.store, self.location, self.config, self.options = store, location, config, options
        self.source, self.fresh = source, fresh
        self.parameters = store.manifest.parameters
        self.inside = tensors_outside(self.parameters)
        experts = config.experts
        everything = all_searched_shares(Run(store), location) if experts.allocation == "auto" else {}
        score = name_of(source.scored_by)
        self.choice = select_options(experts, score, everything.get(experts.budget, {}))
        self.budget = self.choice.weights_of(self.source)
        self.searched: Shares = everything
        self.described = describe_cluster(config, self.choice, everything, _check_scored(store))
        self.stored = labels_of(store)

    @cached_property
    def needs(self) -> NeedData:
        """Of the slices that have samples."""
        reader = self.store.reader()
        filled = {segment.slice for segment in reader.segments if segment.samples}
        slices = tuple(name for name in self.store.manifest.slices if name in filled)
        return NeedData(reader, self.source, slices)

    @cached_property
    def space(self) -> Space:
        """Of the features."""
        return space_of(self.inside, self.needs.slices, self.config.cluster.features)

    def run(self) -> ClusterReport:
        """Look, find centres, label, commit."""
        groups = task_groups(self.parameters)
        axes = len(self.space.names)
        own = OWN_BYTES + codec_bytes(parameter.shape for parameter in self.parameters)
        own += len(self.inside) * (self.space.own + len(self.needs.slices)) * BINS * 4  # tables, counts
        own += DRAWN * (2 * self.space.own + 10) + POINTS * 4 * (self.config.cluster.cells + 4 * axes)
        fit = self.options.fit(task_needs(groups, self.inside, self.space), "clustering", own)
        weights = sum(_seen(parameter) for parameter in self.inside)
        looking = Phase("looking", weights, parallel=fit.workers)
        labelling = Phase("labelling", sum(p.size for p in self.parameters), parallel=fit.workers)
        with (
            Bar("clustering", [looking, Phase("centres", 1), labelling]) as bar,
            computing(self.options, fit.workers, Watch(bar, _weights)) as compute,
        ):
            started = time.monotonic()
            looks, tables = self.look(compute)
            core = self.config.experts.core
            points_NA = points_of(looks, tables, self.inside, self.space, self.curves(looks), core)
            del looks
            looked = time.monotonic()
            labelling.expected = looking.rate
            bar.enter("centres")
            centres, start = self._centres(points_NA)
            found = time.monotonic()
            bar.enter("labelling")
            tree = self._label(compute, tables, centres, start, len(points_NA))
            labelled = time.monotonic()
        self.store.clean()
        LOG.debug("clustered %s: %d tasks, %d workers", self.location, len(groups), fit.workers)
        seconds = looked - started, found - looked, labelled - found
        return ClusterReport(
            **{**_fields(reported(self.location, tree)), "workers": fit.workers, "fresh": True},
            seconds_looking=seconds[0],
            seconds_centres=seconds[1],
            seconds_labelling=seconds[2],
            planned_rss_bytes=fit.bytes,
        )

    def look(self, compute: Compute) -> tuple[list[Look], list[Float32]]:
        """At every tensor that can be cut, and the tables of their bins: float32 [F, bins] each."""
        data = LookData(
            self.needs, self.space, self.choice, share_drawn(self.inside), self.config.cluster.seed
        )
        groups = task_groups(self.inside)
        results = compute([(look_at, (data, tuple(group))) for group in groups])
        by_name = {
            parameter.name: look
            for group, its in zip(groups, results, strict=True)
            for parameter, look in zip(group, its, strict=True)
        }
        looks = [by_name[parameter.name] for parameter in self.inside]
        return looks, tables_of(looks, self.curves(looks), self.space)

    def curves(self, looks: Sequence[Look]) -> Curves:
        """What every tensor keeps under growing budgets."""
        return curves_of(looks, self.inside, self.choice, self.budget, self.searched)

    def _centres(self, points_NA: Float32) -> tuple[Centres, str]:
        config, names = self.config.cluster, self.space.names
        old_KA = None if self.stored is None else stored_means(self.stored, names, config.cells)
        start_KA = None if self.fresh else old_KA
        centres = find_centres(points_NA, config.cells, config.seed, config.even, start_KA)
        if old_KA is not None and len(centres.means_KA) == len(old_KA):
            centres = centres.numbered(match_numbers(centres.means_KA, old_KA))
        return centres, "k-means++" if start_KA is None else "stored centres"

    def _label(
        self, compute: Compute, tables: Sequence[Float32], centres: Centres, start: str, points: int
    ) -> dict[str, Any]:
        """Write the labels and commit them; their attributes."""
        table_of = dict(zip((parameter.name for parameter in self.inside), tables, strict=True))
        groups = task_groups(self.parameters)
        old = self.store.reader().stage("labels") is not None
        data = LabelData(self.needs, self.space, centres, old)
        forks = self.store.begin_stage("cluster", len(groups))
        try:
            results = compute(
                [
                    (label_tensors, (data, fork, tuple((p, table_of.get(p.name)) for p in group)))
                    for fork, group in zip(forks, groups, strict=True)
                ]
            )
            labelled: dict[str, Labelled] = {
                parameter.name: its
                for group, (_, every) in zip(groups, results, strict=True)
                for parameter, its in zip(group, every, strict=True)
            }
            tree = self._attributes(labelled, centres, old, start, points)
            self.store.commit_stage("cluster", {"labels": tree}, [fork for fork, _ in results])
        finally:
            self.store.drop_stage("cluster")
        return tree

    def _attributes(
        self, labelled: Mapping[str, Labelled], centres: Centres, old: bool, start: str, points: int
    ) -> dict[str, Any]:
        count = self.config.cluster.cells
        cells: list[Cell] = list(
            summarise(labelled, self.inside, self.space, list(self.store.manifest.slices), count)
        )
        weights = sum(parameter.size for parameter in self.inside)
        inertia = sum(labelled[parameter.name].inertia for parameter in self.inside) / weights
        moves = {name: its.moved for name, its in labelled.items()}
        return {
            "described": self.described,
            "axes": self.space.names,
            "means": centres.means_KA.tolist(),
            "handicaps": centres.handicaps_K.tolist(),
            "slices": list(self.space.slices),
            "trunk_label": NO_CELL,
            "cells": [asdict(cell) for cell in cells],
            "weights": weights,
            "trunk": sum(parameter.size for parameter in self.parameters) - weights,
            "budget": self.budget / weights,
            "inertia": inertia,
            "even_cost": centres.cost,
            "points": points,
            "started_from": start,
            "churn": asdict(churn_of(moves, count)) if old else None,
        }


def labels_of(store: Store) -> dict[str, Any] | None:
    """Attributes of the labels that are there; None if there are none, or none of this kind."""
    stored = store.reader().stage("labels")
    return stored if stored is not None and "means" in stored else None


def _fields(report: ClusterReport) -> dict[str, Any]:
    """Of what is stored, without what a call itself has taken."""
    own = ("workers", "fresh", "planned_rss_bytes")
    return {
        name: value
        for name, value in vars(report).items()
        if name not in own and not name.startswith("seconds")
    }


def task_needs(groups: Sequence[Sequence[Parameter]], inside: Sequence[Parameter], space: Space) -> list[int]:
    """Memory of every task that looks or labels: its largest tensor's."""
    cut = {parameter.name for parameter in inside}
    return [
        max(
            max(look_bytes(p.shape, space), label_bytes(p.shape, space))
            if p.name in cut
            else label_bytes(p.shape, space)
            for p in group
        )
        for group in groups
    ]


def _seen(parameter: Parameter) -> int:
    """Weights of a tensor that are looked at."""
    rows = sum(last - first for first, last in looked_at(parameter.shape))
    return parameter.size * rows // parameter.shape[0]


def _weights(call: Call) -> float:
    """Of a call of `look_at` or `label_tensors`."""
    function, arguments = call
    if function is look_at:
        return sum(map(_seen, arguments[1]))
    return float(sum(parameter.size for parameter, _ in arguments[2]))
