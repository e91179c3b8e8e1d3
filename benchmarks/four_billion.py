"""Four billion weights on one machine: Qwen1.5-4B's shape, random weights.

    python benchmarks/four_billion.py record [--samples 4] [--tokens 32] [--json]
    python benchmarks/four_billion.py synth storage/large --reference storage/demo-full
    python benchmarks/four_billion.py score storage/large [--json]
    python benchmarks/four_billion.py cluster storage/large [--json]
    python benchmarks/four_billion.py assemble storage/large [--json]

``record`` builds the model in NF4, calibrates, records, commits the segment of 3.95 billion records, reads it back
whole, compares the checksum of every band with what was written, and writes the same bytes raw to a file, in blocks
that are on the disk before the clock stops. It prints the seconds of each part and the process's peak memory beside
what `tinyonn plan` says. It needs 16 GB of disk, and gives them back.

``synth`` writes a recorded run of the same shape (`synthetic.py`); ``score`` and ``cluster`` run on it what ``tinyonn``
runs, in a process of its own with a limit of 2 GiB, beside the same reading and writing alone (`large_run.py`).
``assemble`` does so with 4 GiB, and takes 5 GB for a while (`large_assembly.py`). ``cluster`` and ``assemble`` read a
random base model in BF16, which they make: another 8 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Goal, at_most, finish
from tinyonn.config import ModelConfig, RecordConfig
from tinyonn.corpus.file import Sample
from tinyonn.dense.parameters import Parameter
from tinyonn.dense.source import SHAPES
from tinyonn.machine import free_disk, free_ram
from tinyonn.plan.demands import LIBRARY_BYTES, DataFacts, Machine
from tinyonn.plan.facts import describe_model
from tinyonn.plan.recording import RecordPlan, plan_record
from tinyonn.record.worker import Worker
from tinyonn.show.sizes import GiB, MiB, format_size
from tinyonn.store.arrays import SegmentWriter, bands
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.records import Float64, TensorCalibration, UInt16
from tinyonn.store.repository import Store

MOST_BYTES = 18 * GiB
RAW_BLOCK = 256 * MiB
SIZES = {"calibrate": "calibration", "record": "samples"}


def main() -> None:
    """Parse and carry out a subcommand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    one = commands.add_parser("record", help="record and commit one segment, and read it back")
    one.add_argument("--samples", type=int, default=4)
    one.add_argument("--tokens", type=int, default=32)
    one.add_argument("--calibration", type=int, default=2, help="samples")
    one.add_argument("--threads", type=int, default=2)
    one.add_argument(
        "--shape", type=Path, default=SHAPES / "Qwen--Qwen1.5-4B", help="folder of a config.json"
    )
    one.add_argument(
        "--change", type=json.loads, default={}, help="of the config: '{\"num_hidden_layers\": 2}'"
    )
    one.add_argument("--folder", type=Path, help="where the store and the raw file go for a while")
    one.add_argument("--json", action="store_true")
    one.set_defaults(run=record)
    two = commands.add_parser("synth", help="write a run to score and cluster: 3 slices take 17 GB of disk")
    two.add_argument("run", type=Path, help="folder of the new run")
    two.add_argument(
        "--reference", type=Path, default=Path("storage/demo-full"), help="a recorded, merged run"
    )
    two.add_argument("--slices", type=int, default=3)
    two.add_argument("--threads", type=int, default=2)
    two.add_argument("--shape", type=Path, default=SHAPES / "Qwen--Qwen1.5-4B")
    two.add_argument("--json", action="store_true")
    for name, what, memory in (
        ("score", "score a synthetic run", "2GiB"),
        ("cluster", "cluster it", "2GiB"),
        ("assemble", "assemble it", "4GiB"),
    ):
        three = commands.add_parser(name, help=f"{what}, beside the same reading and writing alone")
        three.add_argument("run", type=Path)
        three.add_argument("--memory", default=memory)
        three.add_argument(
            "--workers", type=int, default=4, help="threads of ours and of the input and output"
        )
        three.add_argument("--json", action="store_true")
        if name != "score":
            three.add_argument("--budget", type=float, default=1e9)
            three.add_argument("--shape", type=Path, default=SHAPES / "Qwen--Qwen1.5-4B")
    options = parser.parse_args()
    if options.command is None:
        parser.print_help()
        return
    if options.command != "record":
        from benchmarks.large_assembly import assemble
        from benchmarks.large_run import cluster, score, synth

        stages = {"synth": synth, "score": score, "cluster": cluster, "assemble": assemble}
        stages[options.command](options)
        return
    with tempfile.TemporaryDirectory(prefix="tinyonn-4b-", dir=options.folder) as folder:
        options.run(options, Path(folder))


