"""Clustering the same rows with Tiny-ONN and with the libraries that people use, in one run.

    python benchmarks/kmeans_peers.py [storage/demo-full] [--cells 100] [--exact] [--json]

RUN is a recorded and merged run of the shipped model, or of a real one, whose rows are repeated less often. From its
statistics a store of one layer of Qwen1.5-4B's shape is drawn (`synthetic.py`), 79 million rows outside the trunk, and
scored. Ours reads it from the store, clusters it, and writes the labels. The others get the same rows as scaled float32
features, block by block from the same store or as one matrix in memory; only their own work is timed, not the loading.

- scikit-learn `MiniBatchKMeans`: `partial_fit` over all blocks once, then `predict` of all blocks;
- faiss `Kmeans`: without subsampling, 25 iterations (its default), then assignment; and with its default of 256 rows
  to a centre, then assignment of all rows;
- dask-ml `KMeans` with k-means||, 10 iterations, on the blocks as a Dask array, then its labels; ended after
  ``--limit`` seconds, and then without an inertia.

In a second table the others get what ours clusters too, the distinct rows and how often each is there: scikit-learn's
`MiniBatchKMeans` and `KMeans`, and faiss. Finding them, and giving every row its label, is in our time alone; the table
says how long the former is.

Inertia is over all rows in float64 with the final centres. ``--exact`` clusters RUN itself instead, all its rows
outside the trunk, ours and scikit-learn's `KMeans` in float64 on the expanded rows from the same start.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.large_run import PeakWatch
from benchmarks.report import Goal, at_least, at_most, finish, show
from benchmarks.synthetic import recorded, synthesise
from tinyonn.cluster.features import Space, space_of
from tinyonn.cluster.histogram import count_tensors
from tinyonn.cluster.kmeans import KMeans, Rows
from tinyonn.cluster.stage import cluster_run, rows_of, tensors_of
from tinyonn.config import ClusterConfig, ModelConfig, ScoreConfig
from tinyonn.dense.source import SHAPES
from tinyonn.plan.facts import describe_model
from tinyonn.score.stage import score_run
from tinyonn.show.sizes import GiB
from tinyonn.store.arrays import bands
from tinyonn.store.records import Float64
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import EngineOptions

ONE_LAYER = {"num_hidden_layers": 1, "vocab_size": 1024}
Float32 = np.ndarray[Any, np.dtype[np.float32]]
Counts = np.ndarray[Any, np.dtype[Any]]


def main() -> None:
    """Parse and carry out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        default=Path("storage/demo-full"),
        help="a recorded, merged run of the shipped model; recorded if it is not there",
    )
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--limit", type=float, default=600, help="seconds for dask-ml")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    recorded(options.run)
    if options.exact:
        exact(options)
        return
    with tempfile.TemporaryDirectory(prefix="tinyonn-peers-", dir=options.folder) as folder:
        compare(options, Path(folder))


def exact(options: Any) -> None:
    """Ours and scikit-learn's on the same rows from the same start, to the end."""
    from sklearn.cluster import KMeans as Reference

    score_run(str(options.run), ScoreConfig())
    config = ClusterConfig(cells=options.cells, tolerance=0.0)
    rows, space = rows_in(options.run, config)
    kmeans = KMeans(rows, space, options.threads)
    start = kmeans.settle(kmeans.warm_up(kmeans.seed(config.cells, 0)), 5, 0.0).centres
    began = time.perf_counter()
    ours = kmeans.settle(start, 1000, 0.0)
    our_seconds = time.perf_counter() - began
    matrix = np.repeat(
        rows.matrix(space, np.arange(rows.keys.size)) * space.scale, rows.counts.astype(np.int64), axis=0
    )
    began = time.perf_counter()
    theirs = Reference(config.cells, init=start * space.scale, n_init=1, tol=0, max_iter=ours.iterations)
    labels = theirs.fit_predict(matrix)
    their_seconds = time.perf_counter() - began
    agreement = float(np.average(ours.last.labels == first_of(labels, rows), weights=rows.counts))
    difference = abs(ours.last.inertia / theirs.inertia_ - 1)
    lines = [
        [
            "ours, distinct rows",
            f"{rows.keys.size:,}",
            ours.iterations,
            f"{our_seconds:.1f}",
            f"{ours.last.inertia:.6f}",
        ],
        [
            "scikit-learn, all rows",
            f"{rows.total:,}",
            theirs.n_iter_,
            f"{their_seconds:.1f}",
            f"{theirs.inertia_:.6f}",
        ],
    ]
    goals = [
        at_least("labels that agree", agreement, 0.99999),
        at_most("inertia, relative difference", difference, 1e-9),
        at_least("rows", rows.total, 4_000_000),
    ]
    finish("kmeans exact", ("", "rows", "iterations", "seconds", "inertia"), lines, goals, options.json, {})


