"""Small real stores for the tests."""

from __future__ import annotations

import pickle
from pathlib import Path

from icechunk import ForkSession

from tests.invariants import calibrations, finished, leaf_codebooks, leaf_records
from tinyonn.store.arrays import SegmentWriter
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.repository import Store


def new_store(location: Path, manifest: Manifest) -> Store:
    """A store with manifest and calibration."""
    store = Store.create(location, manifest)
    store.commit_calibration(calibrations(manifest))
    return store


def write_leaf(fork: ForkSession, manifest: Manifest, leaf: Segment) -> ForkSession:
    """What a worker does: take a pickled fork, write every tensor, send the fork back."""
    mine: ForkSession = pickle.loads(pickle.dumps(fork))
    writer = SegmentWriter(mine, leaf.slice, leaf.first, leaf.last)
    bases = calibrations(manifest)
    for parameter in manifest.parameters if finished(leaf).samples else ():
        records = leaf_records(leaf, parameter)
        codebooks = leaf_codebooks(leaf, parameter)
        writer.write(parameter.name, parameter.shape, bases[parameter.name], codebooks, [(0, records)])
    back: ForkSession = pickle.loads(pickle.dumps(mine))
    return back


def record_leaf(store: Store, leaf: Segment) -> bool:
    """Begin, write and commit one leaf."""
    return store.commit(write_leaf(store.begin(leaf), store.manifest, leaf), finished(leaf))


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
