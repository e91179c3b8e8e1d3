"""The disk that a training needs, as a pure function of student and options; refused before the first step.

A checkpoint holds a float32 master (4 bytes) and the optimizer's moments (AdamW 8, Muon 4) of all that learns: experts,
norms and biases, embeddings and head, router. Beside the `keep` latest there is the one that is written. The model has
2 bytes a value, the places of the entries and the router in float32; it is written beside the one that it replaces. A
teacher's cache takes 6 bytes for each of the K tokens kept at a place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyonn.errors import CapacityError
from tinyonn.machine import free_disk
from tinyonn.model.router_tinyonn import TAPS
from tinyonn.plan.demands import Need, Tier
from tinyonn.sizes import MiB, format_size
from tinyonn.train.need import MASTER, STATES, StudentFacts
from tinyonn.train.optimizers import OptimizerOptions

VALUE = 2  # bytes of a weight of the model that is written
CACHED = 6  # of a likely token: its number and its log probability
LINE_BYTES = 4096  # of a step: its lines of the curve and of the monitor, with the load of every expert
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
                f"{format_size(free)} are free ({what}); free some, use train.keep: 1, "
                "train.optimizers.experts: muon or frozen, train.optimizers.trunk_lr: 0, or another --output"
            )
    return sum(need.bytes for its in needs.values() for need in its)


def _device(folder: Path) -> int:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place.stat().st_dev