def first_of(labels: np.ndarray, rows: Rows) -> np.ndarray:
    """The label of the first copy of every distinct row."""
    return np.asarray(labels[np.cumsum(rows.counts, dtype=np.int64) - rows.counts])


def rows_in(folder: Path, config: ClusterConfig) -> tuple[Rows, Space]:
    """Distinct rows of a scored run and their space."""
    store = Store.open(folder / "store")
    tensors = tensors_of(store.manifest.parameters, config)
    reader = store.reader()
    places = {p.name: count_tensors(reader, (p,), tensors.grid)[0] for p in tensors.inside}
    space = space_of(tensors.inside, store.manifest.parameters, list(store.manifest.slices), config.features)
    return rows_of(tensors.inside, places, space), space


def compare(options: Any, folder: Path) -> None:
    """Ours and all peers on the drawn store."""
    shape = folder / "shape"
    shape.mkdir()
    tree = json.loads((SHAPES / "Qwen--Qwen1.5-4B" / "config.json").read_text("utf-8"))
    (shape / "config.json").write_text(json.dumps(tree | ONE_LAYER), "utf-8")
    parameters, _ = describe_model(ModelConfig(path=str(shape), device="cpu"))
    run = folder / "run"
    synthesise(options.run, tuple(parameters), 3, run / "store", options.threads)
    score_run(str(run), ScoreConfig())
    config = ClusterConfig(cells=options.cells)
    engine = EngineOptions("threads", options.threads)
    cluster_run(str(run), ClusterConfig(cells=options.cells, iterations=1), engine)  # compiles the kernels
    results: list[dict[str, Any]] = []

    def measure(name: str, work: Callable[[], tuple[Float64 | None, float]], **facts: Any) -> None:
        watch = PeakWatch(PID)
        centres, seconds = work()
        peak = watch.stop()
        value = math.inf if centres is None else inertia(blocks, centres)
        results.append({"name": name, "seconds": seconds, "peak": peak, "inertia": value, **facts})
        print(f"{name}: {seconds:.1f} s, inertia {value:.6g}", file=sys.stderr, flush=True)

    began = time.perf_counter()
    rows, space = rows_in(run, config)
    finding = time.perf_counter() - began
    blocks = Blocks(run, config, space)

    def ours() -> tuple[Float64, float]:
        began = time.perf_counter()
        cluster_run(str(run), config, engine, fresh=True)
        seconds = time.perf_counter() - began
        stored = Store.open(run / "store").reader().stage("labels")
        assert stored is not None
        return np.array(stored["centres"]) * space.scale, seconds

    measure("Tiny-ONN: store to labels", ours, sees="all")
    measure("scikit-learn MiniBatchKMeans", lambda: scikit_learn(blocks, options), sees="all")
    measure("faiss, 256 rows a centre", lambda: faiss_kmeans(blocks.matrix(), options, 256), sees="some")
    measure("faiss, all rows", lambda: faiss_kmeans(blocks.matrix(), options, 0), sees="all")
    measure("dask-ml, 10 iterations", lambda: dask_ml(blocks, options), sees="all")
    distinct = np.asarray(rows.matrix(space, np.arange(rows.keys.size)) * space.scale, np.float32)
    counted = distinct, rows.counts
    measure("scikit-learn MiniBatchKMeans", lambda: weighted_mini_batches(*counted, options), sees="distinct")
    measure("scikit-learn KMeans", lambda: weighted_lloyd(*counted, options), sees="distinct")
    measure("faiss, all rows", lambda: faiss_kmeans(distinct, options, 0, rows.counts), sees="distinct")
    report(options, rows, finding, results)