@dataclass
class Part:
    """What one part of the benchmark took: seconds, and the process's peak of resident memory meanwhile."""

    what: str
    seconds: float = 0.0
    peak: int = 0


class Parts:
    """Times the parts; `more` holds what is known of them besides."""

    def __init__(self) -> None:
        self.list: list[Part] = []

    @contextmanager
    def part(self, what: str) -> Iterator[Part]:
        """Time what is inside."""
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        part = Part(what)
        started = time.perf_counter()
        yield part
        part.seconds = time.perf_counter() - started
        status = Path("/proc/self/status").read_text().splitlines()
        part.peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        self.list.append(part)

    @property
    def peak(self) -> int:
        """Of all parts."""
        return max(part.peak for part in self.list)


class CheckedWriter(SegmentWriter):
    """Keeps the checksum of every band that is written, and the seconds of making the bands."""

    checksums: dict[tuple[str, int], int]
    encoding: float
    checking: float

    def write(
        self,
        name: str,
        shape: tuple[int, ...],
        calibration: TensorCalibration,
        codebooks: Float64,
        bands: Iterable[tuple[int, UInt16]],
    ) -> None:
        """As it was, looking on."""

        def seen() -> Iterator[tuple[int, UInt16]]:
            source = iter(bands)
            while True:
                started = time.perf_counter()
                item = next(source, None)
                made = time.perf_counter()
                CheckedWriter.encoding += made - started
                if item is None:
                    return
                self.checksums[name, item[0]] = checksum(item[1])
                CheckedWriter.checking += time.perf_counter() - made
                yield item

        super().write(name, shape, calibration, codebooks, seen())


def checksum(band: UInt16) -> int:
    """CRC-32 of a band's bytes."""
    return zlib.crc32(plain_bytes(band))


def plain_bytes(band: UInt16) -> memoryview:
    """A band's bytes, in place if they lie together."""
    data: Any = np.ascontiguousarray(band)
    return memoryview(data).cast("B")


def record(options: Any, folder: Path) -> None:
    """Build, calibrate, record, commit, read back, write raw."""
    from benchmarks.random_model import random_nf4

    shape = changed_shape(options.shape, options.change, folder / "shape")
    plan = plan_of(shape, options, folder)
    if free_ram() < plan.worker_ram_bytes + GiB // 2:
        raise SystemExit(
            f"{format_size(plan.worker_ram_bytes)} are planned and {format_size(free_ram())} of RAM are free; "
            "stop other programs, or take fewer layers: --change '{\"num_hidden_layers\": 20}'"
        )
    parts = Parts()
    worker = Worker(ModelConfig(path=str(shape)), options.threads, seed=0)
    with parts.part("build"):
        facts = worker.adopt(random_nf4(shape))
    windows = [[parameter.name for parameter in facts.parameters]]
    samples = random_samples(max(options.samples, options.calibration), options.tokens, plan.model.vocabulary)
    with parts.part("calibrate"):
        calibration = worker.calibrate(samples[: options.calibration], windows)
    worker.prepare(calibration, windows)
    segment = Segment("random", 0, options.samples, options.samples)
    manifest = Manifest({}, {}, {}, {"random": options.samples}, options.samples, facts.parameters)
    store = Store.create(folder / "store", manifest)
    store.commit_calibration(calibration)
    with parts.part("record"):
        bad = worker.record(samples[: options.samples], 0, {})
        assert not bad, bad
    CheckedWriter.checksums, CheckedWriter.encoding, CheckedWriter.checking = {}, 0.0, 0.0
    with parts.part("commit") as commit, patch("tinyonn.store.arrays.SegmentWriter", CheckedWriter):
        assert store.commit(worker.write(store.begin(segment), segment, 0), segment)
        os.sync()
    commit.seconds -= CheckedWriter.checking
    stored = leave_the_cache(folder / "store")
    with parts.part("read back and check") as reading:
        raw = Raw(folder / "raw")
        wrong = read_back(store, segment, facts.parameters, raw)
    reading.seconds -= raw.seconds + raw.checking
    show_results(options, plan, parts, raw, stored, wrong)


