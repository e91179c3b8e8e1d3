"""How well the INT4 codes keep the order of the weights: Spearman with exact float64 means, tensor by tensor.

    python benchmarks/fidelity.py [--samples 1024] [--max-tokens 128] [--json]

Records the shipped corpus through the shipped model as a run does (calibration, segments, store, merge, one code over
all slices), then goes over the same samples once more in float64 (`exact.py`). Exact means are of ``log2 act`` and of
``log2 |grad|``, unclipped, and of the share of samples above the threshold. The logarithm of zero counts as -126, that
of the smallest normal float32: an embedding's row whose token is absent did nothing, and that is as little as a
float32 can say. What comes out if zero counts as the tensor's own smallest value is printed too. Columns:

- INT4: one code per weight over all slices, as `Run.records` gives it;
- before: the average over the slices before that last rounding (`Run.mean`);
- levels: sums of every sample's own levels, exact and unrounded: what levels of half an octave allow;
- ideal: the best that any 4-bit code can do, equal mass on the exact means;
- saturating: every sample's level added to an INT4 counter that stops at 15, as first thought of.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scipy.stats import rankdata

from benchmarks.exact import ExactTensor, exact_statistics
from benchmarks.report import at_least, finish, show
from tinyonn.config import Config, parse_config
from tinyonn.corpus.corpus import Corpus, prepare_corpus
from tinyonn.dense.load import fingerprint_model, load_tokenizer
from tinyonn.dense.parameters import Parameter
from tinyonn.plan.recording import segment_size
from tinyonn.record.worker import Worker
from tinyonn.run import Run, open_run
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.merge import merge_ready, next_segment
from tinyonn.store.records import CODES, STATISTICS, Float64, unpack
from tinyonn.store.repository import Store

ZERO = -126.0
WAYS = ("INT4", "before", "levels", "ideal", "saturating")


def main() -> None:
    """Record, go over the samples again, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1024, help="over all slices")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--segment", type=int, help="samples per segment (default: as a run chooses)")
    parser.add_argument("--max-live", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tinyonn-fidelity-") as folder:
        report(options, Path(folder))


def report(options: Any, folder: Path) -> None:
    """Carry it out in a folder and print."""
    started = time.perf_counter()
    config = config_of(options)
    corpus = prepare_corpus(config, load_tokenizer(config.model), folder / "corpus.arrow")
    worker = Worker(config.model, options.threads, config.record.seed)
    parameters = worker.load().parameters
    segments = record(config, corpus, worker, parameters, folder)
    recorded = time.perf_counter()
    run = open_run(folder)
    samples = (s for name, count in corpus.slices.items() for s in corpus.range(name, 0, count))
    exact = exact_statistics(worker.recorder, samples, run.calibration, Ticker("exact", len(corpus)))
    counted = time.perf_counter()
    found = [row for p in parameters for row in compare(p, run, exact.pop(p.name))]
    seconds = {"record": recorded - started, "exact": counted - recorded}
    seconds["compare"] = time.perf_counter() - counted
    print(
        f"{run.samples:,} samples of {corpus.mean_tokens:.0f} tokens in {len(corpus.slices)} slices, "
        f"{segments} segments, {len(run.segments)} live in the end; "
        + ", ".join(f"{what} {value:.0f} s" for what, value in seconds.items())
    )
    show_groups(found)
    goals = [at_least(f"{name}: mean Spearman over tensors", _mean(found, name), 0.99) for name in STATISTICS]
    columns = ("statistic", *WAYS, "INT4, zero as the smallest", "worst tensor of INT4", "")
    figures = {
        "samples": run.samples,
        "segments": segments,
        "seconds": seconds,
        "tensors": [vars(row) for row in found],
    }
    finish("fidelity", columns, [summary(found, name) for name in STATISTICS], goals, options.json, figures)


def config_of(options: Any) -> Config:
    """The configuration of a run on the shipped corpus."""
    record = {
        "calibration": options.calibration,
        "max_live": options.max_live,
        "segment": options.segment or "auto",
    }
    data = {"slice": "slice", "messages": "messages", "text": "text"}
    return parse_config(
        {
            "model": {"path": options.model, "device": "cpu", "dtype": options.dtype},
            "data": {**data, "samples": options.samples, "max_tokens": options.max_tokens},
            "record": {**record, "threads": options.threads},
        },
        whole=True,
    )


def record(
    config: Config, corpus: Corpus, worker: Worker, parameters: tuple[Parameter, ...], folder: Path
) -> int:
    """Record all of the corpus into ``folder/store`` and merge, as the driver does with one worker; segments."""
    size = config.record.segment
    if size == "auto":
        size = segment_size(parameters, len(corpus), corpus.mean_tokens, len(corpus.slices), "cpu")
    manifest = Manifest(
        fingerprint_model(config.model),
        {"corpus": corpus.fingerprint},
        {},
        corpus.slices,
        size,
        parameters,
        config.record.seed,
        config.record.max_live,
    )
    store = Store.create(folder / "store", manifest)
    windows = [[parameter.name for parameter in parameters]]
    store.commit_calibration(worker.calibrate(corpus.calibration(config.record.calibration), windows))
    worker.prepare(store.calibration or {}, windows)
    tick, segments = Ticker("recorded", len(corpus)), 0
    while (segment := next_segment(manifest, store.segments(), [], 1)) is not None:
        bad = worker.record(corpus.range(segment.slice, segment.first, segment.last), 0, {})
        good = segment.last - segment.first - len(bad)
        if bad:
            raise SystemExit(f"samples were set aside, the comparison would be of different ones: {bad}")
        segment = Segment(segment.slice, segment.first, segment.last, good)
        store.commit(worker.write(store.begin(segment), segment, 0), segment)
        merge_ready(store)
        segments += 1
        tick(good)
    return segments


@dataclass(frozen=True)
class Row:
    """One statistic of one tensor: Spearman of each way with the exact means; None where those are all equal."""

    tensor: str
    group: str
    statistic: str
    size: int
    spearman: dict[str, float] | None
    smallest: float | None  # of INT4, with zero counted as the tensor's smallest value


def compare(parameter: Parameter, run: Run, exact: ExactTensor) -> Iterator[Row]:
    """Judge the three statistics of one tensor."""
    codes, before = unpack(run.records(parameter.name)), run.mean(parameter.name)
    n = len(exact.squares)
    act_levels, above = exact.levels()
    sums = (act_levels, exact.grad_levels, above)
    for s, (name, mean, other) in enumerate(
        zip(STATISTICS, exact.means(ZERO), exact.means(None), strict=True)
    ):
        group = parameter.role if parameter.kind == "linear" else parameter.kind
        ranks = _ranks(mean)
        if ranks.min() == ranks.max():
            yield Row(parameter.name, group, name, parameter.size, None, None)
            continue
        ideal = np.floor((ranks - 0.5) * CODES / ranks.size)
        values = (codes[s], before[s], sums[s] / n, ideal, np.minimum(sums[s], CODES - 1))
        spearman = {way: _correlation(ranks, _ranks(value)) for way, value in zip(WAYS, values, strict=True)}
        yield Row(
            parameter.name,
            group,
            name,
            parameter.size,
            spearman,
            _correlation(_ranks(other), _ranks(codes[s])),
        )


def _ranks(values: Any) -> Float64:
    return np.asarray(rankdata(np.asarray(values).reshape(-1)))


def _correlation(a: Float64, b: Float64) -> float:
    """Pearson of ranks, which is Spearman; 0 where one side is all ties, which then tells nothing."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size > 0 else 0.0


def _mean(rows: list[Row], statistic: str, way: str = "INT4") -> float:
    values = [row.spearman[way] for row in rows if row.statistic == statistic and row.spearman is not None]
    return float(np.mean(values)) if values else float("nan")


def summary(rows: list[Row], statistic: str) -> list[object]:
    """Means over the tensors, and the worst tensor."""
    judged = [row for row in rows if row.statistic == statistic and row.spearman is not None]
    worst = min(judged, key=lambda row: (row.spearman or {})["INT4"])
    other = float(np.mean([row.smallest for row in judged if row.smallest is not None]))
    means = [_mean(rows, statistic, way) for way in WAYS]
    return [statistic, *means, other, worst.tensor, (worst.spearman or {})["INT4"]]


def show_groups(rows: list[Row]) -> None:
    """Means over the tensors of each role, and which tensors have nothing to rank."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    left_out = defaultdict(list)
    for row in rows:
        if row.spearman is None:
            left_out[row.statistic].append(row.tensor)
        else:
            groups[row.statistic, row.group].append(row)
    lines = []
    for (statistic, group), members in groups.items():
        lowest = min((row.spearman or {})["INT4"] for row in members)
        means = [_mean(members, statistic, way) for way in WAYS]
        lines.append([statistic, group, len(members), *means, lowest])
    order = {name: number for number, name in enumerate(STATISTICS)}
    lines.sort(key=lambda line: order[str(line[0])])
    show("Spearman with the exact means", ("statistic", "tensors of", "", *WAYS, "lowest INT4"), lines)
    for statistic, names in left_out.items():
        print(f"{statistic}: all exact means are equal, nothing to rank, in {len(names)}: {', '.join(names)}")


class Ticker:
    """A line on stderr now and then."""

    def __init__(self, what: str, total: int, every: float = 20.0) -> None:
        self.what, self.total, self.every, self.done, self.last = what, total, every, 0, time.perf_counter()

    def __call__(self, count: int = 1) -> None:
        """Count."""
        self.done += count
        if time.perf_counter() - self.last > self.every or self.done == self.total:
            self.last = time.perf_counter()
            print(f"{self.what} {self.done}/{self.total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