PID = os.getpid()


class Blocks:
    """The rows of a store as scaled float32 features, one block to a chunk."""

    def __init__(self, run: Path, config: ClusterConfig, space: Space) -> None:
        store = Store.open(run / "store")
        self._reader = store.reader()
        self._parameters = tensors_of(store.manifest.parameters, config).inside
        self._space = space
        self.rows = sum(parameter.size for parameter in self._parameters)

    def __iter__(self) -> Iterator[Float32]:
        for parameter in self._parameters:
            rows = self._reader.output("rows", parameter.name)
            affinity = self._reader.output("affinity", parameter.name)
            place = self._space.place(parameter, 0, 0)
            for first, last in bands(parameter.shape):
                record = np.asarray(rows[first:last]).reshape(-1)
                beside = np.asarray(affinity[first:last]).reshape(-1)
                out = np.zeros((record.size, self._space.axes), np.float32)
                out[:, 0], out[:, 1] = record & 15, record >> 12
                out[:, 2], out[:, 3] = record >> 8 & 15, record >> 4 & 15
                out[np.arange(record.size), 4 + (beside >> 4)] = beside & 15
                out[:, self._space.layer_axis :] = place
                out *= self._space.scale.astype(np.float32)
                yield out

    def matrix(self) -> Float32:
        """All of them."""
        out = np.empty((self.rows, self._space.axes), np.float32)
        done = 0
        for block in self:
            out[done : done + len(block)] = block
            done += len(block)
        return out


def inertia(blocks: Blocks, centres: Float64) -> float:
    """Over all rows, in float64."""
    total = 0.0
    squares = (centres**2).sum(1)
    for block in blocks:
        for begin in range(0, len(block), 1 << 19):
            part = block[begin : begin + (1 << 19)].astype(np.float64)
            total += float(((part**2).sum(1) + (squares - 2 * part @ centres.T).min(1)).sum())
    return total


def scikit_learn(blocks: Blocks, options: Any) -> tuple[Float64, float]:
    """One pass of `partial_fit`, one of `predict`."""
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(options.cells, random_state=0, n_init=1)
    seconds = 0.0
    for block in blocks:
        for begin in range(0, len(block), 1 << 16):
            part = block[begin : begin + (1 << 16)]
            began = time.perf_counter()
            model.partial_fit(part)
            seconds += time.perf_counter() - began
    for block in blocks:
        began = time.perf_counter()
        model.predict(block)
        seconds += time.perf_counter() - began
    return np.asarray(model.cluster_centers_, np.float64), seconds


def faiss_kmeans(
    matrix: Float32, options: Any, most: int, counts: Counts | None = None
) -> tuple[Float64, float]:
    """Training on a matrix in memory, on at most so many rows a centre, then assignment of all rows."""
    import faiss

    faiss.omp_set_num_threads(options.threads)
    began = time.perf_counter()
    model = faiss.Kmeans(
        matrix.shape[1], options.cells, niter=25, seed=1, max_points_per_centroid=most or len(matrix)
    )
    model.train(matrix, weights=None if counts is None else counts.astype(np.float32))
    for begin in range(0, len(matrix), 1 << 22):
        model.index.search(matrix[begin : begin + (1 << 22)], 1)
    return np.asarray(model.centroids, np.float64), time.perf_counter() - began


