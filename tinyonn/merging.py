"""``tinyonn merge``: average a run's segments until each slice has one, as far as it is recorded."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tinyonn.places import local_folder, store_location
from tinyonn.sizes import format_seconds
from tinyonn.store.lock import RunLock
from tinyonn.store.manifest import Segment
from tinyonn.store.merge import merge_ready
from tinyonn.store.repository import Store

if TYPE_CHECKING:
    from rich.table import Table

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeReport:
    """What a call of `merge_run` did: merges, and live segments by slice before and after."""

    location: str
    merges: int
    before: dict[str, int]
    after: dict[str, int]
    complete: bool
    merge_seconds: float

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> Table:
        """For people."""
        from rich.table import Table

        rest = "" if self.complete else "; the run is not recorded to its end"
        table = Table(
            title=f"merged {self.location}",
            caption=f"{self.merges} merges in {format_seconds(self.merge_seconds)}{rest}",
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("slice")
        table.add_column("segments before", justify="right")
        table.add_column("after", justify="right")
        for name, count in self.before.items():
            table.add_row(name, str(count), str(self.after[name]))
        return table


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
        The disk is full.
    """
    started = time.monotonic()
    Store.open(store_location(location))  # a wrong name must not leave a lock behind
    with RunLock(local_folder(location)):
        store = Store.open(store_location(location), read_only=False)
        before = store.segments()
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
    )


def _by_slice(names: Sequence[str], segments: Sequence[Segment]) -> dict[str, int]:
    counts = Counter(segment.slice for segment in segments)
    return {name: counts[name] for name in names}
