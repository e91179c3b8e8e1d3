"""A real store against a plain-Python model of it, driven by Hypothesis in any order it can think of."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from icechunk import ForkSession

from tests.invariants import check_ranges, check_records, check_store, finished, small_manifest
from tests.store.worlds import new_store, record_leaf, write_leaf
from tinyonn.store.manifest import Segment
from tinyonn.store.merge import merge_ready
from tinyonn.store.repository import Store


class StoreMachine(RuleBasedStateMachine):
    """The model: the set of committed leaves, and the forks in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="tinyonn-machine-"))
        self.committed: set[tuple[str, tuple[int, int]]] = set()
        self.flying: dict[str, tuple[Segment, ForkSession]] = {}

    @initialize(max_live=st.integers(1, 3))
    def create(self, max_live: int) -> None:
        self.manifest = small_manifest({"code": 22, "prose": 9}, max_live=max_live)
        self.leaves = [leaf for name in self.manifest.slices for leaf in self.manifest.leaves(name)]
        self.store = new_store(self.folder / "store", self.manifest)

    @rule(index=st.integers(0, 8))
    def begin_and_write(self, index: int) -> None:
        leaf = self.leaves[index]
        if leaf.name not in self.flying:
            self.flying[leaf.name] = (leaf, write_leaf(self.store.begin(leaf), self.manifest, leaf))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        leaf, fork = self.flying.pop(data.draw(st.sampled_from(sorted(self.flying))))
        new = (leaf.slice, leaf.range) not in self.committed
        assert self.store.commit(fork, finished(leaf)) is new
        self.committed.add((leaf.slice, leaf.range))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def lose_the_actor(self, data: st.DataObject) -> None:
        leaf, _ = self.flying.pop(data.draw(st.sampled_from(sorted(self.flying))))
        self.store.drop(leaf)

    @rule(index=st.integers(0, 8))
    def record_at_once(self, index: int) -> None:
        leaf = self.leaves[index]
        if leaf.name not in self.flying:
            record_leaf(self.store, leaf)
            self.committed.add((leaf.slice, leaf.range))

    @rule(count=st.integers(1, 4))
    def record_the_next(self, count: int) -> None:
        """In order, as the driver deals, so that merges become ready."""
        missing = [leaf for leaf in self.leaves if (leaf.slice, leaf.range) not in self.committed]
        for leaf in [leaf for leaf in missing if leaf.name not in self.flying][:count]:
            record_leaf(self.store, leaf)
            self.committed.add((leaf.slice, leaf.range))

    @rule(tensors=st.integers(0, 12))
    def merge_until_stopped(self, tensors: int) -> None:
        left = iter(range(tensors))
        merge_ready(self.store, stop=lambda: next(left, None) is None, clean=False)

    @rule()
    def merge_and_clean(self) -> None:
        merge_ready(self.store)

    @rule()
    def clean(self) -> None:
        self.store.clean()

    @rule()
    def restart(self) -> None:
        """The driver dies and starts again: forks in flight are lost with it."""
        self.flying.clear()
        self.store = Store.open(self.folder / "store", read_only=False)

    @invariant()
    def exactly_the_committed_leaves_are_covered_once(self) -> None:
        assert check_ranges(self.manifest, self.store.segments()) == self.committed

    @invariant()
    def the_records_are_those_of_the_leaves(self) -> None:
        check_records(self.store)

    def teardown(self) -> None:
        try:
            if hasattr(self, "store"):
                merge_ready(self.store)
                self.store.clean()
                assert check_store(Store.open(self.folder / "store")) == self.committed
        finally:
            shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStore = StoreMachine.TestCase
