"""The driver on a real Ray: whoever records, in whatever order and whoever dies, the bits are the serial run's."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import tinyonn.record.driver as driver
from tests.dense.architectures import make_model
from tests.invariants import check_live
from tests.record.runs import (
    SLICES,
    actors,
    assert_same_run,
    config_of,
    expected_aside,
    make_sick_model,
    serial_run,
    wait_until_gone,
    write_rows,
)
from tinyonn.config import Config, parse_config
from tinyonn.errors import CapacityError, InputError, StoreBusyError
from tinyonn.record.driver import record
from tinyonn.record.report import RecordReport
from tinyonn.status import read_status
from tinyonn.store.lock import RunLock
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.merge import merge_ready
from tinyonn.store.repository import Store
from tinyonn.store.tree import next_segment
from tinyonn.workers.crew import MAX_LOSSES, Crew

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class World:
    """A model, a corpus and the serial run that all others must equal."""

    folder: Path
    model: Path
    rows: list[dict[str, str]]
    serial: Store

    def config(self, **record: Any) -> Config:
        return config_of(self.model, self.folder / "rows.jsonl", **record)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("driver")
    model = make_sick_model(folder / "model")
    rows = write_rows(folder / "rows.jsonl")
    serial = serial_run(folder / "serial", config_of(model, folder / "rows.jsonl"))
    return World(folder, model, rows, serial)


@pytest.fixture(scope="module", autouse=True)
def connected(ray_cluster: str) -> Iterator[None]:
    """Connect once: each run below is a user of the same cluster, one after another."""
    ray.init(address=ray_cluster, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def run(world: World, folder: Path, **options: Any) -> RecordReport:
    return record(str(folder), world.config(**options), progress=False)


def assert_complete(world: World, folder: Path) -> None:
    store = Store.open(folder / "store")
    assert {segment.slice: segment.range for segment in store.segments()} == {
        name: (0, count) for name, count in SLICES.items()
    }
    assert_same_run(world.serial, store)


@pytest.fixture(scope="module")
def finished(world: World) -> tuple[Path, RecordReport]:
    """A run of two workers that nothing disturbed, and its report."""
    folder = world.folder / "finished"
    return folder, run(world, folder, workers=2)


@pytest.mark.nightly
def test_two_workers_give_the_serial_bits(world: World, finished: tuple[Path, RecordReport]) -> None:
    folder, report = finished
    assert_complete(world, folder)
    aside = expected_aside(world.rows)
    assert report.samples == report.samples_recorded == len(world.rows) - len(aside)
    assert (report.set_aside, report.live_segments) == (len(aside), len(SLICES))
    assert 1 <= report.workers <= 2  # on a busy machine the second may come up when all is done
    assert report.samples_per_second > 0
    wait_until_gone()


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.nightly), 3])
def test_any_number_of_workers_gives_the_same_bits(world: World, tmp_path: Path, workers: int) -> None:
    took_part = run(world, tmp_path / "run", workers=workers).workers
    assert workers - 1 <= took_part <= workers  # on a busy machine the last may come up when all is done
    assert_complete(world, tmp_path / "run")


def test_samples_set_aside_are_listed(world: World, finished: tuple[Path, RecordReport]) -> None:
    status = read_status(str(finished[0]))
    assert {item["index"]: item["reason"] for item in status.set_aside} == expected_aside(world.rows)
    assert {item["slice"] for item in status.set_aside} == set(SLICES)
    assert {part.slice: part.set_aside for part in status.slices} == dict.fromkeys(SLICES, 2)


def test_a_second_call_has_nothing_to_do(
    world: World,
    finished: tuple[Path, RecordReport],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("tinyonn"), "propagate", True)
    folder, first = finished
    segments = Store.open(folder / "store").segments()
    before = sorted(path.name for path in (folder / "store").rglob("*"))
    with caplog.at_level("INFO", logger="tinyonn"):
        second = run(world, folder)
    assert f"all {len(world.rows)} samples are recorded: nothing to do" in caplog.text
    assert (second.samples_recorded, second.samples, second.workers) == (0, first.samples, 0)
    assert second.set_aside == first.set_aside
    assert Store.open(folder / "store").segments() == segments
    assert sorted(path.name for path in (folder / "store").rglob("*")) == before


def test_segments_in_another_order_give_the_same_bits(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deal the leaves from the last to the first, one at a time."""
    order: list[str] = []

    def last_first(
        manifest: Manifest, live: list[Segment], in_flight: list[Segment], workers: int
    ) -> Segment | None:
        leaves = [leaf for name in manifest.slices for leaf in manifest.leaves(name)]
        missing = [leaf for leaf in leaves if not any(segment.contains(leaf) for segment in live)]
        chosen = [leaf for leaf in missing if leaf not in in_flight]
        if chosen:
            order.append(chosen[-1].name)
        return chosen[-1] if chosen else None

    monkeypatch.setattr(driver, "next_segment", last_first)
    run(world, tmp_path / "run")
    manifest = world.serial.manifest
    assert order == [leaf.name for name in manifest.slices for leaf in manifest.leaves(name)][::-1]
    assert_complete(world, tmp_path / "run")


