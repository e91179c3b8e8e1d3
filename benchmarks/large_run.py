"""Scoring and clustering a run of billions of weights, beside the same input and output alone; see `four_billion.py`.

The bytes that a stage reads and writes are read and written once more, compressed as they are, through the same store,
with as many threads, and nothing is done with them. Clustering looks at some bands before it reads all: those count
once. Before each part the run's files leave the page cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from icechunk import ForkSession
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync

from benchmarks.report import Goal, at_most, finish
from benchmarks.synthetic import synthesise
from tinyonn.config import ModelConfig
from tinyonn.dense.parameters import Parameter
from tinyonn.plan.facts import describe_model
from tinyonn.score.source import tensors_outside
from tinyonn.show.sizes import GiB
from tinyonn.store.arrays import band_rows, bands, create_array
from tinyonn.store.repository import Store

FILE_BLOCK = 1 << 23


def synth(options: Any) -> None:
    """Write the run."""
    parameters, _ = describe_model(ModelConfig(path=str(options.shape), device="cpu"))
    started = time.perf_counter()
    size = synthesise(
        options.reference, tuple(parameters), options.slices, options.run / "store", options.threads
    )
    seconds = time.perf_counter() - started
    stored = disk_bytes(options.run / "store")
    weights = sum(parameter.size for parameter in parameters)
    rows = [[options.slices, f"{weights / 1e9:.3f} billion", f"{stored / 1e9:.2f}", f"{seconds:.0f}"]]
    finish(
        "four_billion synth",
        ("slices", "weights", "GB stored", "seconds"),
        rows,
        [],
        options.json,
        {"raw": size},
    )


def score(options: Any) -> None:
    """Score, and the same reading and writing alone."""
    store = Store.open(options.run / "store")
    weights = sum(parameter.size for parameter in store.manifest.parameters)
    forget(options.run, ("rows", "affinity", "labels"))
    own = run_stage("score", options, [])
    reader = Store.open(options.run / "store").reader()
    segments = [segment.path for segment in reader.segments if segment.samples]
    alone = input_output(options, segments, ["rows", "affinity"], store.manifest.parameters)
    goals = [at_most("score: seconds over input and output alone", own.seconds / alone.seconds, 1.5)]
    show(options, "score", weights, own, [("input and output alone", alone)], goals)


def cluster(options: Any) -> None:
    """Cluster from scratch, and the same reading and writing alone."""
    store = Store.open(options.run / "store")
    inside = tensors_outside(store.manifest.parameters)
    base, config = with_base(options, store.manifest.parameters)
    forget(options.run, ("labels",))
    own = run_stage("cluster", options, ["--config", str(config), "--fresh"])
    segments = [segment.path for segment in store.segments() if segment.samples]
    alone = input_output(options, segments, ["labels"], inside, files_of(base, inside))
    goals = [at_most("cluster: seconds", own.seconds, 600)]
    show(options, "cluster", sum(p.size for p in inside), own, [("input and output alone", alone)], goals)


def with_base(options: Any, parameters: Sequence[Parameter]) -> tuple[Path, Path]:
    """A base model of random weights, made if it is not there; its folder, and a configuration that names it."""
    from benchmarks.random_model import write_checkpoint

    base, config = options.run / "base", options.run / "run.yaml"
    write_checkpoint(options.shape, base, parameters)
    model = {"path": str(base.absolute()), "quantization": "nf4"}
    config.write_text(json.dumps({"model": model, "experts": {"budget": options.budget}}))  # YAML holds JSON
    return base, config


def files_of(base: Path, parameters: Sequence[Parameter]) -> list[Path]:
    """Shards of a checkpoint that hold some tensors."""
    index = json.loads((base / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    return sorted({base / index[parameter.name] for parameter in parameters})


@dataclass
class Measured:
    """Seconds, the peak of resident memory of the process and its children, bytes read and written, own figures."""

    seconds: float
    peak: int
    read: int
    written: int
    figures: dict[str, Any]


def run_stage(stage: str, options: Any, more: Sequence[str]) -> Measured:
    """``tinyonn STAGE RUN`` in a process of its own."""
    leave_the_cache(options.run)
    command = [sys.executable, "-m", "tinyonn", stage, str(options.run.absolute()), "--json", *more]
    command += ["--memory", options.memory, "--workers", str(options.workers)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = PeakWatch(process.pid)
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    peak = watch.stop()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Measured(seconds, peak, 0, 0, json.loads(output.splitlines()[-1]))


class PeakWatch:
    """Samples the resident memory of a process and its children."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            try:
                family = [self._process, *self._process.children(recursive=True)]
                self.peak = max(self.peak, sum(process.memory_info().rss for process in family))
            except psutil.NoSuchProcess:
                continue

    def stop(self) -> int:
        """The peak in bytes."""
        self._done.set()
        self._thread.join()
        return self.peak


