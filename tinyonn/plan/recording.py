"""What recording needs, stated before anything is loaded: windows, workers, segments, memory of every tier.

`plan_record` is pure. It takes facts of the model, the data and the machine and returns a `RecordPlan`, or
refuses with the limit and a remedy that it has tried. What a tier must hold is in `demands.py`.

The time, by constants that stand here and nowhere else. Per sample: 2 flop per weight and token forward, 2 backward to
the inputs, 2 for the weight gradient; with several windows the first four are spent for each window, and gradient
checkpointing adds a forward pass. On a CPU every weight's level is also found and summed. Per segment: every tensor's
arrays and every weight's record are made and written. The segment size decides the bits of a run, so it depends on the
model and the data, never on a measured time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import CapacityError, InputError
from tinyonn.machine import Device
from tinyonn.plan.demands import (
    BATCH,
    LIBRARY_BYTES,
    MERGING_BYTES,
    RAY_BYTES,
    SYSTEM_BYTES,
    DataFacts,
    Machine,
    ModelFacts,
    Need,
    Tier,
    compute_needs,
    disk_tier,
    host_needs,
)
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_count, format_seconds, format_size

if TYPE_CHECKING:
    from tinyonn.config import RecordConfig

Auto = Literal["auto"]

# A worker of one thread on a two-core x86 machine, bf16, as measured; a consumer card, half used, as assumed.
FLOP_PER_SECOND: dict[Device, float] = {"cpu": 90e9, "cuda": 20e12}
LEVEL_SECONDS: dict[Device, float] = {"cpu": 1e-9, "cuda": 0.0}  # per weight and sample
TENSOR_SECONDS = 3e-3  # of a commit, per tensor: metadata, codebooks, tables
RECORD_SECONDS = 25e-9  # of a commit, per weight: encoding, compression, writing

SEGMENTS = 64  # that a run should have
COMMIT_SHARE = 0.03  # of the recording that committing may cost at most
LOST_SECONDS = 15 * 60  # of one worker's work that a crash may lose at most; wins over the share
EXACT_SAMPLES = 65535 // 15  # levels of so many samples fit in a uint16


@dataclass(frozen=True)
class RecordOptions:
    """What of the configuration's section `record` a plan depends on."""

    segment: int | Auto
    workers: int | Auto
    threads: int
    windows: int | Auto
    max_live: int


