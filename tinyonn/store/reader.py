"""Reading a snapshot of the store: its live segments and their records."""

from __future__ import annotations

from typing import Any

import zarr
from zarr.core.sync import sync

from tinyonn.errors import StoreDamagedError
from tinyonn.store.arrays import codebooks_of, open_array, read_rows
from tinyonn.store.faults import translated
from tinyonn.store.manifest import Manifest, Segment, parse_segment
from tinyonn.store.nodes import REMEDY, Content, read_attributes
from tinyonn.store.records import Float64, UInt16


class Reader:
    """A snapshot of the store: its live segments and their arrays.

    Attributes
    ----------
    segments : list of Segment
    where : str
        The store's location, for messages.
    """

    def __init__(self, store: Any, segments: list[Segment], where: str, content: Content | None) -> None:
        self.segments = segments
        self.where = where
        self._store = store
        self._content = content

    def array(self, segment: Segment, name: str) -> zarr.Array[Any]:
        """The uint16 records of one tensor of a segment."""
        with translated(f"opening {self.what(segment, name)}"):
            return open_array(self._store, f"{segment.path}/{name}", self.where)

    def stage(self, path: str) -> dict[str, Any] | None:
        """Attributes of a group that a stage wrote, such as ``rows``; None if it has not run."""
        with translated(f"looking for {path} in {self.where}"):
            found = read_attributes(self._store, path, self.where)
        if found is None and self._content is not None and path in self._content.groups:
            raise StoreDamagedError(f"{self.where}: {path} is missing; {REMEDY}")
        return found

    def output(self, path: str, name: str) -> zarr.Array[Any]:
        """One tensor's array of such a group."""
        with translated(f"opening {self.what(path, name)}"):
            return open_array(self._store, f"{path}/{name}", self.where)

    def what(self, part: Segment | str, name: str) -> str:
        """A tensor of a segment, or of a stage's group, as messages name it."""
        place = f"segment {part.name}" if isinstance(part, Segment) else part
        return f"{self.where}: {name} of {place}"

    def codebooks(self, segment: Segment, name: str) -> Float64:
        """The means that the codes of one tensor of a segment stand for, float64 [3, 16]."""
        return codebooks_of(self.array(segment, name), self.what(segment, name))

    def read(self, segment: Segment, name: str, first: int, last: int) -> UInt16:
        """Rows [first, last) of one tensor of a segment, checked.

        Raises
        ------
        StoreDamagedError
            Names tensor, segment and chunk.
        """
        return read_rows(self.array(segment, name), first, last, self.what(segment, name))


def list_segments(store: Any, manifest: Manifest, where: str) -> list[Segment]:
    """Every segment of a snapshot, slices in the manifest's order.

    Raises
    ------
    StoreDamagedError
        One has no counts of samples, or such as cannot be.
    """
    found: list[Segment] = []
    for slice_name in manifest.slices:
        for span in sync(list_names(store, f"segments/{slice_name}")):
            if span == "zarr.json":
                continue
            name = f"{slice_name}/{span}"
            attributes = read_attributes(store, f"segments/{name}", where)
            if attributes is None or not {"samples", "set_aside"} <= attributes.keys():
                raise StoreDamagedError(
                    f"{where}: segment {name} has no counts of samples; record into another folder"
                )
            segment = parse_segment(name, attributes["samples"], tuple(attributes["set_aside"]))
            _check_segment(segment, manifest, where)
            found.append(segment)
    return found


def _check_segment(segment: Segment, manifest: Manifest, where: str) -> None:
    """Counts that can be: no more samples than positions, no position beyond the slice."""
    samples, places = segment.samples, segment.last - segment.first
    if (
        type(samples) is not int
        or not 0 <= samples <= places
        or segment.last > manifest.slices[segment.slice]
    ):
        raise StoreDamagedError(
            f"{where}: segment {segment.name} says that it holds {samples!r} samples, and the slice has "
            f"{manifest.slices[segment.slice]}; {REMEDY}"
        )


async def list_names(store: Any, path: str) -> list[str]:
    """Names directly below a path."""
    return [name async for name in store.list_dir(path)]