def test_resuming_with_a_part_recorded_gives_the_same_bits(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "run")
    done = read_status(str(tmp_path / "run"))
    assert 0 < done.samples < len(world.rows)
    assert not done.complete
    monkeypatch.undo()
    report = run(world, tmp_path / "run", workers=1)
    assert report.samples == report.samples_recorded + done.samples
    assert_complete(world, tmp_path / "run")


def test_a_slow_worker_holds_up_nobody(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first segment's worker sleeps; what it holds is dealt a second time and its own copy is dropped."""
    dealt: list[str] = []
    held: list[psutil.Process] = []
    real = driver._Recording._start

    def start(self: Any, task: Any) -> None:
        real(self, task)
        if not task.writing and task.window == 0:
            dealt.append(task.segment.name)
        if not held:
            held.append(psutil.Process(self.crew.facts[task.worker].pid))
            held[0].suspend()

    monkeypatch.setattr(driver._Recording, "_start", start)
    try:
        run(world, tmp_path / "run")
    finally:
        if held[0].is_running():
            held[0].resume()
    assert dealt.count(dealt[0]) == 2
    assert_complete(world, tmp_path / "run")


def test_a_lost_copy_of_a_segment_does_not_take_the_other_with_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers write the same segment; the second one dies, and the first one's fork must still commit."""
    killed: list[str] = []
    real = driver._Recording._start

    def start(self: Any, task: Any) -> None:
        copies = [other for other in self._tasks() if other.segment == task.segment and other.fork]
        real(self, task)
        if copies and task.fork is not None and not killed:
            killed.append(task.segment.name)
            os.kill(self.crew.facts[task.worker].pid, signal.SIGKILL)

    def twice(
        manifest: Manifest, live: list[Segment], in_flight: list[Segment], workers: int
    ) -> Segment | None:
        """Every segment is dealt to both workers."""
        names = [segment.name for segment in in_flight]
        once = [segment for segment in in_flight if names.count(segment.name) == 1]
        return once[0] if once else next_segment(manifest, live, in_flight, workers)

    monkeypatch.setattr(driver._Recording, "_start", start)
    monkeypatch.setattr(driver, "next_segment", twice)
    run(world, tmp_path / "run")
    assert killed
    assert_complete(world, tmp_path / "run")


def stop_after(monkeypatch: pytest.MonkeyPatch, commits: int) -> None:
    """Interrupt the driver, as Ctrl-C would, when so many segments are committed."""
    real = driver._Recording._commit
    count = [0]

    def commit(self: Any, task: Any) -> None:
        real(self, task)
        count[0] += 1
        if count[0] == commits:
            raise KeyboardInterrupt

    monkeypatch.setattr(driver._Recording, "_commit", commit)


@pytest.fixture(scope="module")
def begun(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a part recorded, for those who come with something else."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(world, folder)
    return folder


def other_model(world: World, tmp_path: Path) -> dict[str, Any]:
    return {"model": {"path": str(make_model("qwen2", tmp_path / "model", seed=5))}}


def other_tokenizer(world: World, tmp_path: Path) -> dict[str, Any]:
    folder = Path(shutil.copytree(world.model, tmp_path / "model"))
    file = folder / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace('"a":', '"@@":', 1).replace('"b":', '"a":', 1), "utf-8")
    return {"model": {"path": str(folder)}}


def other_rows(world: World, tmp_path: Path) -> dict[str, Any]:
    write_rows(tmp_path / "rows.jsonl", {**SLICES, "odd": 14}, seed=3)
    return {"data": {"path": str(tmp_path / "rows.jsonl")}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_model, [r"model\.model\.safetensors: '\w+' in the run, '\w+' now"]),
        (other_tokenizer, [r"model\.tokenizer\.json: '\w+' in the run"]),
        (other_rows, [r"data\.corpus: '\w+' in the run, '\w+' now", r"slices\.odd: 10 in the run, 14 now"]),
        ({"data": {"seed": 9}}, [r"data\.corpus: '\w+' in the run, '\w+' now"]),
        ({"data": {"max_tokens": 10}}, [r"data\.corpus: "]),
        (
            {"record": {"segment": 5, "seed": 1}},
            ["segment_size: 4 in the run, 5 now", "seed: 0 in the run, 1"],
        ),
        (
            {"record": {"calibration": 9, "max_live": 2}},
            [r"config\.calibration: 32 in the run, 9", "max_live: 3"],
        ),
        ({"model": {"dtype": "bfloat16"}}, [r"config\.dtype: 'float32' in the run, 'bfloat16' now"]),
        ({"model": {"quantization": "nf4"}}, [r"config\.quantization: 'none' in the run, 'nf4' now"]),
    ],
)
def test_going_on_with_something_else_is_refused(
    world: World,
    begun: Path,
    tmp_path: Path,
    change: dict[str, Any] | Callable[[World, Path], dict[str, Any]],
    named: list[str],
) -> None:
    tree = changed(world, change if isinstance(change, dict) else change(world, tmp_path))
    before = read_status(str(begun))
    corpus = (begun / "corpus.arrow").read_bytes()
    with pytest.raises(InputError) as refusal:
        record(str(begun), parse_config(tree, whole=True), progress=False)
    message = str(refusal.value)
    assert message.startswith(f"{begun} was begun with something else: ")
    assert all(re.search(part, message) for part in named), message
    assert message.endswith("or record into another run")
    beside = sum(message.count(name) for name in ("tokenizer_config.json", "model.config.json"))
    assert message.count(" in the run, ") == len(named) + beside, message
    assert read_status(str(begun)) == before
    assert (begun / "corpus.arrow").read_bytes() == corpus
    assert sorted(path.name for path in begun.iterdir()) == ["corpus.arrow", "lock", "store"]