def dask_ml(blocks: Blocks, options: Any) -> tuple[Float64 | None, float]:
    """k-means|| and ten iterations on a Dask array of the same blocks, in a process that is ended after a while."""
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    process = context.Process(target=_dask_ml, args=(blocks.matrix(), options, results))
    process.start()
    try:
        centres, seconds = results.get(timeout=options.limit)
    except queue.Empty:
        process.kill()
        return None, float(options.limit)
    finally:
        process.join()
    return centres, seconds


def _dask_ml(rows: Float32, options: Any, results: Any) -> None:
    import dask
    import dask.array
    from dask_ml.cluster import KMeans as DaskKMeans

    matrix = dask.array.from_array(rows, chunks=(1 << 22, -1))
    with dask.config.set(scheduler="threads", num_workers=options.threads):
        began = time.perf_counter()
        model = DaskKMeans(options.cells, max_iter=10, tol=0.0, random_state=0)
        model.fit(matrix)
        np.asarray(model.labels_)
        results.put((np.asarray(model.cluster_centers_, np.float64), time.perf_counter() - began))


def weighted_mini_batches(rows: Float32, counts: Counts, options: Any) -> tuple[Float64, float]:
    """One pass of `partial_fit` in an order drawn by a seed, one of `predict`."""
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(options.cells, random_state=0, n_init=1)
    began = time.perf_counter()
    order = np.random.default_rng(0).permutation(len(rows))
    for begin in range(0, len(rows), 1 << 16):
        part = order[begin : begin + (1 << 16)]
        model.partial_fit(rows[part], sample_weight=counts[part])
    model.predict(rows)
    return np.asarray(model.cluster_centers_, np.float64), time.perf_counter() - began


def weighted_lloyd(rows: Float32, counts: Counts, options: Any) -> tuple[Float64, float]:
    """k-means++ and up to 25 iterations of Lloyd's."""
    from sklearn.cluster import KMeans as Peer

    began = time.perf_counter()
    model = Peer(options.cells, n_init=1, max_iter=25, random_state=0).fit(rows, sample_weight=counts)
    return np.asarray(model.cluster_centers_, np.float64), time.perf_counter() - began


def report(options: Any, rows: Rows, finding: float, results: list[dict[str, Any]]) -> None:
    """Print; goals against the fastest peer that sees every row, as it is or counted, and the best inertia of all."""
    own, *others = results
    plain = [r for r in others if r["sees"] != "distinct"]
    counted = [r for r in others if r["sees"] == "distinct"]

    def lines(which: list[dict[str, Any]]) -> list[list[str]]:
        return [
            [
                r["name"],
                r["sees"],
                f"{r['seconds']:.1f}",
                f"{rows.total / r['seconds'] / 1e6:.2f}",
                f"{r['seconds'] / own['seconds']:.1f}",
                f"{r['peak'] / GiB:.2f}",
                f"{r['inertia']:.6g}",
                f"{r['inertia'] / own['inertia']:.4f}",
            ]
            for r in which
        ]

    headings = (
        "",
        "rows seen",
        "seconds",
        "million rows/s",
        "times ours",
        "peak GiB",
        "inertia",
        "over ours",
    )
    fastest = min(r["seconds"] for r in plain if r["sees"] == "all")
    fastest_counted = min(r["seconds"] for r in counted)
    best = min(r["inertia"] for r in others)
    goals: list[Goal] = [
        at_least("times as fast as the fastest peer that sees every row", fastest / own["seconds"], 20),
        at_least(
            "times as fast as the fastest peer given distinct rows", fastest_counted / own["seconds"], 1
        ),
        at_most("inertia over the best of the peers", own["inertia"] / best, 1.0),
    ]
    print(
        f"{rows.total:,} rows, {rows.keys.size:,} distinct, {options.cells} cells; "
        f"finding the distinct rows takes {finding:.1f} s"
    )
    show("every row", headings, lines([own, *plain]))
    figures = {"results": results, "rows": rows.total, "distinct": rows.keys.size, "finding_seconds": finding}
    finish("kmeans_peers", headings, lines([own, *counted]), goals, options.json, figures)


if __name__ == "__main__":
    main()
