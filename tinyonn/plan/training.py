"""The memory and the disk that a training needs, as pure functions of student, teacher and options.

With ``N`` weights of the student's experts, ``R`` others, ``b`` bytes a value, micro batches of ``T`` tokens (padding
counted), hidden width ``H``, inner width ``I``, ``L`` layers and vocabulary ``V``, one worker holds

- student: ``(b + p) N`` with ``p`` the bytes of a place (2, in layers over 65,536 wide 4), ``b R``; what is trained has
  float32 masters in place of ``b``, a gradient of 4 bytes and an optimizer's state of 8 (AdamW) or 4 (Muon);
- its matrices: the backward pass needs those of every layer for which a micro batch was multiplied;
- teacher: 9/16 byte per NF4 weight, ``b`` of all others; with its hidden states ``b T H L`` and logits ``b T V``;
- activations as in `tinyonn.plan.demands`, of a micro batch, norms of queries and keys counted; with checkpointing
  those of one layer. Norms that are trained keep their inputs, too;
- logits ``b T V`` and a gradient as large for each loss that is taken of them; chunks of them in float32, of one token
  at least;
- at a checkpoint, when activations are gone, a copy of the optimizer's state.

A checkpoint holds a float32 master (4 bytes) and the optimizer's moments (AdamW 8, Muon 4) of all that learns: experts,
norms and biases, embeddings and head, router. Beside the `keep` latest there is the one that is written. The model has
2 bytes a value, the places of the entries and the router in float32; it is written beside the one that it replaces. A
teacher's cache takes 6 bytes for each of the K tokens kept at a place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import CapacityError
from tinyonn.machine import Device, free_disk
from tinyonn.model.batched_tinyonn import CHUNK_BYTES as MATRIX_BYTES
from tinyonn.model.batched_tinyonn import CHUNK_WEIGHTS as MATRICES
from tinyonn.model.router_tinyonn import TAPS
from tinyonn.plan.demands import (
    CUDA_BYTES,
    NF4_BYTES,
    SYSTEM_BYTES,
    ModelFacts,
    Need,
    Tier,
    is_quantized,
)
from tinyonn.show.sizes import MiB, format_size

if TYPE_CHECKING:
    from tinyonn.train.options import OptimizerOptions, TrainOptions

MASTER, GRADIENT = 4, 4
STATES = {"adamw": 8, "muon": 4, "frozen": 0}
CHUNK_BYTES = {
    "cpu": MiB,
    "cuda": 64 * MiB,
}  # of a chunk of logits in float32: for the cache, and for few launches
MOMENTUM_BYTES = 16  # of a weight of a dense matrix while its momentum is made orthogonal
LOGIT_COPIES = 6  # of a chunk of logits: the student's, the teacher's, their exponentials and products
PROCESS_BYTES = 1000 * MiB  # with its libraries, kernels as they are compiled, what the allocator keeps
SYSTEM = "system"  # what is left to it, in a plan
DRIVER_BYTES = {1: 0, 2: 512 * MiB}  # of Ray itself, beside a group of several


@dataclass(frozen=True)
class StudentFacts:
    """What the memory depends on.

    Attributes
    ----------
    entries : int
        Weights of the experts.
    others : int
        All other weights.
    vectors : int
        Of these norms and biases.
    places : int
        Bytes that say where the entries lie.
    largest : int
        Weights of the largest dense matrix.
    """

    entries: int
    others: int
    vectors: int
    places: int
    largest: int

    @classmethod
    def of(cls, tree: Mapping[str, Any], parameters: Sequence[Parameter]) -> StudentFacts:
        """From an assembled model's ``config.json``, or of a dense one, and the base's parameters."""
        layers = tree.get("sparse_layers") or {}
        sparse = {f"{name}.weight" for name in layers}
        entries = sum(layer["entries"] for layer in layers.values())
        places = sum(layer["entries"] * (2 if layer["in"] <= 1 << 16 else 4) for layer in layers.values())
        groups = int(tree.get("experts", 0)) + 1
        places += sum(4 * groups * layer["out"] for layer in layers.values())
        largest = max((layer["out"] * layer["in"] for layer in layers.values()), default=0)
        rest = [parameter for parameter in parameters if parameter.name not in sparse]
        vectors = sum(parameter.size for parameter in rest if len(parameter.shape) < 2)
        others = sum(parameter.size for parameter in rest)
        return cls(entries, others, vectors, places, largest)


def sparse_bytes(student: StudentFacts, b: int = 2) -> int:
    """A sparse model that does not learn, with values of so many bytes."""
    return (student.entries + student.others) * b + student.places


def train_needs(
    student: StudentFacts,
    base: ModelFacts,
    parameters: Sequence[Parameter],
    teacher: tuple[Sequence[Parameter], ModelFacts] | None,
    options: TrainOptions,
    max_tokens: int,
    device: Device,
) -> list[Need]:
    """Of one worker, beside the compute.

    Parameters
    ----------
    student : StudentFacts
    base : ModelFacts
        The student's shape.
    parameters : sequence of Parameter
        Of that shape.
    teacher : (sequence of Parameter, ModelFacts), optional
        Of a teacher that runs at every step.
    options : TrainOptions
    max_tokens : int
        Of a sample.
    device : str
    """
    optimizers, b = options.optimizers, 2 if options.precision == "bfloat16" else 4
    T, H, I = options.micro_batch * max_tokens, base.hidden, base.intermediate  # noqa: E741
    learns = optimizers.experts != "frozen"
    of_adamw = MASTER + GRADIENT + STATES["adamw"]
    trunk = (student.others - student.vectors) * (of_adamw if optimizers.trunk_lr > 0 else b)
    trunk += student.vectors * (of_adamw if optimizers.norms_lr > 0 else b)
    values = MASTER + GRADIENT + STATES[optimizers.experts] if learns else b
    small_norms = any(p.kind == "norm" and p.layer is not None and p.size < H for p in parameters)
    norms = (8 if small_norms else 0) + (2 * b if optimizers.norms_lr > 0 else 0)
    layer = T * (4 * b * I + (6 * b + 9 + norms) * H)
    kept = base.layers * T * b * H + layer if options.checkpointing else base.layers * layer
    passing = T * ((3 * b + 4) * I + 6 * b * H)
    compared = sum(weight > 0 for weight in (options.weights.kl, options.weights.ce))
    logits = T * base.vocabulary * b * (1 + max(1, compared)) + LOGIT_COPIES * _chunk_bytes(base, device)
    wide = MOMENTUM_BYTES if optimizers.experts == "muon" and learns else 0
    matrices = (
        max(MATRIX_BYTES, MATRICES * b * student.largest, wide * student.largest) if student.entries else 0
    )
    # At a checkpoint the optimizer's state is copied into RAM, and the model's weights, cast, when it is written.
    written = student.entries * b
    if device == "cpu":
        written = max(student.entries * STATES[optimizers.experts], written + student.others * b)
    needs = [
        Need("experts" + (", trained" if learns else ""), student.entries * values + student.places),
        Need("trunk and head of the student", trunk),
        Need("matrices of a layer", matrices),
        Need("activations, checkpointed" if options.checkpointing else "activations", kept + passing),
        Need("logits and their gradient", logits),
        Need("copies for a checkpoint, beyond a pass's", max(0, written - kept - passing - logits)),
    ]
    if teacher is not None:
        needs.append(Need("teacher, its hidden states, logits and scratch", _teacher_bytes(*teacher, T, b)))
    if device == "cuda":
        needs.append(Need("CUDA itself", CUDA_BYTES))
    else:
        needs.append(Need("process", PROCESS_BYTES))
    return [need for need in needs if need.bytes]


def _chunk_bytes(base: ModelFacts, device: Device) -> int:
    """Of a chunk of logits in float32: at least one token's."""
    return max(CHUNK_BYTES[device], 4 * base.vocabulary)


