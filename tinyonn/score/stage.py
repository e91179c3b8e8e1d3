"""``tinyonn score``: every live segment, out of core, into one scored record and one affinity per weight.

Data flow: plan (groups of tensors, memory) → Dask tasks, each of which reads its tensors' chunks from all segments,
fits their tables, scores them and writes ``rows`` and ``affinity`` into a fork → one commit by this process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tinyonn.config import ScoreConfig
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.places import local_folder, store_location
from tinyonn.plan.demands import codec_bytes
from tinyonn.score.tables import Part, ScoreTables, ScoreWeights, fit_tables, score_records
from tinyonn.show.pace import Phase
from tinyonn.show.progress import Bar
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import MiB, format_seconds
from tinyonn.store.arrays import BandWriter, attributes_of, band_rows, bands, codebooks_of, read_chunk
from tinyonn.store.lock import RunLock
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.reader import Reader
from tinyonn.store.records import TensorCalibration, UInt16
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import THREADS, Call, EngineOptions, Fit, Watch, computing

if TYPE_CHECKING:
    from icechunk import ForkSession

LOG = logging.getLogger(__name__)
T = TypeVar("T")

LOOKED_AT = 1 << 18  # weights of a tensor that its tables are fitted to
LOOKED_AT_BANDS = 8  # that they are taken from, evenly spread
HELD_BYTES = 128 * MiB  # of records a task keeps between fitting and scoring, instead of reading them again
TASK_WEIGHTS = 1 << 22  # small tensors are put together to so many
OWN_BYTES = 345 * MiB  # of the process: Python with the store, Dask and Numba's kernels as they are compiled
FEW_SAMPLES = 16  # of a slice, below which its affinity is mostly chance


@dataclass(frozen=True)
class ScoreReport:
    """What a call of `score_run` did."""

    location: str
    samples: int
    weights: int
    tensors: int
    slices: dict[str, int]
    workers: int
    score_seconds: float
    fresh: bool
    warnings: tuple[str, ...] = ()
    planned_rss_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        rate = self.weights / self.score_seconds if self.fresh and self.score_seconds > 0 else 0.0
        return {**asdict(self), "warnings": list(self.warnings), "weights_per_second": rate}

    def table(self) -> Sheet:
        """For people."""
        what = f"{self.weights:,} weights in {self.tensors} tensors"
        done = (
            f"{what} in {format_seconds(self.score_seconds)}"
            if self.fresh
            else "nothing to do: scored already"
        )
        notes = [done, *(f"warning: {text}" for text in self.warnings)]
        sheet = Sheet(f"scored {whole(self.location)}", notes).text("slice").number("samples")
        for name, count in self.slices.items():
            sheet.add(whole(name), f"{count:,}")
        return sheet


@dataclass(frozen=True)
class ScoreTask:
    """Some tensors, scored by one task."""

    parameters: tuple[Parameter, ...]
    calibration: dict[str, TensorCalibration]
    segments: tuple[tuple[Segment, int], ...]
    slices: int
    weights: ScoreWeights


def score_run(location: str, config: ScoreConfig, options: EngineOptions = THREADS) -> ScoreReport:
    """Score a run; may be killed at any moment and called again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : ScoreConfig
    options : EngineOptions

    Raises
    ------
    InputError
        No run is there, or nothing is recorded.
    CapacityError
        The memory limit is below what one task needs, or the disk is full.
    StoreBusyError
        Another process records, merges or scores the run.
    StoreDamagedError
        Names tensor and chunk; what was scored before stays.
    """
    started = time.monotonic()
    check_recorded(Store.open(store_location(location)))
    with RunLock(local_folder(location), what="score"):
        store = Store.open(store_location(location), read_only=False)
        segments = check_recorded(store)
        described = describe_score(config, segments)
        fresh = store.reader().stage("rows") != described
        fit = Fit(0, 0)
        if fresh:
            fit = _score(store, config, segments, described, options)
    slices = samples_by_slice(store.manifest, segments)
    return ScoreReport(
        location,
        sum(slices.values()),
        sum(parameter.size for parameter in store.manifest.parameters),
        len(store.manifest.parameters),
        slices,
        fit.workers,
        time.monotonic() - started,
        fresh,
        tuple(_warnings(slices)),
        fit.bytes,
    )


def check_recorded(store: Store) -> list[Segment]:
    """Live segments with samples; refuses a run that has none."""
    segments = [segment for segment in store.segments() if segment.samples]
    if not segments:
        raise InputError(f"{store.location}: no samples are recorded yet; run `tinyonn record` first")
    return segments


def describe_score(config: ScoreConfig, segments: Sequence[Segment]) -> dict[str, Any]:
    """What decides the bits of rows and affinity, as the attributes of both groups."""
    weights = config.weights
    return {
        "weights": {"act": weights[0], "grad": weights[1], "freq": weights[2]},
        "segments": {segment.name: segment.samples for segment in segments},
    }


def samples_by_slice(manifest: Manifest, segments: Sequence[Segment]) -> dict[str, int]:
    """Samples of every slice of the run, in the manifest's order, which is that of the affinities."""
    return {name: sum(s.samples for s in segments if s.slice == name) for name in manifest.slices}


