"""``tinyonn merge``: average a run's segments until each slice has one, as far as it is recorded."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinyonn.places import local_folder, store_location
from tinyonn.plan.demands import Need, state_ram
from tinyonn.sheet import Sheet, whole
from tinyonn.sizes import MiB, format_seconds
from tinyonn.store.lock import RunLock
from tinyonn.store.manifest import Segment
from tinyonn.store.merge import merge_bytes, merge_ready, ready_merges
from tinyonn.store.repository import Store

LOG = logging.getLogger(__name__)
OWN_BYTES = 260 * MiB  # of the process: Python with the store and Numba's kernels


@dataclass(frozen=True)
class MergeReport:
    """What a call of `merge_run` did: merges, and live segments by slice before and after."""

    location: str
    merges: int
    before: dict[str, int]
    after: dict[str, int]
    complete: bool
    merge_seconds: float
    planned_rss_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> Sheet:
        """For people."""
        rest = "" if self.complete else "; the run is not recorded to its end"
        note = f"{self.merges:,} merges in {format_seconds(self.merge_seconds)}{rest}"
        sheet = (
            Sheet(f"merged {whole(self.location)}", [note]).text("slice").number("segments before", "after")
        )
        for name, count in self.before.items():
            sheet.add(whole(name), f"{count:,}", f"{self.after[name]:,}")
        return sheet


def merge_run(location: str) -> MergeReport:
    """Carry out all merges that are ready. May be cut off at any moment and called again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.

    Raises
    ------
    InputError
        No run is there.
    StoreBusyError
        Another process records or merges it.
    CapacityError
        It does not fit, or the disk is full.
    """
    started = time.monotonic()
    Store.open(store_location(location))  # a wrong name must not leave a lock behind
    with RunLock(local_folder(location), what="merge"):
        store = Store.open(store_location(location), read_only=False)
        before = store.segments()
        planned = _state(store) if ready_merges(store.manifest, before) else 0
        merges = merge_ready(store)
        store.clean()
        after = store.segments()
    complete = sum(s.last - s.first for s in after) == sum(store.manifest.slices.values())
    LOG.debug("merged %s: %d merges, %d -> %d live segments", location, merges, len(before), len(after))
    names = list(store.manifest.slices)
    return MergeReport(
        location,
        merges,
        _by_slice(names, before),
        _by_slice(names, after),
        complete,
        time.monotonic() - started,
        planned,
    )


def _state(store: Store) -> int:
    """What it needs of RAM, or a refusal."""
    parameters = store.manifest.parameters
    parts = max(len(merge.children) for merge in ready_merges(store.manifest, store.segments()))
    needs = [
        Need("chunks that are averaged", merge_bytes(parameters, parts)),
        Need("the process", OWN_BYTES),
    ]
    return state_ram("merging", needs, "end other programs, or merge on a machine with more of it")


def _by_slice(names: Sequence[str], segments: Sequence[Segment]) -> dict[str, int]:
    counts = Counter(segment.slice for segment in segments)
    return {name: counts[name] for name in names}
