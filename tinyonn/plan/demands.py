"""What must be held in memory and on the disk, as pure functions of the model, the data and the machine.

A stage's demands are functions beside the code that holds the bytes (`tinyonn.score.stage.task_needs`,
`tinyonn.evaluate.demand`, ...); those of passes of the dense model are here. Each begins with a process:
Python with the libraries of the stage, its kernels compiled, as measured by `tinyonn.plan.usage` on a model that takes
next to nothing.

Of a recording, one worker, with ``W`` weights in the window, ``T`` tokens, ``b`` bytes a value, hidden width ``H``,
inner width ``I`` and vocabulary ``V``, holds

- model: 9/16 byte per NF4 weight (4 bits, and a float32 scale for 64), ``b`` per weight of the trunk;
- activations: ``T (4 b I + (6 b + 9) H)`` for each layer, or with gradient checkpointing ``T b H`` for each
  and all of one (bytes saved for the backward pass, measured on Qwen2, Llama, Gemma and GPT-2; norms of q and
  k add 8 H), and the gradients of the layer at hand;
- head: ``2 T V b`` for the gradient of the logits, and the chunk of logits at hand;
- sums: ``W`` bytes beside the compute, and ``2 W`` in RAM once a segment has more than 17 samples (three
  times as much for a tied tensor); histograms of 256 uint16 bins for each input.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import CapacityError
from tinyonn.machine import Device, free_ram
from tinyonn.show.sizes import GiB, MiB, format_size

LOG = logging.getLogger(__name__)
NF4_BYTES = 0.5 + 4 / 64
BATCH = 17  # samples whose levels fit in a uint8
HISTOGRAM_BYTES = 256 * 2
TABLE_BYTES = 256 * 8 * 4  # per input while a tensor is encoded: four float64 tables at once
BAND_BYTES = {"cpu": 2 * MiB, "cuda": 256 * MiB}
LOGITS_BYTES = 256 * MiB  # of a chunk of logits
LOGIT_BYTES = 14  # of one value in it, with its float32 copy and gradients
LOGITS_TOKENS = 16  # that a chunk has at least
CUDA_BYTES = 640 * MiB  # context, library workspaces and what the allocator cannot use
# In RAM: Python with Torch, Transformers, Ray and the store loaded, CUDA's libraries among them.
CUDA_PROCESS_BYTES = 2816 * MiB
WRITE_BYTES = 96 * MiB  # bands on their way into the store
# Of a recording: a recorder without a model, what malloc and oneDNN keep included; the driver; Ray; Torch and the rest.
RECORDER_BYTES = {"cpu": 400 * MiB, "cuda": 2400 * MiB}
MERGING_BYTES = 600 * MiB
RAY_BYTES = 340 * MiB
LIBRARY_BYTES = 420 * MiB
SYSTEM_BYTES = GiB  # left to the system
STORED_BYTES = 1.25  # of a record's 2 bytes after compression
CORPUS_BYTES = 8  # per token: id and label


@dataclass(frozen=True)
class ModelFacts:
    """What the memory depends on.

    Attributes
    ----------
    name : str
    layers, hidden, intermediate, vocabulary : int
    quantization : str
        ``nf4`` or ``none``.
    dtype_bytes : int
        Of a value of the unquantized tensors.
    checkpointing : bool
    tied : frozenset of str
        Names of tensors that several modules use.
    origin : str
        What the values were before, in a line; empty if they are as they were trained.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    quantization: str
    dtype_bytes: int
    checkpointing: bool = False
    tied: frozenset[str] = frozenset()
    origin: str = ""


@dataclass(frozen=True)
class DataFacts:
    """Samples, tokens of a sample, number of slices.

    `assumed` names what is not known but taken, `forms` says what each source's columns are.
    """

    samples: int
    mean_tokens: float
    max_tokens: int
    slices: int
    assumed: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """Where a run is recorded: one machine, or several taken together.

    Attributes
    ----------
    device : str
        ``cpu`` or ``cuda``.
    vram : int or None
        Free bytes of the smallest GPU; None without one, or when it is not known.
    ram : int
        Free bytes.
    disk : int or None
        Free bytes where the store lies; None in a bucket.
    units : int
        GPUs, or CPUs where there is none.
    """

    device: Device
    vram: int | None
    ram: int
    disk: int | None
    units: int


@dataclass(frozen=True)
class Need:
    """One thing that must be held, beside the compute or, with `host`, in RAM wherever that is.

    What is `mapped` from a file must find room like anything else, or it is read again and again; it is nobody's own
    memory though, and `tinyonn.plan.usage` does not count it.
    """

    what: str
    bytes: int
    host: bool = False
    mapped: bool = False


@dataclass(frozen=True)
class Tier:
    """One kind of memory: what must be held in it and how much there is (None: not limited)."""

    name: str
    needs: tuple[Need, ...]
    limit: int | None

    @property
    def total(self) -> int:
        """Bytes needed."""
        return sum(need.bytes for need in self.needs)

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.limit is None or self.total <= self.limit


