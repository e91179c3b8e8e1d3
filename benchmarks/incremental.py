"""Clustering again after new data: how much is kept, how long it takes, beside clustering from scratch.

    python benchmarks/incremental.py [storage/many] [--json]
    python benchmarks/incremental.py storage/few --samples 70 --segment 2 --seeds 2

RUN holds ten segments of 16 samples in every slice, not merged; it is recorded, with the shipped model and corpus, if
it is not there. A copy gets the first nine tenths of each slice, is scored and clustered, then gets the rest, is scored
and clustered again from the stored centres. Beside it all of the run is clustered from scratch. Both are done with
several seeds. Another copy lacks one slice at first.

Agreement is the adjusted Rand index of the cells of the weights that can be cut. One cell holds most of them, those
that no slice needs, and is found by all: weights that both clusterings have in their largest cell are left out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sklearn.metrics import adjusted_rand_score

from benchmarks.report import at_least, at_most, finish
from tinyonn.cli import CONFIGS
from tinyonn.cluster.labels import NO_CELL
from tinyonn.cluster.report import ClusterReport
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import ClusterConfig, Config, load_config
from tinyonn.corpus.corpus import prepare_corpus
from tinyonn.dense.load import fingerprint_model, load_tokenizer
from tinyonn.record.worker import Worker
from tinyonn.run import open_run
from tinyonn.score.stage import score_run
from tinyonn.store.arrays import SegmentWriter, bands
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import EngineOptions


def main() -> None:
    """Parse and carry out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=Path("storage/many"))
    parser.add_argument("--samples", type=int, default=1120, help="to record, of all slices together")
    parser.add_argument("--segment", type=int, default=16, help="samples of a segment")
    parser.add_argument("--share", type=float, default=0.1, help="of the samples that come later")
    parser.add_argument("--seeds", type=int, default=3, help="clusterings of each kind, at least two")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    demo = load_config(CONFIGS / "demo-full.yaml")
    if not Store.exists(options.run / "store"):
        record_leaves(options, demo)
    with tempfile.TemporaryDirectory(prefix="tinyonn-incremental-") as folder:
        report(options, demo, Path(folder))