def input_output(
    options: Any,
    sources: Sequence[str],
    targets: Sequence[str],
    parameters: Sequence[Parameter],
    files: Sequence[Path] = (),
) -> Measured:
    """Read files and every chunk of the sources, and write as many bytes as the targets' chunks have."""
    store = Store.open(options.run / "store", read_only=False)
    sizes = chunk_sizes(store, targets, parameters)
    leave_the_cache(options.run)
    watch = PeakWatch(os.getpid())
    base = watch.peak
    reading: Any = store.reader()._store
    groups = sorted(parameters, key=lambda parameter: -parameter.size)
    forks = store.begin_stage("benchmark", options.workers)
    started = time.perf_counter()

    def work(number: int) -> tuple[ForkSession, int, int]:
        fork, read, written = forks[number], 0, 0
        for file in files[number :: options.workers]:
            with file.open("rb", buffering=0) as stream:
                while block := stream.read(FILE_BLOCK):
                    read += len(block)
        for parameter in groups[number :: options.workers]:
            for target in targets:
                chunks = (band_rows(parameter.shape), *parameter.shape[1:])
                path = f"benchmark/{target}/{parameter.name}"
                create_array(fork.store, path, parameter.shape, "uint8", chunks, {})
            for key in chunk_keys(parameter):
                data = b""
                for source in sources:
                    found = sync(reading.get(f"{source}/{parameter.name}/{key}", default_buffer_prototype()))
                    data = found.to_bytes() if found is not None else b""
                    read += len(data)
                for target in targets:
                    size = sizes[f"{target}/{parameter.name}/{key}"]
                    chunk = (data * (size // max(len(data), 1) + 1))[:size]
                    name = f"benchmark/{target}/{parameter.name}/{key}"
                    sync(fork.store.set(name, cpu.Buffer.from_bytes(chunk)))
                    written += size
        return fork, read, written

    with ThreadPoolExecutor(options.workers) as pool:
        done = list(pool.map(work, range(options.workers)))
    seconds = time.perf_counter() - started
    store.drop_stage("benchmark")
    store.clean()
    read, written = sum(part[1] for part in done), sum(part[2] for part in done)
    return Measured(seconds, max(watch.stop(), base), read, written, {})


def chunk_keys(parameter: Parameter) -> Iterator[str]:
    """Keys of a tensor's chunks below its array."""
    zeros = "/0" * (len(parameter.shape) - 1)
    for number, _ in enumerate(bands(parameter.shape)):
        yield f"c/{number}{zeros}"


def chunk_sizes(store: Store, targets: Sequence[str], parameters: Sequence[Parameter]) -> dict[str, int]:
    """Compressed bytes of the targets' chunks."""
    reading: Any = store.reader()._store
    sizes = {}
    for target in targets:
        for parameter in parameters:
            for key in chunk_keys(parameter):
                name = f"{target}/{parameter.name}/{key}"
                sizes[name] = int(sync(reading.getsize(name)))
    return sizes


def forget(run: Path, groups: Sequence[str]) -> None:
    """Drop a stage's earlier output, so that it is done anew."""
    store = Store.open(run / "store", read_only=False)
    session = store._repository.writable_session("main")
    present = [group for group in groups if store.reader().stage(group) is not None]
    for group in present:
        sync(session.store.delete_dir(group))
    if present:
        session.commit("forget")
        store.clean()


def leave_the_cache(folder: Path) -> None:
    """Have the files read from the disk next time."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show(
    options: Any,
    stage: str,
    weights: int,
    own: Measured,
    others: Sequence[tuple[str, Measured]],
    goals: list[Goal],
) -> None:
    """Print."""
    moved = sum(other.read + other.written for _, other in others)
    rows = [
        [f"tinyonn {stage}", f"{own.seconds:.1f}", *_rates(own, weights, moved)],
        *([name, f"{other.seconds:.1f}", *_rates(other, weights, moved)] for name, other in others),
    ]
    parts = {key: value for key, value in own.figures.items() if key.startswith("seconds_")}
    if parts:
        print(", ".join(f"{key.removeprefix('seconds_')} {value:.1f} s" for key, value in parts.items()))
    goals = [*goals, at_most(f"{stage}: peak RSS of all processes, GiB", own.peak / GiB, 2)]
    figures = {
        "weights": weights,
        "seconds": own.seconds,
        "alone": {name: other.seconds for name, other in others},
        "read": sum(other.read for _, other in others),
        "written": sum(other.written for _, other in others),
        "parts": parts,
        "planned_rss_bytes": own.figures.get("planned_rss_bytes"),
    }
    headings = ("", "seconds", "million weights/s", "GB/s, compressed", "peak GiB")
    finish(f"four_billion {stage}", headings, rows, goals, options.json, figures)


def _rates(measured: Measured, weights: int, moved: int) -> list[str]:
    return [
        f"{weights / measured.seconds / 1e6:.0f}",
        f"{moved / measured.seconds / 1e9:.2f}",
        f"{measured.peak / GiB:.2f}",
    ]
