"""A full disk is a `CapacityError`, and everything committed before stays readable."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.invariants import check_store, finished, small_manifest
from tests.store.worlds import new_store, record_leaf, write_leaf
from tinyonn.errors import CapacityError
from tinyonn.store.merge import merge_ready
from tinyonn.store.repository import Store


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small file system is not allowed here; the file size limit is tested instead")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_every_amount_of_space_left(small_disk: Path) -> None:
    """Leave 0, 4, 8, ... KiB until recording and merging pass: each step on the way runs out once."""
    manifest = small_manifest({"code": 16})
    store = new_store(small_disk / "store", manifest)
    leaves = manifest.leaves("code")
    for leaf in leaves[:3]:
        record_leaf(store, leaf)
    ballast = small_disk / "ballast"
    failures = 0
    for pages in range(100):
        ballast.write_bytes(b"")
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(b"\0" * max(0, free - 4096 * pages))
        store = Store.open(small_disk / "store", read_only=False)
        try:
            record_leaf(store, leaves[3])
            merge_ready(store)
        except CapacityError:
            failures += 1
        else:
            break
        check_store(Store.open(small_disk / "store"))
        ballast.write_bytes(b"")
        store = Store.open(small_disk / "store", read_only=False)
        store.clean()
    assert failures > 3
    assert [segment.name for segment in store.segments()] == ["code/0-16"]
    check_store(Store.open(small_disk / "store"))


def fill(folder: Path) -> None:
    """In a child process that may not write files above 900 bytes: the first chunk file is too large."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    manifest = small_manifest({"code": 16})
    store = Store.open(folder, read_only=False)
    leaf = manifest.leaves("code")[2]
    fork = store.begin(leaf)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))
    try:
        write_leaf(fork, manifest, leaf)
    except CapacityError:
        raise SystemExit(42) from None
    store.commit(fork, finished(leaf))


def test_file_size_limit(tmp_path: Path) -> None:
    manifest = small_manifest({"code": 16})
    store = new_store(tmp_path, manifest)
    for leaf in manifest.leaves("code")[:2]:
        record_leaf(store, leaf)
    child = multiprocessing.get_context("spawn").Process(target=fill, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 42
    assert len(check_store(Store.open(tmp_path))) == 2
    record_leaf(store, manifest.leaves("code")[2])
    assert len(check_store(Store.open(tmp_path))) == 3
    assert np.sum([segment.samples for segment in store.segments()]) > 0