def _warnings(slices: dict[str, int]) -> Iterator[str]:
    for name, samples in slices.items():
        if samples < FEW_SAMPLES:
            yield (
                f"slice {name} has {samples} samples, fewer than {FEW_SAMPLES}: "
                "its affinities are mostly chance; record more of it"
            )


def _score(
    store: Store,
    config: ScoreConfig,
    segments: Sequence[Segment],
    described: dict[str, Any],
    options: EngineOptions,
) -> Fit:
    """Carry out the tasks and commit; how many ran at a time, and what they needed."""
    manifest = store.manifest
    calibration = store.calibration or {}
    names = list(manifest.slices)
    order = sorted(segments, key=lambda segment: names.index(segment.slice))
    placed = tuple((segment, names.index(segment.slice)) for segment in order)
    groups = task_groups(manifest.parameters)
    own = OWN_BYTES + codec_bytes(parameter.shape for parameter in manifest.parameters)
    fit = options.fit(task_needs(groups, len(placed)), "scoring", own)
    workers = fit.workers
    weights = ScoreWeights(*config.weights)
    tasks = [
        ScoreTask(tuple(group), {p.name: calibration[p.name] for p in group}, placed, len(names), weights)
        for group in groups
    ]
    forks = store.begin_stage("score", len(tasks))
    try:
        reader = store.reader()
        total = sum(parameter.size for parameter in manifest.parameters)
        with (
            Bar("scoring", [Phase("", total, parallel=workers)], "weights") as bar,
            computing(options, workers, Watch(bar, _weights)) as compute,
        ):
            done = compute(
                [(score_tensors, (reader, fork, task)) for fork, task in zip(forks, tasks, strict=True)]
            )
        affinity = {
            **described,
            "slices": names,
            "fields": {"slice": {"shift": 4}, "selectivity": {"shift": 0}},
        }
        store.commit_stage("score", {"rows": described, "affinity": affinity}, done)
    finally:
        store.drop_stage("score")
    store.clean()
    LOG.debug("scored %s: %d tasks, %d workers", store.location, len(tasks), workers)
    return fit


def _weights(call: Call) -> float:
    """Of a call of `score_tensors`."""
    task: ScoreTask = call[1][2]
    return sum(parameter.size for parameter in task.parameters)


