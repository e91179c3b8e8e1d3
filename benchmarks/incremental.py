"""Clustering again after new data: how much is kept, how long it takes, beside clustering from scratch.

    python benchmarks/incremental.py [storage/many] [--json]

RUN holds ten segments of 16 samples in every slice, not merged; it is recorded, with the shipped model and corpus, if
it is not there. A copy gets the first nine tenths of each slice, is scored and clustered, then gets the rest, is scored
and clustered again from the stored centres. Beside it all of the run is clustered from scratch. Both are done with
several seeds. Another copy lacks one slice at first.

Agreement is the adjusted Rand index of the weights' cells outside the trunk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sklearn.metrics import adjusted_rand_score

from benchmarks.report import Goal, at_least, at_most, finish
from tinyonn.cli import CONFIGS
from tinyonn.cluster.histogram import NO_CELL
from tinyonn.cluster.report import ClusterReport
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import ClusterConfig, RecordConfig, ScoreConfig, load_config
from tinyonn.corpus.corpus import prepare_corpus
from tinyonn.dense.load import fingerprint_model, load_tokenizer
from tinyonn.record.worker import Worker
from tinyonn.run import open_run
from tinyonn.score.stage import score_run
from tinyonn.store.arrays import SegmentWriter, bands
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import EngineOptions

SEGMENT = 16


def main() -> None:
    """Parse and carry out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=Path("storage/many"))
    parser.add_argument("--share", type=float, default=0.1, help="of the samples that come later")
    parser.add_argument("--seeds", type=int, default=3, help="clusterings of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not Store.exists(options.run / "store"):
        record_leaves(options.run, options.threads)
    with tempfile.TemporaryDirectory(prefix="tinyonn-incremental-") as folder:
        report(options, Path(folder))


def record_leaves(folder: Path, threads: int) -> None:
    """Record the demo's samples in segments of 16 and merge none of them."""
    demo = load_config(CONFIGS / "demo-full.yaml")
    config = demo.model_copy(update={"record": RecordConfig(segment=SEGMENT, threads=threads)})
    corpus = prepare_corpus(config, load_tokenizer(config.model), folder / "corpus.arrow")
    worker = Worker(config.model, threads, config.record.seed)
    parameters = worker.load().parameters
    manifest = Manifest(fingerprint_model(config.model), {}, {}, corpus.slices, SEGMENT, parameters)
    store = Store.create(folder / "store", manifest)
    windows = [[parameter.name for parameter in parameters]]
    store.commit_calibration(worker.calibrate(corpus.calibration(config.record.calibration), windows))
    worker.prepare(store.calibration or {}, windows)
    for name in corpus.slices:
        for leaf in manifest.leaves(name):
            bad = worker.record(corpus.range(name, leaf.first, leaf.last), 0, {})
            segment = Segment(name, leaf.first, leaf.last, leaf.last - leaf.first - len(bad))
            store.commit(worker.write(store.begin(segment), segment, 0), segment)
        print(f"recorded {name}", file=sys.stderr, flush=True)


def report(options: Any, folder: Path) -> None:
    """Carry it out and print."""
    engine = EngineOptions("threads", options.threads)
    source = Store.open(options.run / "store")
    late = last_segments(source, options.share)
    early = [segment for segment in source.segments() if segment not in late]
    scratch, grown = {}, {}
    for seed in range(options.seeds):
        scratch[seed] = from_scratch(source, folder / f"scratch{seed}", seed, engine)
        grown[seed] = grow(source, folder / f"grown{seed}", early, late, seed, engine)
    between = [
        adjusted_rand_score(scratch[one].labels, scratch[other].labels)
        for one, other in combinations(scratch, 2)
    ]
    across = [
        adjusted_rand_score(scratch[one].labels, grown[other].labels) for one in scratch for other in grown
    ]
    rows = [
        [name, *shown(trials[seed]), ""]
        for seed in scratch
        for name, trials in (
            (f"from scratch, seed {seed}", scratch),
            ("  10 % more, its stored centres", grown),
        )
    ]
    seconds = {
        name: median([t.seconds for t in its.values()]) for name, its in (("s", scratch), ("g", grown))
    }
    steps = {
        name: median([t.report.seconds_clustering for t in its.values()])
        for name, its in (("s", scratch), ("g", grown))
    }
    kept = min(trial.kept for trial in grown.values())
    rows.append(
        ["agreement of seeds from scratch", "", "", "", "", f"{np.mean(between):.3f} ± {np.std(between):.3f}"]
    )
    rows.append(
        [
            "agreement of more data with scratch",
            "",
            "",
            "",
            "",
            f"{np.mean(across):.3f} ± {np.std(across):.3f}",
        ]
    )
    goals = [
        at_least(
            "agreement with from scratch, over that of seeds", float(np.mean(across) / np.mean(between)), 1.0
        ),
        at_most("seconds over from scratch", seconds["g"] / seconds["s"], 0.4),
        at_most("seconds of k-means itself over from scratch", steps["g"] / steps["s"], 0.4),
        at_least("weights that keep their cell's number", kept, 0.5),
    ]
    rows, goals = new_slice(source, folder / "slice", engine, rows, goals)
    headings = ("", "seconds", "iterations", "inertia", "churn", "Rand index")
    finish("incremental", headings, rows, goals, options.json, {"kept": kept})


def new_slice(
    source: Store, place: Path, engine: EngineOptions, rows: list[list[Any]], goals: list[Goal]
) -> tuple[list[list[Any]], list[Goal]]:
    """A slice that comes later: is it to be seen in a cell?"""
    name = next(iter(source.manifest.slices))
    copy_segments(source, place, [segment for segment in source.segments() if segment.slice != name])
    score_and_cluster(place, ClusterConfig(), engine)
    copy_segments(source, place, [segment for segment in source.segments() if segment.slice == name])
    score_run(str(place), ScoreConfig(), engine)
    found = cluster_run(str(place), ClusterConfig(), engine)
    share = max(cell.slices.get(name, 0.0) for cell in found.cells)
    assert found.churn is not None
    line = [
        f"slice {name} added",
        "",
        found.iterations,
        f"{found.inertia:.6g}",
        f"{found.churn.share:.2%}",
        "",
    ]
    goal = at_least(f"largest share of slice {name} in a cell", share, 0.5)
    return [*rows, line], [*goals, goal]


def last_segments(store: Store, share: float) -> list[Segment]:
    """The last segments of every slice that make up a share of it."""
    found = []
    for name in store.manifest.slices:
        live = store.segments(name)
        count = max(1, round(share * len(live)))
        if len(live) < 2 * count:
            raise SystemExit(f"slice {name} has {len(live)} live segments, too few")
        found += live[-count:]
    return found


def copy_segments(source: Store, place: Path, segments: Iterable[Segment]) -> None:
    """Commit segments of one store to another, which is made if it is not there."""
    location = place / "store"
    if Store.exists(location):
        target = Store.open(location, read_only=False)
    else:
        target = Store.create(location, source.manifest)
        target.commit_calibration(source.calibration or {})
    reader, calibration = source.reader(), source.calibration or {}
    for segment in segments:
        fork = target.begin(segment)
        writer = SegmentWriter(fork, segment.slice, segment.first, segment.last)
        for parameter in source.manifest.parameters if segment.samples else ():
            array = reader.array(segment, parameter.name)
            chunks = ((first, np.asarray(array[first:last])) for first, last in bands(parameter.shape))
            books = reader.codebooks(segment, parameter.name)
            writer.write(parameter.name, parameter.shape, calibration[parameter.name], books, chunks)
        target.commit(fork, segment)


def score_and_cluster(place: Path, config: ClusterConfig, engine: EngineOptions) -> ClusterReport:
    """Both stages."""
    score_run(str(place), ScoreConfig(), engine)
    return cluster_run(str(place), config, engine, fresh=True)


@dataclass(frozen=True)
class Trial:
    """One clustering: its report, its seconds, the cells, and the share of weights that kept theirs."""

    report: ClusterReport
    seconds: float
    labels: np.ndarray
    kept: float = 1.0


def from_scratch(source: Store, place: Path, seed: int, engine: EngineOptions) -> Trial:
    """All segments, clustered from scratch twice: the second time with all kernels compiled."""
    copy_segments(source, place, source.segments())
    config = ClusterConfig(seed=seed)
    score_and_cluster(place, config, engine)
    began = time.perf_counter()
    found = cluster_run(str(place), config, engine, fresh=True)
    return Trial(found, time.perf_counter() - began, labels_of(place))


def grow(
    source: Store, place: Path, early: list[Segment], late: list[Segment], seed: int, engine: EngineOptions
) -> Trial:
    """The early segments from scratch, then all from the stored centres."""
    config = ClusterConfig(seed=seed)
    copy_segments(source, place, early)
    score_and_cluster(place, config, engine)
    before = labels_of(place)
    copy_segments(source, place, late)
    score_run(str(place), ScoreConfig(), engine)
    began = time.perf_counter()
    found = cluster_run(str(place), config, engine)
    seconds = time.perf_counter() - began
    after = labels_of(place)
    return Trial(found, seconds, after, float(np.mean(before == after)))


def shown(trial: Trial) -> list[Any]:
    """Cells of the table."""
    report = trial.report
    return [f"{trial.seconds:.2f}", report.iterations, f"{report.inertia:.6g}", f"{1 - trial.kept:.2%}"]


def labels_of(place: Path) -> np.ndarray:
    """Cells of all weights outside the trunk."""
    run = open_run(place)
    labels = np.concatenate([np.asarray(run.labels(p.name)).reshape(-1) for p in run.parameters])
    return np.asarray(labels[labels != NO_CELL])


if __name__ == "__main__":
    main()