@dataclass(frozen=True)
class RecordPlan:
    """How a run will be recorded and what that takes. Print `table` or read `figures`."""

    model: ModelFacts
    data: DataFacts
    device: Device
    tensors: int
    weights: int
    segment_size: int
    segments: int
    windows: int
    workers: int
    places: int
    worker: Tier
    tiers: tuple[Tier, ...]
    seconds: float

    @property
    def worker_ram_bytes(self) -> int:
        """RAM of one worker process, its own: beside libraries, which all share (`LIBRARY_BYTES`)."""
        return self.worker.total

    @property
    def ram_bytes(self) -> int:
        """RAM of all processes together, to compare with `tinyonn.plan.usage`."""
        return next(tier.total for tier in self.tiers if tier.name == "RAM")

    def workers_for(self, room: int) -> int:
        """Workers for `room` places by GPUs or CPUs: the planned share of them."""
        return max(1, room * self.workers // self.places)

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        tiers = {
            tier.name: {
                "needs": {need.what: need.bytes for need in tier.needs},
                "bytes": tier.total,
                "limit": tier.limit,
            }
            for tier in (self.worker, *self.tiers)
        }
        own = {
            name: getattr(self, name)
            for name in ("device", "tensors", "weights", "segment_size", "segments", "windows")
        }
        return own | {
            "workers": self.workers,
            "worker_ram_bytes": self.worker_ram_bytes,
            "estimated_seconds": round(self.seconds, 1),
            "model": self.model.name,
            "origin": self.model.origin,
            "data": asdict(self.data),
            "tiers": tiers,
        }

    def table(self) -> Sheet:
        """For people."""
        title = f"{whole(self.model.name)}: {format_count(self.weights)} weights in {self.tensors} tensors"
        samples = (
            f"{self.data.samples:,} samples of {self.data.mean_tokens:,.0f} tokens (cut at {self.data.max_tokens:,}) "
            f"in {self.data.slices} slices: {self.segments:,} segments of {self.segment_size:,}"
        )
        workers = (
            f"{self.workers} worker(s) on {self.device}, {self.windows} window(s) of layers, "
            f"about {format_seconds(self.seconds)}"
        )
        read = [f"data: {form}" for form in self.data.forms]
        origin = [self.model.origin] if self.model.origin else []
        notes = [*origin, samples, *read, workers, *(f"assumed: {what}" for what in self.data.assumed)]
        sheet = Sheet(title, notes).text("where", "what").number("needs", "has")
        for tier in (self.worker, *self.tiers):
            for need in tier.needs:
                sheet.add("", need.what, format_size(need.bytes), "")
            limit = "" if tier.limit is None else format_size(tier.limit)
            sheet.add(tier.name, "together", format_size(tier.total), limit, style="bold", last=True)
        return sheet


def plan_record(
    parameters: Sequence[Parameter],
    model: ModelFacts,
    data: DataFacts,
    machine: Machine,
    record: RecordConfig | RecordOptions,
) -> RecordPlan:
    """Choose windows and workers so that everything fits, the fastest first.

    Parameters
    ----------
    parameters : sequence of Parameter
        From `list_parameters`, in model order.
    model, data, machine
        Facts.
    record : RecordConfig or RecordOptions
        Numbers given there are kept, ``auto`` is chosen here.

    Raises
    ------
    InputError
        More windows than there are layers and tensors outside them.
    CapacityError
        Names what is needed, the limit and what would help.
    """
    options = RecordOptions(**{field.name: getattr(record, field.name) for field in fields(RecordOptions)})
    best = _fastest(parameters, model, data, machine, options)
    if isinstance(best, RecordPlan):
        return best
    remedy = _remedy(parameters, model, data, machine, options)
    largest = sorted(best.needs, key=lambda need: -need.bytes)[:3]
    what = ", ".join(f"{need.what} {format_size(need.bytes)}" for need in largest)
    raise CapacityError(
        f"{model.name}: {format_size(best.total)} of {best.name} are needed and "
        f"{format_size(best.limit or 0)} are there ({what}); {remedy}"
    )


def _fastest(
    parameters: Sequence[Parameter],
    model: ModelFacts,
    data: DataFacts,
    machine: Machine,
    record: RecordOptions,
) -> RecordPlan | Tier:
    """The plan with the most samples per second; else the tier that is too small where least is missing."""
    names = [(parameter.name, parameter.layer, parameter.size) for parameter in parameters]
    most = len({p.layer for p in parameters} - {None}) + sum(p.layer is None for p in parameters)
    if record.windows != "auto" and record.windows > most:
        raise InputError(
            f"record.windows = {record.windows:,} is more than the {most} layers and tensors outside layers of "
            f"{model.name}; give {most} or less, or auto"
        )
    counts = range(1, most + 1) if record.windows == "auto" else range(record.windows, record.windows + 1)
    most_workers = min(places(machine, record), _segments(parameters, data, machine, record)[1])
    workers = range(most_workers, 0, -1) if record.workers == "auto" else (record.workers,)
    by_name = {parameter.name: parameter for parameter in parameters}
    plans: list[RecordPlan] = []
    short: list[Tier] = []
    for windows in counts:
        held = [[by_name[name] for name in window] for window in layer_windows(names, windows)]
        for number in workers:
            plan = _state(parameters, held, model, data, machine, record, number)
            lacking = [tier for tier in plan.tiers if not tier.fits]
            if not lacking:
                plans.append(plan)
                break
            short += lacking[:1]
    if plans:
        return min(plans, key=lambda plan: plan.seconds)
    return min(short, key=lambda tier: tier.total - (tier.limit or 0))


def places(machine: Machine, record: RecordOptions) -> int:
    """Workers that a machine can hold by its GPUs or CPUs."""
    return max(1, machine.units if machine.device == "cuda" else machine.units // record.threads)


def _segments(
    parameters: Sequence[Parameter], data: DataFacts, machine: Machine, record: RecordOptions
) -> tuple[int, int]:
    """Samples per segment, and how many segments that makes if the slices are of like size."""
    size = record.segment
    if size == "auto":
        size = segment_size(parameters, data.samples, data.mean_tokens, data.slices, machine.device)
    return size, ceil(data.samples / data.slices / size) * data.slices


def _state(
    parameters: Sequence[Parameter],
    held: Sequence[Sequence[Parameter]],
    model: ModelFacts,
    data: DataFacts,
    machine: Machine,
    record: RecordOptions,
    workers: int,
) -> RecordPlan:
    """What one choice of windows and workers needs."""
    device = machine.device
    weights = sum(parameter.size for parameter in parameters)
    size, segments = _segments(parameters, data, machine, record)
    compute = compute_needs(parameters, held, model, data, device)
    spills = min(size, data.samples) > BATCH
    host = host_needs(parameters, held, model, device, spills)
    worker = Tier("RAM of a worker", tuple(host if device == "cuda" else [*compute, *host]), None)
    ram = Tier(
        "RAM",
        (
            Need(f"{workers} worker(s)", workers * worker.total),
            Need("driver and merging", MERGING_BYTES),
            Need("Ray's own processes", RAY_BYTES),
            Need("libraries, which all share", LIBRARY_BYTES),
        ),
        max(0, machine.ram - SYSTEM_BYTES),
    )
    tiers = [ram, disk_tier(weights, data, machine, min(record.max_live, segments), workers)]
    if device == "cuda":
        tiers.insert(0, Tier("VRAM of a GPU", tuple(compute), machine.vram))
    windows = len(held)
    each = sample_seconds(weights, data.mean_tokens, device, windows, model.checkpointing)
    seconds = (data.samples * each + segments * commit_seconds(weights, len(parameters))) / workers
    return RecordPlan(
        model,
        data,
        device,
        len(parameters),
        weights,
        size,
        segments,
        windows,
        workers,
        places(machine, record),
        worker,
        tuple(tiers),
        seconds,
    )


def _remedy(
    parameters: Sequence[Parameter],
    model: ModelFacts,
    data: DataFacts,
    machine: Machine,
    record: RecordOptions,
) -> str:
    """The first change of the configuration that would make it fit, tried out."""
    auto = replace(record, windows="auto", workers="auto")
    changes: list[tuple[str, ModelFacts, DataFacts, Machine, RecordOptions]]
    changes = [
        ("record.windows: auto and record.workers: auto", model, data, machine, auto),
        ("model.checkpointing: true", replace(model, checkpointing=True), data, machine, auto),
        ("model.quantization: nf4", replace(model, quantization="nf4"), data, machine, auto),
        ("record.max_live: 1", model, data, machine, replace(record, max_live=1)),
        ("data.slices: 2 and record.max_live: 1", model, replace(data, slices=min(2, data.slices)), machine,
         replace(record, max_live=1)),
    ]  # fmt: skip
    tokens = data.max_tokens // 2
    while tokens >= 64:
        shorter = replace(data, max_tokens=tokens, mean_tokens=min(data.mean_tokens, tokens))
        checkpointed = replace(model, checkpointing=True)
        changes.append(
            (f"data.max_tokens: {tokens} and model.checkpointing: true", checkpointed, shorter, machine, auto)
        )
        tokens //= 2
    small = replace(auto, segment=BATCH)
    exact = f"record.segment: {BATCH}, which needs no uint16 sums"
    changes.append((exact, model, data, machine, small))
    for text, its_model, its_data, its_machine, its_record in changes:
        if isinstance(_fastest(parameters, its_model, its_data, its_machine, its_record), RecordPlan):
            return f"it fits with {text}"
    return "use a smaller model, or a machine with more of it"


def layer_windows(names: Sequence[tuple[str, int | None, int]], windows: int) -> list[list[str]]:
    """Split tensors into windows of near-equal size that keep a layer together.

    Parameters
    ----------
    names : sequence of (name, layer, size)
        In model order.
    windows : int
    """
    groups: list[tuple[int | None, list[str], int]] = []
    for name, layer, size in names:
        if groups and layer is not None and groups[-1][0] == layer:
            groups[-1][1].append(name)
            groups[-1] = (layer, groups[-1][1], groups[-1][2] + size)
        else:
            groups.append((layer, [name], size))
    total = sum(group[2] for group in groups)
    result: dict[int, list[str]] = {}
    seen = 0
    for _, members, size in groups:
        place = min(math.floor((seen + size / 2) * windows / total), windows - 1)
        result.setdefault(place, []).extend(members)
        seen += size
    return list(result.values())


def sample_seconds(
    weights: int, tokens: float, device: Device, windows: int = 1, checkpointing: bool = False
) -> float:
    """Seconds that one worker takes for one sample of `tokens` tokens."""
    passes = (6 if checkpointing else 4) * windows + 2
    return passes * weights * max(tokens, 1.0) / FLOP_PER_SECOND[device] + weights * LEVEL_SECONDS[device]


def commit_seconds(weights: int, tensors: int) -> float:
    """Seconds that encoding and committing one segment takes."""
    return tensors * TENSOR_SECONDS + weights * RECORD_SECONDS


def segment_size(
    parameters: Sequence[Parameter], samples: int, mean_tokens: float, slices: int, device_kind: Device
) -> int:
    """Samples per segment for ``record.segment: auto``.

    About 64 segments a run, as many in each slice; more samples where committing would cost over 3 % of
    recording; no more than 15 minutes of a worker's work, nor than a uint16 can sum.

    Parameters
    ----------
    parameters : sequence of Parameter
    samples : int
        Of all slices together.
    mean_tokens : float
    slices : int
        Number of slices; a segment never crosses one.
    device_kind : str
        ``cpu`` or ``cuda``: what the run is made for, not what is free at the moment.

    Returns
    -------
    int, at least 1
    """
    weights = sum(parameter.size for parameter in parameters)
    each = sample_seconds(weights, mean_tokens, device_kind)
    many = ceil(samples / max(1, slices) / max(1, round(SEGMENTS / max(1, slices))))
    cheap = ceil(commit_seconds(weights, len(parameters)) / (COMMIT_SHARE * each))
    return max(1, min(max(many, cheap), int(LOST_SECONDS / each), EXACT_SAMPLES))
