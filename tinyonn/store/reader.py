"""Reading a snapshot of the store: its live segments and their records."""

from __future__ import annotations

import json
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from tinyonn.errors import StoreDamagedError
from tinyonn.store.arrays import codebooks_of, open_array, read_rows
from tinyonn.store.faults import translated
from tinyonn.store.manifest import Manifest, Segment, parse_segment
from tinyonn.store.records import Float64, UInt16


class Reader:
    """A snapshot of the store: its live segments and their arrays.

    Attributes
    ----------
    segments : list of Segment
    """

    def __init__(self, store: Any, segments: list[Segment]) -> None:
        self.segments = segments
        self._store = store

    def array(self, segment: Segment, name: str) -> zarr.Array[Any]:
        """The uint16 records of one tensor of a segment."""
        with translated(f"opening {name} of segment {segment.name}"):
            return open_array(self._store, f"{segment.path}/{name}")

    def stage(self, path: str) -> dict[str, Any] | None:
        """Attributes of a group that a stage wrote, such as ``rows``; None if it has not run."""
        with translated(f"looking for {path}"):
            data = sync(self._store.get(f"{path}/zarr.json", default_buffer_prototype()))
        return None if data is None else dict(json.loads(data.to_bytes())["attributes"])

    def output(self, path: str, name: str) -> zarr.Array[Any]:
        """One tensor's array of such a group."""
        with translated(f"opening {name} of {path}"):
            return open_array(self._store, f"{path}/{name}")

    def codebooks(self, segment: Segment, name: str) -> Float64:
        """The means that the codes of one tensor of a segment stand for, float64 [3, 16]."""
        return codebooks_of(self.array(segment, name))

    def read(self, segment: Segment, name: str, first: int, last: int) -> UInt16:
        """Rows [first, last) of one tensor of a segment, checked.

        Raises
        ------
        StoreDamagedError
            Names tensor, segment and chunk.
        """
        return read_rows(self.array(segment, name), first, last, f"{name} of segment {segment.name}")


def list_segments(store: Any, manifest: Manifest) -> list[Segment]:
    """Every segment of a snapshot, slices in the manifest's order."""
    found: list[Segment] = []
    for slice_name in manifest.slices:
        for span in sync(list_names(store, f"segments/{slice_name}")):
            if span == "zarr.json":
                continue
            name = f"{slice_name}/{span}"
            attributes: dict[str, Any] = dict(zarr.open_group(store, path=f"segments/{name}", mode="r").attrs)
            if not {"samples", "set_aside"} <= attributes.keys():
                raise StoreDamagedError(
                    f"segment {name} has no counts of samples; record into another folder"
                )
            found.append(parse_segment(name, attributes["samples"], tuple(attributes["set_aside"])))
    return found


async def list_names(store: Any, path: str) -> list[str]:
    """Names directly below a path."""
    return [name async for name in store.list_dir(path)]