def compute_needs(
    parameters: Sequence[Parameter],
    held: Sequence[Sequence[Parameter]],
    model: ModelFacts,
    data: DataFacts,
    device: Device,
) -> list[Need]:
    """Beside the compute: VRAM on a GPU, RAM without one."""
    quantized = [p for p in parameters if is_quantized(p, model)]
    trunk = [p for p in parameters if not is_quantized(p, model)]
    b, T, H, I = model.dtype_bytes, data.max_tokens, model.hidden, model.intermediate  # noqa: E741
    small_norms = any(p.kind == "norm" and p.layer is not None and p.size < H for p in parameters)
    layer = T * (4 * b * I + (6 * b + (17 if small_norms else 9)) * H)
    kept = model.layers * T * b * H + layer if model.checkpointing else model.layers * layer
    passing = T * ((3 * b + 4) * I + 6 * b * H)  # gradients of the layer that the backward pass is in
    chunk = min(T, max(LOGITS_TOKENS, LOGITS_BYTES // (LOGIT_BYTES * model.vocabulary)))
    scratch = max((p.size for p in quantized), default=0) * b + BAND_BYTES[device]
    needs = [
        Need("NF4 weights", round(sum(p.size for p in quantized) * NF4_BYTES)),
        Need("trunk" if quantized else "weights", sum(p.size for p in trunk) * b),
        Need("dequantized tensor and gradient band" if quantized else "gradient band", scratch),
        Need("activations, checkpointed" if model.checkpointing else "activations", kept + passing),
        Need(
            "logits and their gradient", chunk * model.vocabulary * LOGIT_BYTES + 2 * T * model.vocabulary * b
        ),
        Need("uint8 sums", max(sum(p.size * _sums(p, model) for p in window) for window in held)),
    ]
    if device == "cuda":
        needs.append(Need("CUDA itself", CUDA_BYTES))
    return [need for need in needs if need.bytes]


def host_needs(
    parameters: Sequence[Parameter],
    held: Sequence[Sequence[Parameter]],
    model: ModelFacts,
    device: Device,
    spills: bool,
) -> list[Need]:
    """In a worker's RAM, wherever it computes."""
    spilled = max(sum(2 * p.size * _sums(p, model) for p in window) for window in held) if spills else 0
    binned = [[p for p in window if p.name not in model.tied] for window in held]
    histograms = max(sum(_inputs(p) for p in window) for window in binned) * HISTOGRAM_BYTES
    tables = max((_inputs(p) for window in binned for p in window), default=0) * TABLE_BYTES
    fetched = (
        3 * max(p.size for p in parameters) if device == "cuda" else 0
    )  # a tensor's sums and bf16 weights
    needs = [
        Need("uint16 sums", spilled),
        Need("column histograms", histograms),
        Need("commit: tables and bands", tables + WRITE_BYTES + fetched),
        Need("process", RECORDER_BYTES[device]),
    ]
    return [need for need in needs if need.bytes]


def disk_tier(weights: int, data: DataFacts, machine: Machine, live: int, workers: int) -> Tier:
    """Disk: `live` segments of each slice, one for each worker, the one being merged; and the corpus."""
    segment = round(weights * STORED_BYTES)
    count = data.slices * live + workers + 1
    needs = (
        Need(f"{count} live segments at most, {format_size(segment)} each", count * segment),
        Need("corpus, tokenised", round(data.samples * data.mean_tokens) * CORPUS_BYTES),
    )
    return Tier("disk", needs, machine.disk)


def is_quantized(parameter: Parameter, model: ModelFacts) -> bool:
    """Whether a tensor is held in NF4: the linear layers of the decoder's layers, not the head."""
    linear = parameter.kind == "linear" and parameter.layer is not None
    return model.quantization == "nf4" and linear and len(parameter.shape) == 2


def _sums(parameter: Parameter, model: ModelFacts) -> int:
    return 3 if parameter.name in model.tied else 1


def _inputs(parameter: Parameter) -> int:
    return parameter.shape[0] if parameter.kind == "embedding" else parameter.shape[-1]


def state_ram(what: str, needs: Sequence[Need], remedy: str, limit: int | None = None) -> int:
    """Say what a stage needs of RAM, or refuse.

    Parameters
    ----------
    what : str
        The stage, as a noun: ``evaluating``.
    needs : sequence of Need
        What is held at the same time.
    remedy : str
        What to do where it does not fit.
    limit : int, optional
        Bytes that may be used; by default what is free.

    Returns
    -------
    int
        Bytes needed, without those that are mapped.

    Raises
    ------
    CapacityError
        Names what is needed, the largest parts, what there is and the remedy.
    """
    total = sum(need.bytes for need in needs)
    there = free_ram() if limit is None else limit
    largest = sorted((need for need in needs if need.bytes), key=lambda need: -need.bytes)[:3]
    parts = ", ".join(f"{need.what} {format_size(need.bytes)}" for need in largest)
    if total > there:
        raise CapacityError(
            f"{what} needs {format_size(total)} of RAM and {format_size(there)} are there ({parts}); {remedy}"
        )
    LOG.info("%s needs %s of RAM at most: %s", what, format_size(total), parts)
    return sum(need.bytes for need in needs if not need.mapped)


def codec_bytes(shapes: Iterable[tuple[int, ...]]) -> int:
    """What the store's threads keep of chunks that they packed or unpacked: each as it is and as it is stored."""
    from tinyonn.store.arrays import band_rows

    threads = min(32, (os.cpu_count() or 1) + 4)  # as many as asyncio starts
    chunks = sorted((2 * band_rows(shape) * prod(shape[1:]) for shape in shapes), reverse=True)
    return 2 * sum(chunks[:threads])
