"""The run's store: one Icechunk repository, one committing process.

Branch ``main`` holds what is committed. Branch ``base`` stays at the manifest's commit: every fork starts
from there, so that a fork is small however much has been recorded, and expiry never takes away its ground.
A segment becomes visible in one commit; replacing merged segments by their average is one commit as well.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import zarr
from icechunk import ForkSession
from zarr.core.sync import sync

from tinyonn.errors import InputError, StoreBusyError, StoreDamagedError, StoreError
from tinyonn.files import make_private
from tinyonn.store.arrays import SegmentWriter, band_rows, bands, create_array, open_array, read_rows
from tinyonn.store.faults import newer_store, translated
from tinyonn.store.location import check_absent, storage_of
from tinyonn.store.manifest import Manifest, Segment, parse_segment
from tinyonn.store.nodes import GROUPS, Content, read_attributes, write_group
from tinyonn.store.reader import Reader, list_names, list_segments
from tinyonn.store.records import TensorCalibration

__all__ = ["Manifest", "Reader", "Segment", "SegmentWriter", "Store", "band_rows", "bands", "parse_segment"]

# Icechunk 2 can write the format of Icechunk 1, which all Pythons have: a run moves between machines.
_NEW = "create_version" in inspect.signature(icechunk.Repository.open_or_create).parameters
_OLDEST: dict[str, Any] = {"create_version": 1} if _NEW else {}
NEWER = "repo"  # the file that a store of Icechunk 2's own format begins with

# Clocks of the machines that write and of the one that cleans may differ by this much.
CLOCK_SKEW = timedelta(seconds=60)


class Store:
    """A run's repository, from `Store.create` or `Store.open`; for any threads of one process.

    Attributes
    ----------
    location : str
        Folder or ``s3://`` address.
    manifest : Manifest
    read_only : bool
    """

    def __init__(
        self, location: str, repository: icechunk.Repository, manifest: Manifest, read_only: bool
    ) -> None:
        self.location = location
        self.manifest = manifest
        self.read_only = read_only
        self._repository = repository
        self._lock = threading.RLock()
        self._begun: dict[str, datetime] = {}
        self._listed: tuple[str, list[Segment]] = ("", [])

    @staticmethod
    def exists(location: str | Path) -> bool:
        """Whether a run is stored at `location`; a store killed before its manifest was committed is none."""
        text = str(location)
        if not text.startswith("s3://") and not Path(text).is_dir():
            return False
        with translated(f"looking for a store at {text}"):
            storage = storage_of(text)
            if not icechunk.Repository.exists(storage):
                if text.startswith("s3://"):
                    check_absent(text)
                elif (Path(text) / NEWER).is_file():
                    raise InputError(newer_store(text))
                return False
            return len(list(icechunk.Repository.open(storage).ancestry(branch="main"))) > 1

    @classmethod
    def create(cls, location: str | Path, manifest: Manifest) -> Store:
        """Make a new store and commit the manifest and a group for each slice.

        Raises
        ------
        InputError
            If there is a store already.
        """
        text = str(location)
        if cls.exists(text):
            raise InputError(f"{text}: there is a store already; open it, or choose another run")
        with translated(f"creating the store {text}"):
            if not text.startswith("s3://"):
                make_private(Path(text).parent)
                Path(text).mkdir(exist_ok=True)
            repository = icechunk.Repository.open_or_create(storage_of(text), **_OLDEST)
            session = repository.writable_session("main")
            write_group(session.store, "", {"tinyonn": manifest.to_json()})
            write_group(session.store, "segments", {})
            for name in manifest.slices:
                write_group(session.store, f"segments/{name}", {})
            snapshot = session.commit("manifest", Content((), ()).tree())
            repository.create_branch("base", snapshot)
        return cls(text, repository, manifest, read_only=False)

    @classmethod
    def open(cls, location: str | Path, read_only: bool = True) -> Store:
        """Open a store.

        Raises
        ------
        InputError
            Nothing is there.
        StoreDamagedError
            It cannot be read.
        """
        text = str(location)
        if not cls.exists(text):
            raise InputError(f"{text}: no run is stored there; `tinyonn record` makes one")
        with translated(f"opening the store {text}"):
            repository = icechunk.Repository.open(storage_of(text))
            root = read_attributes(repository.readonly_session("main").store, "", text)
            tree = (root or {}).get("tinyonn")
            if tree is not None and not read_only and "base" not in repository.list_branches():
                # A kill between the manifest's commit and the branch: nothing else has been committed yet.
                repository.create_branch("base", repository.lookup_branch("main"))
        if not isinstance(tree, dict):
            raise StoreDamagedError(f"{text}: the store has no manifest; remove the folder and record again")
        return cls(text, repository, Manifest.from_json(tree), read_only)

    def grow(self, manifest: Manifest) -> None:
        """Commit the manifest of the same run with a corpus that has grown, and groups for new slices.

        May be cut off at any moment and called again: branch ``base`` goes first, where nothing but forks looks.

        Raises
        ------
        ValueError
            The manifest is of another run.
        """
        self._check_writable()
        if self.manifest.grow(manifest.data, manifest.slices) != manifest:
            raise ValueError(f"{self.location}: not the manifest of the same run with more data")
        with self._lock, translated(f"growing the corpus of {self.location}"):
            for branch in ("base", "main"):
                session = self._repository.writable_session(branch)
                before = read_attributes(session.store, "", self.location) or {}
                write_group(session.store, "", {**before, "tinyonn": manifest.to_json()})
                for name in manifest.slices:
                    if name not in self.manifest.slices:
                        write_group(session.store, f"segments/{name}", {})
                if session.has_uncommitted_changes:
                    live = self.segments() if branch == "main" else []
                    self._commit_session(session, "manifest of a corpus that has grown", live)
            self.manifest = manifest
            self._listed = ("", [])

    @property
    def calibration(self) -> dict[str, TensorCalibration] | None:
        """Every tensor's bases and threshold, or None before they are committed."""
        with translated(f"reading the calibration of {self.location}"):
            session = self._repository.readonly_session("main")
            reader = Reader(session.store, [], self.location, self._content(session))
            if reader.stage("calibration") is None:
                return None
            array = open_array(session.store, "calibration", self.location)
            data = read_rows(array, 0, array.shape[0], f"the calibration of {self.location}")
            tree = json.loads(data.tobytes())
            return {name: TensorCalibration(**item) for name, item in tree.items()}

    def commit_calibration(self, calibration: dict[str, TensorCalibration]) -> None:
        """Commit the calibration, once.

        Raises
        ------
        StoreError
            If another one is committed already.
        """
        self._check_writable()
        with self._lock, translated(f"committing the calibration to {self.location}"):
            stored = self.calibration
            if stored is not None:
                if stored != calibration:
                    raise StoreError(
                        f"{self.location}: another calibration is committed; record into another run"
                    )
                return
            tree = {name: vars(item) for name, item in calibration.items()}
            data = np.frombuffer(json.dumps(tree).encode(), dtype=np.uint8)
            session = self._repository.writable_session("main")
            array = create_array(
                session.store, "calibration", data.shape, "uint8", data.shape, {"content": "JSON"}
            )
            array[...] = data
            self._commit_session(session, "calibration", self.segments())

    def segments(self, slice: str | None = None) -> list[Segment]:
        """Live segments by slice and position."""
        with self._lock, translated(f"listing the segments of {self.location}"):
            live = self._segments_of(self._repository.readonly_session("main"))
            return [segment for segment in live if slice in (None, segment.slice)]

    def _segments_of(self, session: icechunk.Session) -> list[Segment]:
        if self._listed[0] != session.snapshot_id:
            # Of this snapshot: another process may have made the corpus grow since this store was opened.
            attributes = read_attributes(session.store, "", self.location) or {}
            manifest = Manifest.from_json(attributes["tinyonn"])
            found = sorted(list_segments(session.store, manifest, self.location))
            if (content := self._content(session)) is not None:
                content.check([segment.name for segment in found], self.location)
            known = [segment for segment in found if segment.slice in self.manifest.slices]
            self._listed = (session.snapshot_id, known)
        return self._listed[1]

    def covered(self, slice: str) -> list[tuple[int, int]]:
        """Half-open ranges of positions that are committed, joined where they touch."""
        ranges: list[tuple[int, int]] = []
        for segment in self.segments(slice):
            if ranges and ranges[-1][1] == segment.first:
                ranges[-1] = (ranges[-1][0], segment.last)
            else:
                ranges.append(segment.range)
        return ranges

    def begin(self, segment: Segment) -> ForkSession:
        """A fork that can be pickled and sent to where `segment` is computed.

        `clean` leaves alone whatever was written since, until `commit` or `drop`; so begin late, when the
        writing starts, not when the segment is dealt. A fork that was dropped must not be committed.
        """
        self._check_writable()
        with self._lock, translated(f"beginning segment {segment.name}"):
            self._begun.setdefault(segment.name, datetime.now(UTC))
            return self._repository.writable_session("base").fork()

    def drop(self, segment: Segment) -> None:
        """Forget a fork that will not come back; what it wrote is collected by `clean`."""
        with self._lock:
            self._begun.pop(segment.name, None)

    def commit(self, fork: ForkSession, segment: Segment) -> bool:
        """Make a segment visible, all of it at once.

        Returns
        -------
        bool
            False if its range is committed already; the fork is then dropped.

        Raises
        ------
        StoreError
            If the fork lacks tensors, or the range overlaps a live segment.
        """
        return self._commit(fork, segment, [])

    def replace(self, children: list[Segment], fork: ForkSession, merged: Segment) -> bool:
        """Put `merged` in the place of `children`, in one commit."""
        return self._commit(fork, merged, children)

    def _commit(self, fork: ForkSession, segment: Segment, children: list[Segment]) -> bool:
        self._check_writable()
        with self._lock, translated(f"committing segment {segment.name} to {self.location}"):
            live = self.segments(segment.slice)
            if any(other.contains(segment) for other in live):
                self.drop(segment)
                return False
            if segment.name not in self._begun:
                raise StoreError(
                    f"segment {segment.name} was dropped or never begun; its fork is not committed"
                )
            missing = [child.name for child in children if child not in live]
            overlapping = [other.name for other in live if other.overlaps(segment) and other not in children]
            if missing or overlapping:
                raise StoreError(
                    f"segment {segment.name} was not committed: not live {missing}, overlapping {overlapping}"
                )
            attributes = {"samples": segment.samples, "set_aside": list(segment.set_aside)}
            write_group(fork.store, segment.path, attributes)
            self._check_complete(fork, segment)
            session = self._repository.writable_session("main")
            for child in children:
                sync(session.store.delete_dir(child.path))
            session.merge(fork)
            rest = [other for other in self.segments() if other not in children and other != segment]
            message = f"merge {segment.name}" if children else f"segment {segment.name}"
            live = sorted([*rest, segment])
            self._listed = (self._commit_session(session, message, live), live)
            self.drop(segment)
            return True

    def _check_complete(self, fork: ForkSession, segment: Segment) -> None:
        names = set(sync(list_names(fork.store, segment.path))) - {"zarr.json"}
        wanted = {parameter.name for parameter in self.manifest.parameters} if segment.samples else set()
        if names != wanted:
            odd = sorted(names ^ wanted)
            raise StoreError(
                f"segment {segment.name} has {len(names)} tensors instead of {len(wanted)}, "
                f"first difference {odd[0]!r}; not committed"
            )

    def begin_stage(self, stage: str, forks: int) -> list[ForkSession]:
        """Forks for the tasks of a stage that writes arrays beside the segments; see `begin`."""
        self._check_writable()
        with self._lock, translated(f"beginning to {stage}"):
            self._begun.setdefault(stage, datetime.now(UTC))
            return [self._repository.writable_session("base").fork() for _ in range(forks)]

    def drop_stage(self, stage: str) -> None:
        """Forget a stage's forks; what they wrote is collected by `clean`."""
        with self._lock:
            self._begun.pop(stage, None)

    def commit_stage(
        self, stage: str, groups: dict[str, dict[str, Any]], forks: Sequence[ForkSession]
    ) -> None:
        """Make a stage's arrays visible in place of what was in its groups, all at once.

        Parameters
        ----------
        stage : str
            As given to `begin_stage`.
        groups : dict
            Attributes by path of each group that the stage writes, such as ``rows``.
        forks : sequence of ForkSession
            As they came back from the tasks.
        """
        self._check_writable()
        with self._lock, translated(f"committing {stage} to {self.location}"):
            if stage not in self._begun:
                raise StoreError(f"{stage} was dropped or never begun; its forks are not committed")
            session = self._repository.writable_session("main")
            for path in groups:
                sync(session.store.delete_dir(path))
            session.merge(*forks)
            for path, attributes in groups.items():
                write_group(session.store, path, attributes)
            self._commit_session(session, stage, self.segments())
            self.drop_stage(stage)

    def reader(self) -> Reader:
        """A view of what is committed now, that later commits do not change."""
        with self._lock, translated(f"opening {self.location} for reading"):
            session = self._repository.readonly_session("main")
            live = list(self._segments_of(session))
            return Reader(session.store, live, self.location, self._content(session))

    def records(self, segment: Segment, name: str) -> zarr.Array[Any]:
        """The uint16 records of one tensor of a live segment, in the tensor's own shape."""
        return self.reader().array(segment, name)

    def clean(self, in_flight_since: datetime | None = None, grace: timedelta = timedelta(0)) -> int:
        """Expire old snapshots and delete what no live segment uses.

        Chunks that forks in flight have written are never touched: nothing newer than the oldest fork
        that was begun and neither committed nor dropped is deleted.

        Parameters
        ----------
        in_flight_since : datetime with time zone, optional
            Begin of a fork that this object does not know of.
        grace : timedelta
            How long a replaced segment stays for those who opened the store before.

        Returns
        -------
        int
            Bytes freed.
        """
        self._check_writable()
        with self._lock, translated(f"cleaning {self.location}"):
            now = datetime.now(UTC)
            begun = [*self._begun.values(), *([in_flight_since] if in_flight_since else [])]
            until = min([now - grace, *(begin - CLOCK_SKEW for begin in begun)])
            self._repository.expire_snapshots(older_than=now - grace)
            return int(self._repository.garbage_collect(until).bytes_deleted)

    def _commit_session(self, session: icechunk.Session, message: str, live: list[Segment]) -> str:
        """Commit with the names of what there is then; the snapshot's id."""
        groups = [name for name in GROUPS if sync(session.store.exists(f"{name}/zarr.json"))]
        content = Content(tuple(segment.name for segment in live), tuple(groups))
        return session.commit(message, content.tree())

    def _content(self, session: icechunk.Session) -> Content | None:
        """What the session's snapshot says that it holds."""
        metadata = self._repository.lookup_snapshot(session.snapshot_id).metadata
        return Content.of(metadata, self.location)

    def _check_writable(self) -> None:
        if self.read_only:
            raise StoreBusyError(f"{self.location} was opened for reading only")
