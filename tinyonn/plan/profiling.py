"""What profiling needs, stated before anything is loaded.

A worker holds what a recorder holds but for its sums (`tinyonn.plan.demands`), a byte for every weight that has a
group, and while a band is summed its copies in float32 and the sums by group. One worker works in the driver's own
process; several have Ray's processes and a driver beside them, and share the pages of their libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import CapacityError
from tinyonn.machine import Device
from tinyonn.plan.demands import (
    CUDA_PROCESS_BYTES,
    LIBRARY_BYTES,
    MERGING_BYTES,
    RAY_BYTES,
    RECORDER_BYTES,
    SYSTEM_BYTES,
    DataFacts,
    Machine,
    ModelFacts,
    Need,
    Tier,
    compute_needs,
)
from tinyonn.show.sizes import MiB, format_size

# Of a process that measures by itself, libraries and kernels included.
ALONE_BYTES = {"cpu": 900 * MiB, "cuda": CUDA_PROCESS_BYTES}
CHUNK = 1 << 23  # weights that are summed at a time on a GPU
CHUNK_BYTES = 72  # of a weight while its chunk is summed on a GPU: floats, levels, places, products


@dataclass(frozen=True)
class ProfilePlan:
    """How many workers there may be, and the memory of one.

    Attributes
    ----------
    device : str
    worker : Tier
        Needs of a worker's RAM beside its process.
    vram : Tier or None
    workers : int
        As many as fit.
    """

    device: Device
    worker: Tier
    vram: Tier | None
    workers: int

    def ram(self, workers: int) -> int:
        """Bytes of RAM that so many workers need, their processes, Ray's and the driver's included."""
        return _ram(self.device, self.worker, workers, None).total


def plan_profile(
    parameters: Sequence[Parameter],
    grouped: Sequence[Parameter],
    model: ModelFacts,
    data: DataFacts,
    machine: Machine,
    threads: int,
    workers: int | None = None,
) -> ProfilePlan:
    """Choose the number of workers, or refuse.

    Parameters
    ----------
    parameters : sequence of Parameter
        All of the model.
    grouped : sequence of Parameter
        Those that have groups.
    model, data, machine
        Facts; the machine's disk does not matter.
    threads : int
        CPU threads of a worker.
    workers : int, optional
        Asked for; by default as many as there are GPUs or CPU shares, and as fit.

    Raises
    ------
    CapacityError
        Names what is needed, the limit and a remedy.
    """
    compute = compute_needs(parameters, [[]], model, data, machine.device)
    groups = Need("groups of weights", sum(parameter.size for parameter in grouped))
    host = [groups]
    vram = None
    if machine.device == "cuda":
        vram = Tier("VRAM of a GPU", (*compute, Need("a chunk of sums", CHUNK * CHUNK_BYTES)), machine.vram)
        _check(vram, model)
    else:
        host = [*compute, *host]
    worker = Tier("RAM of a worker", tuple(host), None)
    places = max(1, machine.units if machine.device == "cuda" else machine.units // threads)
    for count in range(workers or places, 0, -1):
        ram = _ram(machine.device, worker, count, max(0, machine.ram - SYSTEM_BYTES))
        if ram.fits:
            return ProfilePlan(machine.device, worker, vram, count)
        if workers is not None:
            break
    _check(ram, model, "fewer workers, " if count > 1 else "")
    raise AssertionError("a plan that fits was returned")


def _ram(device: Device, worker: Tier, workers: int, limit: int | None) -> Tier:
    """All of them together."""
    if workers == 1:
        processes = [Need("process", ALONE_BYTES[device])]
    else:
        processes = [
            Need("processes of the workers", workers * RECORDER_BYTES[device]),
            Need("driver", MERGING_BYTES),
            Need("Ray's own processes", RAY_BYTES),
            Need("libraries, which all share", LIBRARY_BYTES),
        ]
    return Tier("RAM", (Need(f"{workers} worker(s)", workers * worker.total), *processes), limit)


def _check(tier: Tier, model: ModelFacts, first: str = "") -> None:
    if tier.fits:
        return
    needs = sorted(tier.needs, key=lambda need: -need.bytes)[:3]
    what = ", ".join(f"{need.what} {format_size(need.bytes)}" for need in needs)
    checkpointing = "" if model.checkpointing else "model.checkpointing: true, "
    limit = format_size(tier.limit or 0)
    raise CapacityError(
        f"{model.name}: profiling needs {format_size(tier.total)} of {tier.name} and {limit} are there ({what}); use "
        f"{first}{checkpointing}a smaller data.max_tokens, or a machine with more of it"
    )