def record_leaves(options: Any, demo: Config) -> None:
    """Record the demo's samples in small segments and merge none of them."""
    data = demo.data.model_copy(update={"samples": options.samples})
    config = demo.model_copy(update={"data": data})
    corpus = prepare_corpus(config, load_tokenizer(config.model), options.run / "corpus.arrow")
    worker = Worker(config.model, options.threads, config.record.seed)
    parameters = worker.load().parameters
    fingerprint = fingerprint_model(config.model)
    manifest = Manifest(fingerprint, {}, {}, corpus.slices, options.segment, parameters)
    store = Store.create(options.run / "store", manifest)
    windows = [[parameter.name for parameter in parameters]]
    store.commit_calibration(worker.calibrate(corpus.calibration(config.record.calibration), windows))
    worker.prepare(store.calibration or {}, windows)
    for name in corpus.slices:
        for leaf in manifest.leaves(name):
            bad = worker.record(corpus.range(name, leaf.first, leaf.last), 0, {})
            segment = Segment(name, leaf.first, leaf.last, leaf.last - leaf.first - len(bad))
            store.commit(worker.write(store.begin(segment), segment, 0), segment)
        print(f"recorded {name}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Trial:
    """One clustering; the share of weights that kept the cell they had, of all and outside the largest, if known."""

    report: ClusterReport
    seconds: float
    labels: np.ndarray
    kept: tuple[float, ...] = ()


def report(options: Any, demo: Config, folder: Path) -> None:
    """Carry it out and print."""
    engine = EngineOptions("threads", options.threads)
    source = Store.open(options.run / "store")
    late = last_segments(source, options.share)
    shutil.copytree(options.run / "store", folder / "all" / "store")
    copy_segments(source, folder / "early", [segment for segment in source.segments() if segment not in late])
    for place in (folder / "all", folder / "early"):
        score_run(str(place), demo, engine)
    # Compiles the kernels; and all that is timed has cells from before to compare with.
    cluster_run(str(folder / "all"), demo, engine)
    configs = [demo.model_copy(update={"cluster": ClusterConfig(seed=seed)}) for seed in range(options.seeds)]
    scratch = [clustered(folder / "all", config, engine, fresh=True) for config in configs]
    grown = []
    for seed, config in enumerate(configs):
        place = folder / f"grown{seed}"
        shutil.copytree(folder / "early", place)
        before = clustered(place, config, engine).labels
        copy_segments(source, place, late)
        score_run(str(place), config, engine)
        grown.append(clustered(place, config, engine, before=before))
    between = [agreement(one.labels, other.labels) for one, other in combinations(scratch, 2)]
    across = [agreement(one.labels, other.labels) for one in scratch for other in grown]
    name = next(iter(source.manifest.slices))
    own = new_slice(source, folder / "slice", name, demo, engine)
    rows = [
        *(
            [what, *cells_of(trial), ""]
            for seed, pair in enumerate(zip(scratch, grown, strict=True))
            for what, trial in zip(
                (f"from scratch, seed {seed}", "  more data, its stored centres"), pair, strict=True
            )
        ),
        ["agreement of seeds from scratch", *[""] * 7, spread(between)],
        ["agreement of more data with scratch", *[""] * 7, spread(across)],
        [f"slice {name} added", *cells_of(own), ""],
    ]
    took = [median(trial.seconds for trial in trials) for trials in (grown, scratch)]
    agreeing = float(np.mean(across) / np.mean(between))
    kept = min(trial.kept[1] for trial in grown)
    seen = weights_most_by(own.report, name) / max(weights_most_by(scratch[0].report, name), 1)
    goals = [
        at_least("agreement with from scratch, over that of seeds", agreeing, 1.0),
        at_most("seconds over from scratch", took[0] / took[1], 1.1),
        at_least("weights outside the largest cell that keep theirs", kept, 0.5),
        at_least(f"weights in cells that slice {name} needs most, once added, over from scratch", seen, 0.5),
    ]
    figures = {
        "kept_outside": kept,
        "between": between,
        "across": across,
        "seeds": list(range(options.seeds)),
    }
    columns = (
        "", "seconds", "looking", "centres", "labelling", "distance²", "churn", "outside the largest", "Rand index",
    )  # fmt: skip
    finish("incremental", columns, rows, goals, options.json, figures)


def clustered(
    place: Path, config: Config, engine: EngineOptions, fresh: bool = False, before: np.ndarray | None = None
) -> Trial:
    """Cluster a scored run."""
    began = time.perf_counter()
    found = cluster_run(str(place), config, engine, fresh)
    seconds = time.perf_counter() - began
    labels = labels_of(place)
    if before is None:
        return Trial(found, seconds, labels)
    some = apart(before, labels)
    kept = np.mean(before == labels), np.mean(before[some] == labels[some])
    return Trial(found, seconds, labels, tuple(map(float, kept)))


def apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which weights two clusterings do not both have in their largest cell."""
    first, second = (labels == np.bincount(labels).argmax() for labels in (one, other))
    return np.asarray(~(first & second))


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Adjusted Rand index of these."""
    some = apart(one, other)
    return float(adjusted_rand_score(one[some], other[some]))


def new_slice(source: Store, place: Path, name: str, config: Config, engine: EngineOptions) -> Trial:
    """The run, first without a slice, then with it."""
    copy_segments(source, place, [segment for segment in source.segments() if segment.slice != name])
    score_run(str(place), config, engine)
    before = clustered(place, config, engine).labels
    copy_segments(source, place, source.segments(name))
    score_run(str(place), config, engine)
    return clustered(place, config, engine, before=before)


def weights_most_by(report: ClusterReport, slice: str) -> int:
    """Weights in cells that one slice needs more than the others do."""
    needed = [cell for cell in report.cells if cell.needed]
    return sum(cell.size for cell in needed if min(cell.needs, key=lambda name: cell.needs[name]) == slice)


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


def cells_of(trial: Trial) -> list[str]:
    """Of the table."""
    report = trial.report
    parts = (trial.seconds, report.seconds_looking, report.seconds_centres, report.seconds_labelling)
    churn = [f"{1 - kept:.1%}" for kept in trial.kept] or ["", ""]
    return [*(f"{part:.2f}" for part in parts), f"{report.inertia:.4g}", *churn]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def labels_of(place: Path) -> np.ndarray:
    """Cells of all weights that can be cut."""
    run = open_run(place)
    labels = np.concatenate([np.asarray(run.labels(p.name)).reshape(-1) for p in run.parameters])
    return np.asarray(labels[labels != NO_CELL])


if __name__ == "__main__":
    main()
