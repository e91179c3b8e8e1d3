"""``tinyonn score``: every live segment, out of core, into one scored record and one affinity per weight.

Data flow: plan (groups of tensors, memory) → Dask tasks, each of which reads its tensors' chunks from all segments and
its weights from the base model, fits tables (`tables`), merges the records, gives every weight its S (`scores`) and
writes ``rows`` and ``affinity`` into a fork → one commit by this process.

S is what `tinyonn assemble` cuts by, made by the same function; a row holds its code of equal mass in the tensor. The
trunk is never cut: its codes are of what the records alone say, and its weights are not read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from tinyonn.config import Config, ScoreConfig
from tinyonn.dense.parameters import Parameter
from tinyonn.dense.weights import BaseWeights
from tinyonn.errors import InputError
from tinyonn.places import local_folder, store_location
from tinyonn.plan.demands import codec_bytes
from tinyonn.record.identity import check_base
from tinyonn.score.scores import TensorScore, family
from tinyonn.score.source import EXPONENTS, Band, Float32, ReadWeights, tensors_outside
from tinyonn.score.tables import Part, ScoreTables, fit_tables, score_records
from tinyonn.show.pace import Phase
from tinyonn.show.progress import Bar
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import MiB, format_seconds
from tinyonn.store.arrays import BandWriter, attributes_of, band_rows, bands, codebooks_of, read_chunk, spread
from tinyonn.store.lock import RunLock
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.reader import Reader
from tinyonn.store.records import CODES, TensorCalibration, UInt8, UInt16
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import THREADS, Call, EngineOptions, Fit, Watch, computing

if TYPE_CHECKING:
    from icechunk import ForkSession

LOG = logging.getLogger(__name__)
UInt32 = np.ndarray[Any, np.dtype[np.uint32]]

LOOKED_AT = 1 << 18  # weights of a tensor that its tables are fitted to
LOOKED_AT_BANDS = 8  # that they are taken from, evenly spread
HELD_BYTES = 128 * MiB  # of records a task keeps between fitting and scoring, instead of reading them again
TASK_WEIGHTS = 1 << 22  # small tensors are put together to so many
OWN_BYTES = (
    640 * MiB
)  # of the process: Python with the store, Dask, Torch and Numba's kernels as they are compiled
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
    exponents: tuple[float, float, float, float]
    weights: ReadWeights
    transposed: frozenset[str]


def score_run(location: str, config: Config, options: EngineOptions = THREADS) -> ScoreReport:
    """Score a run; may be killed at any moment and called again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : Config
        Its score; and its model, which must be the recorded one.
    options : EngineOptions

    Raises
    ------
    InputError
        No run is there, nothing is recorded, or the base model is not the recorded one.
    CapacityError
        The memory limit is below what one task needs, or the disk is full.
    StoreBusyError
        Another process records, merges or scores the run.
    StoreDamagedError
        Names tensor and chunk; what was scored before stays.
    """
    store = Store.open(store_location(location))
    check_recorded(store)
    base = BaseWeights(config.model)
    check_base(store, location, config.model)
    return score_store(location, config.score, (base.recorded_rows, base.recorded_across), options)


def score_store(
    location: str,
    config: ScoreConfig,
    base: tuple[ReadWeights, frozenset[str]],
    options: EngineOptions = THREADS,
) -> ScoreReport:
    """The same with weights from anywhere.

    Parameters
    ----------
    base : (callable, frozenset of str)
        As of `tinyonn.score.source.RunSource`: its weights, and the tensors whose rows are inputs.
    """
    started = time.monotonic()
    with RunLock(local_folder(location), what="score"):
        store = Store.open(store_location(location), read_only=False)
        segments = check_recorded(store)
        described = describe_score(config, segments)
        fresh = store.reader().stage("rows") != described
        fit = Fit(0, 0)
        if fresh:
            fit = _score(store, config, base, described, options)
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
    return {
        "weights": dict(zip(EXPONENTS, config.exponents, strict=True)),
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
    base: tuple[ReadWeights, frozenset[str]],
    described: dict[str, Any],
    options: EngineOptions,
) -> Fit:
    """Carry out the tasks and commit; how many ran at a time, and what they needed."""
    manifest, segments = store.manifest, check_recorded(store)
    calibration = store.calibration or {}
    names = list(manifest.slices)
    order = sorted(segments, key=lambda segment: names.index(segment.slice))
    placed = tuple((segment, names.index(segment.slice)) for segment in order)
    groups = task_groups(manifest.parameters)
    own = OWN_BYTES + codec_bytes(parameter.shape for parameter in manifest.parameters)
    fit = options.fit(task_needs(groups, len(placed)), "scoring", own)
    workers = fit.workers
    tasks = [
        ScoreTask(
            tuple(group),
            {parameter.name: calibration[parameter.name] for parameter in group},
            placed,
            len(names),
            config.exponents,
            *base,
        )
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
    cut = set(tensors_outside([parameter for group in groups for parameter in group]))
    return [max(task_bytes(p.shape, parts, p in cut) for p in group) for group in groups]


def task_bytes(shape: tuple[int, ...], parts: int, cut: bool = True) -> int:
    """Memory of one task while it scores a tensor with so many parts.

    A band's records of all parts are read while those of the band before are still there, unless all of a tensor's are
    kept, and with them what is made of them; beside them are a chunk as it is stored, twice, rows and affinity, and
    both as they are stored; of a tensor that can be cut its weights, as read, as rounded and in float32, and their S.
    """
    count = band_rows(shape) * prod(shape[1:])
    band = 2 * count
    whole = 2 * prod(shape) * parts
    held = whole + 7 * prod(shape) if _few(shape) and whole <= HELD_BYTES else 0
    looked_at = 2 * min(LOOKED_AT * 2, prod(shape)) * parts * 2
    reading = (1 if held or band >= 2 * prod(shape) else 2) * band * parts
    scoring = (8 + 4 + 4 + 4) * count if cut else 0
    return held + max(looked_at, reading) + 2 * band + 3 * band + scoring


def _few(shape: tuple[int, ...]) -> bool:
    return len(list(bands(shape))) <= LOOKED_AT_BANDS


def score_tensors(reader: Reader, fork: ForkSession, task: ScoreTask) -> ForkSession:
    """A task: score its tensors into the fork and hand the fork back."""
    for parameter in task.parameters:
        _score_tensor(reader, fork, task, parameter)
    return fork


def _score_tensor(reader: Reader, fork: ForkSession, task: ScoreTask, parameter: Parameter) -> None:
    name, shape = parameter.name, parameter.shape
    merged = Merged(reader, task, parameter)
    score, codes = None, None
    if tensors_outside([parameter]):
        score = family(*task.exponents).prepare(merged, parameter)
        codes = merged.thresholds(score)
    attributes = row_attributes(task, name, merged.tables, codes)
    rows = BandWriter(fork, f"rows/{name}", shape, "uint16", attributes)
    affinity = BandWriter(fork, f"affinity/{name}", shape, "uint8", {})
    for first, last in bands(shape):
        records, compared = merged.both(first, last)
        if score is not None and codes is not None:
            band = Band(first, records=records, weights=merged.weights(first, last))
            _add_codes(_keys(score(band)).reshape(-1), codes, records.reshape(-1))
        rows.write(first, records)
        affinity.write(first, compared)


class Merged:
    """A tensor's rows before they are written: the records of all segments as one, and the base's weights.

    Parameters
    ----------
    reader : Reader
    task : ScoreTask
    parameter : Parameter

    Attributes
    ----------
    tables : ScoreTables
    transposed : frozenset of str
    """

    def __init__(self, reader: Reader, task: ScoreTask, parameter: Parameter) -> None:
        self._task, self._name, self._shape = task, parameter.name, parameter.shape
        self._cut = bool(tensors_outside([parameter]))
        self.transposed = task.transposed
        name, shape = parameter.name, parameter.shape
        self._arrays = [
            (reader.array(segment, name), reader.what(segment, name)) for segment, _ in task.segments
        ]
        parts = [
            Part(number, segment.samples, codebooks_of(array, what))
            for (segment, number), (array, what) in zip(task.segments, self._arrays, strict=True)
        ]
        self._chosen = spread(list(bands(shape)), LOOKED_AT_BANDS)
        self._hold = 2 * parameter.size * len(parts) <= HELD_BYTES and _few(shape)
        self._held: dict[int, UInt16] = {}
        self._made: dict[int, tuple[UInt16, UInt8]] = {}
        self._read: dict[int, Float32] = {}
        looked_at = []
        for first, last in self._chosen:
            records = _read(self._arrays, first, last)
            looked_at.append(_thinned(records, shape, LOOKED_AT // len(self._chosen)))
            if self._hold:
                self._held[first] = records
        together = list(np.concatenate(looked_at, axis=1))
        self.tables = fit_tables(parts, together, task.exponents, task.slices)

    def attributes(self, name: str) -> dict[str, Any]:
        """Of the rows to be, but for how S is coded."""
        return row_attributes(self._task, name, self.tables)

    def both(self, first: int, last: int) -> tuple[UInt16, UInt8]:
        """Rows [first, last): records whose score is 0 where the tensor can be cut, and affinity."""
        if first in self._made:
            return self._made[first]
        records = self._held.pop(first) if first in self._held else _read(self._arrays, first, last)
        tables = self.tables
        scored, compared = np.empty(records.shape[1], np.uint16), np.empty(records.shape[1], np.uint8)
        score_records(
            records, tables.shares, tables.slices, tables.codes, tables.score, tables.bias, scored, compared
        )
        if self._cut:
            scored &= np.uint16(0xFFF0)
        band = (last - first, *self._shape[1:])
        found = scored.reshape(band), compared.reshape(band)
        if self._hold:
            self._made[first] = found
        return found

    def weights(self, first: int, last: int) -> Float32:
        """Of the base model: float32 [rows, columns]."""
        if first in self._read:
            return self._read[first]
        found = np.ascontiguousarray(self._task.weights(self._name, first, last), dtype=np.float32)
        if self._hold:
            self._read[first] = found
        return found

    def band(self, name: str, first: int, last: int, needs: Collection[str]) -> Band:
        """As `tinyonn.score.source.Rows` has it."""
        records = self.both(first, last)[0] if "records" in needs else None
        return Band(first, records, weights=self.weights(first, last) if "weights" in needs else None)

    def thresholds(self, score: TensorScore) -> UInt32:
        """Keys of S where a code ends and the next begins, of equal mass over what is looked at: uint32 [15]."""
        found = []
        for first, last in self._chosen:
            band = self.band(self._name, first, last, ("records", "weights"))
            keys = _keys(score(band)).reshape(-1)
            step = (
                ceil(keys.size * len(self._chosen) / LOOKED_AT) | 1
            )  # odd, so that all columns have their turn
            found.append(keys[::step])
        keys = np.sort(np.concatenate(found))
        return keys[(np.arange(1, CODES) * keys.size) // CODES]


def _keys(scores: Float32) -> UInt32:
    """Integers that order like scores from 0 on."""
    return scores.view(np.uint32)


@njit(nogil=True, cache=True)
def _add_codes(keys: Any, thresholds: Any, rows: Any) -> None:
    for i in range(keys.size):
        code = 0
        for step in (8, 4, 2, 1):
            if keys[i] >= thresholds[code + step - 1]:
                code += step
        rows[i] |= np.uint16(code)


def row_attributes(
    task: ScoreTask, name: str, tables: ScoreTables, thresholds: UInt32 | None = None
) -> dict[str, Any]:
    """What makes a tensor's scored records readable: as of a segment, and where the codes of S begin."""
    attributes = attributes_of(task.calibration[name], tables.codebooks)
    of_s = "code of equal mass of S = a log2 rms + b log2 g + c share + d log2 |W|"
    attributes["fields"]["score"] = {
        "shift": 0,
        "bits": 4,
        "unit": of_s if thresholds is not None else f"{of_s}, |W| counting through act alone",
        "weight": list(task.exponents),
    }
    if thresholds is not None:
        attributes["fields"]["score"]["from"] = [float(value) for value in thresholds.view(np.float32)]
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