def task_groups(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """Tensors of one task each, largest first; small ones together."""
    groups: list[list[Parameter]] = []
    room = 0
    for parameter in sorted(parameters, key=lambda p: (-p.size, p.name)):
        if not groups or room < parameter.size:
            groups.append([])
            room = TASK_WEIGHTS
        groups[-1].append(parameter)
        room -= parameter.size
    return groups


def task_needs(groups: Sequence[Sequence[Parameter]], parts: int) -> list[int]:
    """Memory of every task: its largest tensor's."""
    return [max(task_bytes(parameter.shape, parts) for parameter in group) for group in groups]


def task_bytes(shape: tuple[int, ...], parts: int) -> int:
    """Memory of one task while it scores a tensor with so many parts.

    A band's records of all parts are read while those of the band before are still there, unless all of a tensor's are
    kept; beside them are a chunk as it is stored, twice, rows and affinity, and both as they are stored.
    """
    band = 2 * band_rows(shape) * prod(shape[1:])
    whole = 2 * prod(shape) * parts
    few = len(list(bands(shape))) <= LOOKED_AT_BANDS
    held = whole if few and whole <= HELD_BYTES else 0
    looked_at = 2 * min(LOOKED_AT * 2, prod(shape)) * parts * 2
    reading = (1 if held or band >= 2 * prod(shape) else 2) * band * parts
    return held + max(looked_at, reading) + 2 * band + 3 * band


def score_tensors(reader: Reader, fork: ForkSession, task: ScoreTask) -> ForkSession:
    """A task: score its tensors into the fork and hand the fork back."""
    for parameter in task.parameters:
        _score_tensor(reader, fork, task, parameter)
    return fork


def _score_tensor(reader: Reader, fork: ForkSession, task: ScoreTask, parameter: Parameter) -> None:
    name, shape = parameter.name, parameter.shape
    arrays = [(reader.array(segment, name), reader.what(segment, name)) for segment, _ in task.segments]
    parts = [
        Part(number, segment.samples, codebooks_of(array, what))
        for (segment, number), (array, what) in zip(task.segments, arrays, strict=True)
    ]
    spans = list(bands(shape))
    chosen = spread(spans, LOOKED_AT_BANDS)
    hold = 2 * parameter.size * len(parts) <= HELD_BYTES and len(chosen) == len(spans)
    held: dict[int, UInt16] = {}
    looked_at = []
    for first, last in chosen:
        records = _read(arrays, first, last)
        looked_at.append(_thinned(records, shape, LOOKED_AT // len(chosen)))
        if hold:
            held[first] = records
    tables = fit_tables(parts, list(np.concatenate(looked_at, axis=1)), task.weights, task.slices)
    del looked_at
    rows = BandWriter(fork, f"rows/{name}", shape, "uint16", row_attributes(task, name, tables))
    affinity = BandWriter(fork, f"affinity/{name}", shape, "uint8", {})
    for first, last in spans:
        records = held.pop(first) if first in held else _read(arrays, first, last)
        scored = np.empty(records.shape[1], np.uint16)
        compared = np.empty(records.shape[1], np.uint8)
        score_records(
            records, tables.shares, tables.slices, tables.codes, tables.score, tables.bias, scored, compared
        )
        band = (last - first, *shape[1:])
        rows.write(first, scored.reshape(band))
        affinity.write(first, compared.reshape(band))


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * most)] for i in range(most)]


def row_attributes(task: ScoreTask, name: str, tables: ScoreTables) -> dict[str, Any]:
    """What makes a tensor's scored records readable: as of a segment, and how S follows from the codes."""
    attributes = attributes_of(task.calibration[name], tables.codebooks)
    weights = task.weights.signed
    attributes["fields"]["score"] = {
        "shift": 0,
        "bits": 4,
        "unit": "code of equal mass of S = sum of weight * (codebook[code] - mean) / deviation",
        "weight": [float(value) for value in weights],
        "mean": [float(value) for value in tables.mean],
        "deviation": [float(value) for value in tables.deviation],
    }
    return attributes


def _read(arrays: list[tuple[Any, str]], first: int, last: int) -> UInt16:
    """Rows of all parts, flat: uint16 [parts, weights]."""
    out = np.empty((len(arrays), (last - first) * prod(arrays[0][0].shape[1:])), np.uint16)
    for row, (array, what) in zip(out, arrays, strict=True):
        read_chunk(array, first, last, row, what)
    return out


def _thinned(records: UInt16, shape: tuple[int, ...], most: int) -> UInt16:
    """Every so many-th row of a band, with at most about `most` weights: uint16 [parts, weights]."""
    width = prod(shape[1:])
    by_row = records.reshape(records.shape[0], -1, width)
    step = max(1, ceil(records.shape[1] / most))
    return np.ascontiguousarray(by_row[:, ::step]).reshape(records.shape[0], -1)