def _teacher_bytes(parameters: Sequence[Parameter], facts: ModelFacts, tokens: int, b: int) -> int:
    quantized = [parameter.size for parameter in parameters if is_quantized(parameter, facts)]
    rest = sum(parameter.size for parameter in parameters) - sum(quantized)
    weights = round(sum(quantized) * NF4_BYTES) + rest * facts.dtype_bytes
    kept = tokens * b * (facts.layers * facts.hidden + facts.vocabulary)
    return weights + kept + max(quantized, default=0) * b


def check_needs(needs: Sequence[Need], workers: int, device: Device, limit: int | None) -> Tier:
    """Refuse what does not fit.

    Parameters
    ----------
    needs : sequence of Need
        Of one worker.
    workers : int
        That share the memory: on CPUs all of a machine's, on GPUs one.
    device : str
    limit : int or None
        Free bytes; None is not known.

    Raises
    ------
    CapacityError
        Names what is needed, what there is, the largest parts and remedies.
    """
    name = "VRAM of a GPU" if device == "cuda" else "RAM"
    system = (
        () if device == "cuda" else (Need(SYSTEM, SYSTEM_BYTES), Need("Ray", DRIVER_BYTES[min(workers, 2)]))
    )
    tier = Tier(name, tuple(Need(need.what, need.bytes * workers) for need in needs) + system, limit)
    if not tier.fits:
        largest = sorted(tier.needs, key=lambda need: -need.bytes)[:3]
        what = ", ".join(f"{need.what} {format_size(need.bytes)}" for need in largest)
        raise CapacityError(
            f"training needs {format_size(tier.total)} of {name} and {format_size(limit or 0)} are there ({what}); "
            "use a smaller train.micro_batch or data.max_tokens, model.checkpointing: true, a cached teacher, "
            "train.optimizers.trunk_lr: 0, or fewer workers"
        )
    return tier


