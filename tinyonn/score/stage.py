"""``tinyonn score``: every live segment, out of core, into one scored record and one affinity per weight.

Data flow: plan (groups of tensors, memory) → Dask tasks (`merged`), each of which reads its tensors' records from all
segments and their weights from the base model and writes ``rows`` and ``affinity`` into a fork → one commit by this
process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tinyonn.config import Config, ScoreConfig
from tinyonn.dense.parameters import Parameter
from tinyonn.dense.weights import BaseWeights
from tinyonn.errors import InputError
from tinyonn.places import local_folder, store_location
from tinyonn.plan.demands import codec_bytes
from tinyonn.record.identity import check_base
from tinyonn.score.merged import ScoreTask, score_tensors, task_bytes
from tinyonn.score.source import EXPONENTS, ReadWeights, tensors_outside
from tinyonn.show.pace import Phase
from tinyonn.show.progress import Bar
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import MiB, format_seconds
from tinyonn.store.lock import RunLock
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import THREADS, Call, EngineOptions, Fit, Watch, computing

if TYPE_CHECKING:
    pass

LOG = logging.getLogger(__name__)

TASK_WEIGHTS = 1 << 22  # small tensors are put together to so many
OWN_BYTES = 610 * MiB  # of the process: Python with the store, Dask, Torch and Numba's kernels being compiled
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