def test_options_that_decide_no_bit_may_change(world: World, begun: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "run"))  # moved, too
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((world.folder / "rows.jsonl").read_bytes())
    config = config_of(world.model, moved, workers=1, windows=2, segment="auto")
    record(str(folder), config, progress=False)
    assert_complete(world, folder)


def test_what_a_killed_driver_left_half_done_is_removed(world: World, begun: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "run"))
    (folder / "corpus.arrow.123.unordered").write_bytes(b"half")
    (folder / "corpus.arrow").rename(folder / "corpus.kept")
    (folder / "corpus.arrow").write_bytes(b"of something else")
    with pytest.raises(InputError, match="segment_size: 4 in the run, 5 now"):
        run(world, folder, segment=5)
    with pytest.raises(InputError, match=r"data\.corpus"):
        record(str(folder), parse_config(changed(world, {"data": {"seed": 9}}), whole=True), progress=False)
    assert (folder / "corpus.arrow").read_bytes() == (begun / "corpus.arrow").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.arrow", "lock", "store"]


def changed(world: World, options: dict[str, Any]) -> dict[str, Any]:
    """The world's configuration with some options changed."""
    tree = world.config().model_dump(exclude_unset=True)
    return {name: {**section, **options.get(name, {})} for name, section in tree.items()}