def changed_shape(source: Path, changes: dict[str, Any], folder: Path) -> Path:
    """A folder with a changed ``config.json``."""
    folder.mkdir()
    tree = json.loads((source / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(tree | changes), "utf-8")
    return folder


def plan_of(shape: Path, options: Any, folder: Path) -> RecordPlan:
    """The plan for the same model, samples and machine."""
    parameters, model = describe_model(ModelConfig(path=str(shape), device="cpu"))
    data = DataFacts(options.samples, options.tokens, options.tokens, 1)
    machine = Machine("cpu", None, free_ram(), free_disk(folder), options.threads)
    config = RecordConfig(
        segment=options.samples,
        workers=1,
        windows=1,
        threads=options.threads,
        calibration=options.calibration,
        max_live=1,
    )
    return plan_record(parameters, model, data, machine, config)


def random_samples(count: int, tokens: int, vocabulary: int) -> list[Sample]:
    """Samples of random tokens, all labelled."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (count, tokens)).astype(np.int32)
    return [Sample(index, "random", row, row.copy()) for index, row in enumerate(ids)]


def leave_the_cache(folder: Path) -> int:
    """Have the files read from the disk next time; their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            total += path.stat().st_size
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return total


class Raw:
    """A file that blocks of bands are written to, each on the disk before the clock stops."""

    def __init__(self, path: Path) -> None:
        self.seconds = self.checking = 0.0
        self.bytes = 0
        self._stream = path.open("wb", buffering=0)
        self._block: list[UInt16] = []
        self._held = 0

    def add(self, band: UInt16) -> None:
        """Take a band; write when there is a block of them."""
        self._block.append(band)
        self._held += band.nbytes
        if self._held >= RAW_BLOCK:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        started = time.perf_counter()
        for band in self._block:
            self._stream.write(plain_bytes(band))
        os.fsync(self._stream.fileno())
        self.seconds += time.perf_counter() - started
        self.bytes += self._held
        self._block, self._held = [], 0


def read_back(store: Store, segment: Segment, parameters: Iterable[Parameter], raw: Raw) -> int:
    """Read every band, write it raw, and count those that are not what was written."""
    reader, wrong, left = store.reader(), 0, dict(CheckedWriter.checksums)
    for parameter in parameters:
        array = reader.array(segment, parameter.name)
        for first, last in bands(parameter.shape):
            band = np.asarray(array[first:last])
            started = time.perf_counter()
            wrong += left.pop((parameter.name, first), None) != checksum(band)
            raw.checking += time.perf_counter() - started
            raw.add(band)
    raw.flush()
    return wrong + len(left)


def show_results(options: Any, plan: RecordPlan, parts: Parts, raw: Raw, stored: int, wrong: int) -> None:
    """Print."""
    seconds = {part.what: part.seconds for part in parts.list}
    commit, reading = seconds["commit"], seconds["read back and check"]
    encoding = CheckedWriter.encoding
    each = {what: seconds[what] / getattr(options, size) for what, size in SIZES.items()}
    notes = {
        "build": f"{plan.weights / 1e9:.3f} billion weights in {plan.tensors} tensors",
        "calibrate": f"{options.calibration} samples: {each['calibrate']:.1f} s each",
        "record": f"{options.samples} samples of {options.tokens} tokens: {each['record']:.1f} s each",
        "commit": f"{_rate(raw.bytes, commit)} of records, {_rate(stored, commit)} stored; "
        f"encoding {encoding:.1f} s, packing and writing {commit - encoding:.1f} s",
        "read back and check": f"{_rate(raw.bytes, reading)} of records, cold; "
        f"{len(CheckedWriter.checksums)} bands, {wrong} not as written",
    }
    planned = plan.worker_ram_bytes + LIBRARY_BYTES
    needs = ", ".join(f"{need.what} {need.bytes / GiB:.2f}" for need in plan.worker.needs)
    raw_note = (
        f"{_rate(raw.bytes, raw.seconds)}, synced; the commit takes {commit / raw.seconds:.2f} times as long"
    )
    disk_note = f"{stored / 1e9:.3f} of {raw.bytes / 1e9:.3f} GB: {stored / plan.weights:.3f} bytes a weight"
    rows = [
        *(
            [part.what, f"{part.seconds:.1f}", f"{part.peak / GiB:.2f}", notes[part.what]]
            for part in parts.list
        ),
        ["the same bytes raw", f"{raw.seconds:.1f}", "", raw_note],
        ["on disk", "", "", disk_note],
        ["planned", "", f"{planned / GiB:.2f}", needs],
    ]
    goals = [
        at_most("peak RSS, GiB", parts.peak / GiB, MOST_BYTES / GiB),
        at_most("peak RSS, distance from the plan", abs(parts.peak / planned - 1), 0.15),
        Goal("bands read back that differ", wrong, "== 0", wrong == 0),
    ]
    figures = {
        "weights": plan.weights,
        "seconds": seconds | {"raw": raw.seconds, "encode": encoding},
        "record_bytes": raw.bytes,
        "stored_bytes": stored,
        "commit_over_raw": commit / raw.seconds,
        "peak_rss_bytes": {part.what: part.peak for part in parts.list},
        "planned_bytes": {need.what: need.bytes for need in plan.worker.needs},
    }
    finish("four_billion record", ("", "seconds", "peak GiB", ""), rows, goals, options.json, figures)


def _rate(size: int, seconds: float) -> str:
    return f"{size / seconds / 1e9:.3f} GB/s"


if __name__ == "__main__":
    main()
