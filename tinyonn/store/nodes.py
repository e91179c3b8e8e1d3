"""Metadata of the store's groups and arrays, with digests: they lie in snapshots, whose bytes Icechunk does not check.

The attributes of a node have one key more, ``digest``, over its path and all of its metadata; and every commit says in
its own metadata which segments and which other groups there are. So neither what an attribute says, nor the shape of
an array, nor the name of a group can change unnoticed. Nodes and commits without a digest, which earlier versions
wrote, are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync

from tinyonn.errors import StoreDamagedError
from tinyonn.files import KEY, NotSealedError, digest_of, opened, sealed

GROUPS = ("calibration", "rows", "affinity", "labels")  # beside the segments
CONTENT = "tinyonn"  # in a commit's metadata
REMEDY = "restore the store from a copy, or record into another folder"


@dataclass(frozen=True)
class Content:
    """What a snapshot holds: names of the live segments, and those of `GROUPS` that are there."""

    segments: tuple[str, ...]
    groups: tuple[str, ...]

    def tree(self) -> dict[str, Any]:
        """For a commit's metadata."""
        return {CONTENT: sealed({"segments": sorted(self.segments), "groups": sorted(self.groups)})}

    @classmethod
    def of(cls, metadata: Mapping[str, Any], where: str) -> Content | None:
        """From a commit's metadata; None of a commit of an earlier version."""
        if CONTENT not in metadata:
            return None
        try:
            tree = opened(metadata[CONTENT], where)
            return cls(tuple(tree["segments"]), tuple(tree["groups"]))
        except (NotSealedError, KeyError, TypeError) as error:
            raise _damaged(where, "its newest snapshot", error) from None

    def check(self, segments: Collection[str], where: str) -> None:
        """Make sure that exactly these segments are there."""
        if odd := sorted({*segments} ^ {*self.segments}):
            raise _damaged(where, "its newest snapshot", f"segment {odd[0]} is missing or has another name")


def write_node(store: Any, path: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Write the metadata of a group or an array, with their digest; returns what was written.

    Parameters
    ----------
    store : zarr Store
        Of a session that can write.
    path : str
        Without ``zarr.json``; empty for the root.
    metadata : mapping
        As Zarr version 3 has it, JSON values.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(metadata)))
    assert KEY not in plain["attributes"]
    plain["attributes"][KEY] = _digest(path, plain)
    sync(store.set(_key(path), cpu.Buffer.from_bytes(json.dumps(plain).encode())))
    return plain


def write_group(store: Any, path: str, attributes: Mapping[str, Any]) -> None:
    """Write a group's attributes, whether or not it is there."""
    write_node(store, path, {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)})


def read_node(store: Any, path: str, where: str) -> dict[str, Any] | None:
    """The metadata of a group or an array, checked; None if it is not there.

    Parameters
    ----------
    store : zarr Store
    path : str
    where : str
        The store's location, for messages.

    Raises
    ------
    StoreDamagedError
        They are not what was written; names the store and the path.
    """
    data = sync(store.get(_key(path), default_buffer_prototype()))
    if data is None:
        return None
    try:
        tree: dict[str, Any] = json.loads(data.to_bytes().decode("utf-8"))
        attributes = tree["attributes"]
        if KEY in attributes and attributes[KEY] != _digest(path, tree):
            raise NotSealedError("its metadata do not match their digest")
        tree["attributes"] = attributes if KEY in attributes else opened(attributes, f"{where}: {path}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(where, path or "its root", error) from None
    return tree


def read_attributes(store: Any, path: str, where: str) -> dict[str, Any] | None:
    """Those of a group or an array, checked and without their digest; None if it is not there."""
    node = read_node(store, path, where)
    if node is None:
        return None
    return {name: value for name, value in node["attributes"].items() if name != KEY}


def _digest(path: str, metadata: Mapping[str, Any]) -> str:
    """Over the path and the metadata, but for the digest in the attributes."""
    attributes = {name: value for name, value in metadata["attributes"].items() if name != KEY}
    return digest_of({"path": path, "node": {**metadata, "attributes": attributes}})


def _key(path: str) -> str:
    return f"{path}/zarr.json" if path else "zarr.json"


def _damaged(where: str, what: str, reason: object) -> StoreDamagedError:
    return StoreDamagedError(f"{where}: {what} is damaged ({reason}); {REMEDY}")