def test_a_second_driver_is_refused(world: World, tmp_path: Path) -> None:
    with (
        RunLock(tmp_path / "run"),
        pytest.raises(StoreBusyError, match=rf"held by process {os.getpid()} .*wait for it or stop it"),
    ):
        run(world, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lock"]


@pytest.mark.parametrize("windows", [1, 4])
def test_killed_workers_cost_no_bit(world: World, tmp_path: Path, windows: int) -> None:
    """``kill -9`` a worker every now and then, for as long as the run lasts."""
    chance = random.Random(int(os.environ.get("TINYONN_SEED", "11")))
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(chance.uniform(0.3, 2.0)):
            if (victims := actors()) and len(killed) < 6:
                victim = chance.choice(victims)
                victim.kill()
                killed.append(victim.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run(world, tmp_path / "run", windows=windows, workers=3)
    finally:
        ended.set()
        killer.join()
    assert len(set(killed)) >= 2
    assert_complete(world, tmp_path / "run")


def test_workers_that_always_die_end_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    real = driver._Recording._start

    def start(self: Any, task: Any) -> None:
        killed.append(self.crew.facts[task.worker].pid)
        os.kill(killed[-1], signal.SIGKILL)
        real(self, task)

    monkeypatch.setattr(driver._Recording, "_start", start)
    with pytest.raises(CapacityError, match=rf"{MAX_LOSSES} workers died in a row.*fewer record\.workers"):
        run(world, tmp_path / "run", workers=1)
    assert len(killed) == MAX_LOSSES
    assert not actors()
    assert read_status(str(tmp_path / "run")).samples == 0


def test_a_worker_that_dies_while_it_calibrates_is_replaced(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    real = Crew.call

    def call(self: Crew[Any], number: int, method: str, *args: Any) -> Any:
        if method == ("calibrate", "prepare")[min(len(killed), 1)] and len(killed) < 2:
            killed.append(self.facts[number].pid)
            os.kill(killed[-1], signal.SIGKILL)
        return real(self, number, method, *args)

    monkeypatch.setattr(Crew, "call", call)
    run(world, tmp_path / "run", workers=1)
    assert len(killed) == 2
    assert_complete(world, tmp_path / "run")


def test_live_segments_stay_bounded(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at after every commit, of a leaf or of a merge; the merges are made slow."""
    counts: list[int] = []
    workers = 3
    real, slow = Store._commit, merge_ready

    def commit(self: Store, *args: Any) -> bool:
        done = real(self, *args)
        segments = self.segments()
        check_live(self.manifest, segments, workers)
        counts.append(len(segments))
        return done

    def merge_slowly(store: Store, stop: Callable[[], bool] = lambda: False) -> int:
        time.sleep(0.7)
        return slow(store, stop)

    monkeypatch.setattr(Store, "_commit", commit)
    monkeypatch.setattr(driver, "merge_ready", merge_slowly)
    run(world, tmp_path / "run", segment=1, workers=workers, max_live=2)
    assert max(counts) > len(SLICES)
    assert counts[-1] == len(SLICES)
    assert len(counts) > sum(SLICES.values())
    monkeypatch.undo()  # the serial run merges at its end alone
    store = Store.open(tmp_path / "run" / "store")
    serial = serial_run(tmp_path / "serial", world.config(segment=1, max_live=2))
    assert_same_run(serial, store)
