"""What a stage needs of RAM, stated and refused before it starts; what every stage's plan is made of.

A stage's needs are pure functions beside the code that holds the bytes (`tinyonn.score.stage.task_needs`,
`tinyonn.evaluate.demand`, ...); recording's are in `tinyonn.plan.needs`. Each begins with a process: Python with the
libraries of the stage, its kernels compiled, as measured by `tinyonn.plan.usage` on a model that takes next to nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from math import prod

from tinyonn.errors import CapacityError
from tinyonn.machine import free_ram
from tinyonn.plan.needs import Need
from tinyonn.sizes import format_size
from tinyonn.store.arrays import band_rows

LOG = logging.getLogger(__name__)


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
    threads = min(32, (os.cpu_count() or 1) + 4)  # as many as asyncio starts
    chunks = sorted((2 * band_rows(shape) * prod(shape[1:]) for shape in shapes), reverse=True)
    return 2 * sum(chunks[:threads])
