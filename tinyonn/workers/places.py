"""Where workers run, and the memory that they share: this machine, or those of the Ray cluster that is connected."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from tinyonn.errors import InputError
from tinyonn.machine import free_ram, gpus
from tinyonn.plan.cost import Device
from tinyonn.workers.ray import RAY_SHARE, machines


@dataclass(frozen=True)
class Places:
    """Who trains where.

    Attributes
    ----------
    address : str or None
        Of the cluster; None is this machine.
    device : str
    workers, threads : int
        Of the group; CPU threads of each.
    sharing : int
        Workers that share the memory: of a GPU one.
    memory : int or None
        Free bytes of the smallest GPU, or of the machine with least RAM; None is not known.
    """

    address: str | None
    device: Device
    workers: int
    threads: int
    sharing: int
    memory: int | None


def alone(device: Device, threads: int) -> Places:
    """One worker in this process."""
    return Places(None, device, 1, threads, 1, _vram() if device == "cuda" else free_ram())


def places_of(
    address: str | None, device: Device, workers: int | None, threads: int | None, most: int
) -> Places:
    """On the Ray that is connected.

    Parameters
    ----------
    address : str or None
    device : str
    workers : int or None
        None is one for each GPU, or one for each machine without.
    threads : int or None
        None is a GPU worker's one, or a machine's CPUs dealt to its workers.
    most : int
        Workers that there is work for: samples of a step.

    Raises
    ------
    InputError
        More workers than that.
    """
    nodes = machines()
    if workers is not None and workers > most:
        raise InputError(
            f"{workers} workers are asked for and there is work for {most}; use fewer, or a larger batch"
        )
    if device == "cuda":
        found = sum(int(node.get("GPU", 0)) for node in nodes)
        memory = _vram() if len(nodes) == 1 else None
        return Places(address, device, workers or max(1, min(found, most)), threads or 1, 1, memory)
    count = workers or max(1, min(len(nodes), most))
    sharing = ceil(count / len(nodes))
    cpus = min(int(node.get("CPU", 1)) for node in nodes)
    memory = free_ram() if len(nodes) == 1 else _least_ram(nodes)
    return Places(address, device, count, threads or max(1, cpus // sharing), sharing, memory)


def _vram() -> int | None:
    return min((gpu.free for gpu in gpus()), default=None)


def _least_ram(nodes: list[dict[str, Any]]) -> int:
    return int(min(node.get("memory", 0.0) for node in nodes) / RAY_SHARE)
