"""How fast and how close cells are found, beside scikit-learn's and faiss' k-means; and what even sizes cost.

    python benchmarks/kmeans_peers.py [storage/demo-full] [--config configs/demo-full.yaml] [--json]

RUN is recorded and merged as the demo is if it is not there. All weights lie where `tinyonn cluster` puts them. Twice
each way finds centres, of plain k-means, and gives all points their cells, on one thread, in turn: for the sample that
a run's centres come from, weights that experts would hold, and for about ``--points`` of all weights that can be cut.

- ours: k-means over the sample, or over 65,536 of the others; then the compiled pass over these, from bins to cells;
- scikit-learn `MiniBatchKMeans` over all points, and over the same 65,536; one start, in batches of 16,384, which are
  faster here than its default of 1,024, and closer;
- faiss `Kmeans` over 256 points for a centre (its default), and over all; 25 iterations; left out where it is missing.

The last table is of the sample alone: clusters as k-means leaves them, and of about even sizes. Distances are squared,
to the centre that a point was given, means over the points, in float64. Seconds are medians of ``--rounds``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Goal, at_most, finish, show
from benchmarks.synthetic import recorded
from tinyonn.cli import CONFIGS
from tinyonn.cluster.centres import Centres, find_centres
from tinyonn.cluster.labels import LabelData, Nearest, find_nearest
from tinyonn.cluster.look import POINTS, LookData, coordinates, look_at, points_of
from tinyonn.cluster.needs import Float32
from tinyonn.cluster.stage import Job, source_of
from tinyonn.config import ClusterConfig, load_config
from tinyonn.score.stage import score_run
from tinyonn.store.records import UInt16
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import Call

OURS, MINI = "ours", "scikit-learn MiniBatchKMeans"
COLUMNS = ("", "centres from", "seconds", "of ours", "mean squared distance", "of ours")
SLOWEST, FARTHEST = 1.0, 1.02  # of MiniBatchKMeans'
BATCH = 1 << 14  # points
BLOCK = 1 << 16

Cells = np.ndarray[Any, np.dtype[Any]]
Way = Callable[[], tuple[Float32, Cells]]  # to means [K, A] and the cell of every point


def main() -> None:
    """Parse and carry out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=Path("storage/demo-full"))
    parser.add_argument("--config", type=Path, default=CONFIGS / "demo-full.yaml", help="of the run")
    parser.add_argument("--points", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    recorded(options.run)
    config = load_config(options.config)
    score_run(str(options.run), config)
    store, place = Store.open(options.run / "store"), str(options.run)
    job = Job(store, place, config, source_of(store, place, config))
    looks, tables = job.look(in_turn)
    sample_NA = points_of(looks, tables, job.inside, job.space, job.curves(looks), config.experts.core)
    part = Part(job, tables, options.points)
    held = compare(sample_NA, lambda: on_sample(sample_NA, config.cluster), config.cluster, options.rounds)
    every = compare(part.matrix_NA, lambda: on_part(part, config.cluster), config.cluster, options.rounds)
    show(f"{len(sample_NA):,} weights that experts would hold", COLUMNS, lines(held))
    evened = even(sample_NA, config.cluster)
    print(f"{config.cluster.cells} cells, {len(job.space.names)} axes; {len(part.matrix_NA):,} weights:")
    goals = [*judged("all weights", every), judged("weights of experts", held)[1]]
    figures = {
        "cells": config.cluster.cells,
        "axes": job.space.names,
        "held": [asdict(one) for one in held],
        "all": [asdict(one) for one in every],
        "even": [asdict(one) for one in evened],
    }
    finish("kmeans_peers", COLUMNS, lines(every), goals, options.json, figures)


def in_turn(calls: Sequence[Call]) -> list[Any]:
    """Carry calls out."""
    return [function(*arguments) for function, arguments in calls]


class Part:
    """Weights drawn of every tensor: bins and tables, which our pass reads, and coordinates, which others do.

    Attributes
    ----------
    matrix_NA : float32 [N, A]
    """

    def __init__(self, job: Job, tables: Sequence[Float32], points: int) -> None:
        self._job, self._tables = job, tables
        share = min(1.0, points / sum(parameter.size for parameter in job.inside))
        data = LookData(job.needs, job.space, job.choice, share, job.config.cluster.seed)
        self._bins: list[UInt16] = []
        matrix = []
        for look, table_FB, parameter in zip(look_at(data, job.inside), tables, job.inside, strict=True):
            self._bins.append(look.drawn_FN)
            every = np.arange(look.at_N.size)
            matrix.append(coordinates(look, table_FB, job.space.place(parameter), every))
        self.matrix_NA = np.concatenate(matrix)

    def labels(self, centres: Centres) -> Cells:
        """The cell of every point, by the stage's pass."""
        job, out, begin = self._job, np.empty(len(self.matrix_NA), np.uint8), 0
        cells, slices = len(centres.means_KA), len(job.space.slices)
        # The bins are there: no records are opened.
        data = LabelData(replace(job.needs, slices=()), job.space, centres, old=False)
        for parameter, bins_FN, table_FB in zip(job.inside, self._bins, self._tables, strict=True):
            one = Nearest(data, parameter, table_FB)
            fixed = one._means_FK, one._fixed_K, one._away_K
            sums = np.zeros((2, cells), np.int64), np.zeros((cells, slices)), np.zeros(1)
            end = begin + bins_FN.shape[1]
            find_nearest(bins_FN, table_FB, fixed, slices, out[begin:end], sums)
            begin = end
        return out


def on_part(part: Part, config: ClusterConfig) -> tuple[Float32, Cells]:
    """Ours for all weights: centres of some, the pass over all."""
    centres = find_centres(some_of(part.matrix_NA), config.cells, config.seed, even=False)
    return centres.means_KA, part.labels(centres)


def some_of(matrix_NA: Float32) -> Float32:
    """As many points as a run's centres come from, evenly spread."""
    return matrix_NA[np.unique(np.linspace(0, len(matrix_NA) - 1, POINTS).astype(np.int64))]


def on_sample(sample_NA: Float32, config: ClusterConfig) -> tuple[Float32, Cells]:
    """Ours for the sample."""
    centres = find_centres(sample_NA, config.cells, config.seed, even=False)
    return centres.means_KA, assigned(sample_NA, centres)


def mini_batches(matrix_NA: Float32, config: ClusterConfig, few_NA: Float32) -> tuple[Float32, Cells]:
    """Centres of some points, or of all, and the cells of all."""
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(config.cells, batch_size=BATCH, n_init=1, random_state=config.seed).fit(few_NA)
    label_N = model.labels_ if few_NA is matrix_NA else model.predict(matrix_NA)
    return np.asarray(model.cluster_centers_, np.float32), np.asarray(label_N)


def faiss_kmeans(matrix_NA: Float32, config: ClusterConfig, most: int) -> tuple[Float32, Cells]:
    """On at most so many points a centre, then assignment of all."""
    import faiss

    faiss.omp_set_num_threads(1)
    axes = matrix_NA.shape[1]
    model = faiss.Kmeans(axes, config.cells, niter=25, seed=1 + config.seed, max_points_per_centroid=most)
    model.train(matrix_NA)
    _, label_N1 = model.index.search(matrix_NA, 1)
    return np.asarray(model.centroids, np.float32), label_N1[:, 0]


@dataclass(frozen=True)
class Found:
    """What one way took, and how far the points are from their centres."""

    name: str
    points: int
    seconds: float
    distance: float


def compare(matrix_NA: Float32, ours: Way, config: ClusterConfig, rounds: int) -> list[Found]:
    """All ways on the same points; ours first."""
    points, few_NA = len(matrix_NA), some_of(matrix_NA)
    ways: dict[tuple[str, int], Way] = {
        (OURS, len(few_NA)): ours,
        (MINI, points): lambda: mini_batches(matrix_NA, config, matrix_NA),
    }
    if len(few_NA) < points:
        ways[MINI, len(few_NA)] = lambda: mini_batches(matrix_NA, config, few_NA)
    try:
        import faiss  # noqa: F401
    except ImportError:
        print("faiss is not installed: pip install faiss-cpu", file=sys.stderr)
    else:
        few = min(256 * config.cells, points)
        ways["faiss Kmeans", few] = lambda: faiss_kmeans(matrix_NA, config, 256)
        ways["faiss Kmeans", points] = lambda: faiss_kmeans(matrix_NA, config, points)
    ours()  # compiles the pass
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    distances = {}
    for _ in range(rounds):
        for way, work in ways.items():
            with threadpool_limits(1):
                began = time.perf_counter()
                means_KA, label_N = work()
                seconds[way].append(time.perf_counter() - began)
            distances[way] = distance(matrix_NA, means_KA, label_N)
    return [Found(*way, statistics.median(seconds[way]), distances[way]) for way in ways]


def assigned(points_NA: Float32, centres: Centres) -> Cells:
    """The cell of every point: of the least squared distance plus handicap."""
    fixed_K = np.square(centres.means_KA).sum(1) + centres.handicaps_K
    blocks = (points_NA[begin : begin + BLOCK] for begin in range(0, len(points_NA), BLOCK))
    return np.concatenate([(fixed_K - 2 * block @ centres.means_KA.T).argmin(1) for block in blocks])


def distance(points_NA: Float32, means_KA: Float32, label_N: Cells) -> float:
    """Mean squared distance of points to the centres that they were given."""
    total = 0.0
    for begin in range(0, len(points_NA), BLOCK):
        block = slice(begin, begin + BLOCK)
        away_NA = points_NA[block].astype(np.float64) - means_KA[label_N[block]]
        total += float(np.square(away_NA).sum())
    return total / len(points_NA)


def lines(found: Sequence[Found]) -> list[list[str]]:
    """A row for each way."""
    own = found[0]
    return [
        [
            one.name,
            f"{one.points:,}",
            f"{one.seconds:.2f}",
            f"{one.seconds / own.seconds:.2f}",
            f"{one.distance:.5g}",
            f"{one.distance / own.distance:.4f}",
        ]
        for one in found
    ]


def judged(what: str, found: Sequence[Found]) -> list[Goal]:
    """Ours beside `MiniBatchKMeans` over all points: seconds and distance."""
    own, mini = found[:2]
    return [
        at_most(f"{what}: seconds, to {MINI}", own.seconds / mini.seconds, SLOWEST),
        at_most(f"{what}: mean squared distance, to {MINI}", own.distance / mini.distance, FARTHEST),
    ]


@dataclass(frozen=True)
class Sizes:
    """Clusters of a sample: seconds to find them, distance, and weights in the smallest and the largest."""

    name: str
    seconds: float
    distance: float
    least: int
    most: int


def even(sample_NA: Float32, config: ClusterConfig) -> list[Sizes]:
    """Clusters of the sample as k-means leaves them, and of even sizes; prints a table."""
    found = []
    for name, evened in (("as k-means leaves them", False), ("of even sizes", True)):
        began = time.perf_counter()
        centres = find_centres(sample_NA, config.cells, config.seed, evened)
        seconds = time.perf_counter() - began
        label_N = assigned(sample_NA, centres)
        sizes_K = np.bincount(label_N, minlength=len(centres.means_KA))
        away = distance(sample_NA, centres.means_KA, label_N)
        found.append(Sizes(name, seconds, away, int(sizes_K.min()), int(sizes_K.max())))
    rows = [
        [
            one.name,
            f"{one.seconds:.2f}",
            f"{one.distance:.4g}",
            f"{one.distance / found[0].distance:.3f}",
            f"{one.least:,}",
            f"{one.most:,}",
            f"{one.most / max(one.least, 1):.2f}",
        ]
        for one in found
    ]
    columns = ("", "seconds", "mean squared distance", "of plain", "smallest", "largest", "ratio")
    show("clusters of these, as they come and of even sizes", columns, rows)
    return found


if __name__ == "__main__":
    main()
