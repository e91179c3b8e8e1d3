"""Records and merges a small run until it is complete; made to be killed. Prints a line after each commit.

python -m tests.store.crash_child FOLDER
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from tests.invariants import small_manifest
from tests.store.worlds import new_store, record_leaf
from tinyonn.store.lock import RunLock
from tinyonn.store.merge import merge_ready
from tinyonn.store.repository import Store
from tinyonn.store.tree import next_segment

MANIFEST = small_manifest({"code": 100, "prose": 60}, segment_size=2)


def main(folder: Path) -> None:
    """Take the lock, open or create the store, record what is missing, merge beside it."""
    with RunLock(folder):
        location = folder / "store"
        store = (
            Store.open(location, read_only=False) if Store.exists(location) else new_store(location, MANIFEST)
        )
        if store.calibration is None:
            store = resume_calibration(store)
        print("ready", flush=True)
        ended = threading.Event()
        merger = threading.Thread(target=merge_beside, args=(store, ended))
        merger.start()
        while (leaf := next_segment(MANIFEST, store.segments(), [], workers=1)) is not None:
            record_leaf(store, leaf)
            print(leaf.name, flush=True)
        ended.set()
        merger.join()
        merge_ready(store)
        store.clean()
        print("complete", flush=True)


def resume_calibration(store: Store) -> Store:
    """A store killed between the manifest and the calibration."""
    from tests.invariants import calibrations

    store.commit_calibration(calibrations(MANIFEST))
    return store


def merge_beside(store: Store, ended: threading.Event) -> None:
    """Merge and clean in the background, as the driver does."""
    while not ended.wait(0.01):
        merge_ready(store, stop=ended.is_set)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