VALUE = 2  # bytes of a weight of the model that is written
CACHED = 6  # of a likely token: its number and its log probability
LINE_BYTES = 4096  # of a step: its line, with the load of every expert
EVENT_BYTES = 2048  # of a step in TensorBoard's files
FILE_BYTES = 4 * MiB  # tokenizer, configurations, code and picture, once for the model and once for all else


@dataclass(frozen=True)
class Written:
    """What a training writes, bytes.

    Attributes
    ----------
    checkpoint : int
        Of one.
    checkpoints : int
        How many there are at the most: those that are kept, and the one that is written.
    model : int
    cache : int
        Of the teacher's likeliest tokens.
    lines : int
        Of all steps.
    """

    checkpoint: int
    checkpoints: int
    model: int
    cache: int
    lines: int


def router_weights(router: Mapping[str, Any] | None, hidden: int) -> int:
    """Scalars of a router, its bias included.

    Parameters
    ----------
    router : mapping or None
        Options as their plain tree; 0 without.
    hidden : int
        Width of the embeddings that it reads.
    """
    if router is None:
        return 0
    width, branches = int(router["width"]), router["branches"]
    experts = sum(len(branch) for branch in branches)
    encoder = hidden * width + TAPS * width + 2 * width * width * 2 + 3 * width
    return encoder + (width + 1) * (len(branches) + experts) + experts


def written(
    student: StudentFacts,
    router: int,
    optimizers: OptimizerOptions,
    steps: int,
    keep: int,
    cached_tokens: int = 0,
    track: bool = False,
) -> Written:
    """What a training writes.

    Parameters
    ----------
    student : StudentFacts
    router : int
        Weights of the router.
    optimizers : OptimizerOptions
    steps : int
        Of the warm start too.
    keep : int
        Latest checkpoints.
    cached_tokens : int
        Tokens of a teacher's cache, all places together.
    track : bool
        TensorBoard's files are written.
    """
    learns = {
        "experts": (student.entries, STATES[optimizers.experts] if optimizers.experts != "frozen" else None),
        "router": (router, STATES["adamw"] if optimizers.router != "frozen" else None),
        "norms": (student.vectors, STATES["adamw"] if optimizers.norms_lr > 0 else None),
        "trunk": (student.others - student.vectors, STATES["adamw"] if optimizers.trunk_lr > 0 else None),
    }
    checkpoint = sum(count * (MASTER + state) for count, state in learns.values() if state is not None)
    model = (student.entries + student.others) * VALUE + student.places + router * MASTER + FILE_BYTES
    lines = steps * (LINE_BYTES + (EVENT_BYTES if track else 0)) + FILE_BYTES
    return Written(checkpoint, keep + 1, model, cached_tokens * CACHED, lines)


def disk_needs(what: Written, there: int = 0, model: bool = True) -> tuple[list[Need], list[Need]]:
    """Beside the training's checkpoints, and where the model goes.

    Parameters
    ----------
    what : Written
    there : int
        Complete checkpoints that lie there already, whose bytes are not free.
    model : bool
        False for trainings whose model is not written.
    """
    more = max(1, what.checkpoints - there)
    own = [
        Need(f"{more} checkpoint(s), {format_size(what.checkpoint)} each", more * what.checkpoint),
        Need("the teacher's likeliest tokens", what.cache),
        Need("lines of the steps", what.lines),
    ]
    output = [Need("the model", what.model)] if model else []
    return [need for need in own if need.bytes], output


def check_disk(places: Sequence[tuple[Path, Sequence[Need]]], limits: Mapping[int, int] | None = None) -> int:
    """Refuse what does not fit; folders of one file system share what is free there.

    Parameters
    ----------
    places : sequence of (Path, sequence of Need)
        Folders, made or not.
    limits : mapping of int to int, optional
        Free bytes by device in the place of what is free.

    Returns
    -------
    int
        Bytes needed in all.

    Raises
    ------
    CapacityError
        Names folder, what is needed, what is free and remedies.
    """
    needs: dict[int, list[Need]] = {}
    folders: dict[int, Path] = {}
    for folder, its in places:
        device = _device(folder)
        folders.setdefault(device, folder)
        needs.setdefault(device, []).extend(its)
    for device, its in needs.items():
        free = free_disk(folders[device]) if limits is None else limits[device]
        tier = Tier("disk", tuple(its), free)
        if not tier.fits:
            what = ", ".join(f"{need.what} {format_size(need.bytes)}" for need in its if need.bytes)
            raise CapacityError(
                f"training needs {format_size(tier.total)} of disk where {folders[device]} lies and "
                f"{format_size(free)} are free ({what}); free some, use "
                "train.optimizers.trunk_lr: 0, or another --output"
            )
    return sum(need.bytes for its in needs.values() for need in its)


def _device(folder: Path) -> int:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place.stat().st_dev
