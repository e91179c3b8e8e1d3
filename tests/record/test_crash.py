"""``kill -9`` of the whole driver at random moments of its lives: nothing acknowledged is lost, the bits are the same.

Every life is a process of ``python -m tinyonn record``. Where a kill has landed is read from what it left behind.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from tests.invariants import check_live
from tests.options import written
from tests.record.runs import actors, assert_same_run, config_of, make_sick_model, serial_run, write_rows
from tinyonn.record.driver import record
from tinyonn.store.manifest import parse_segment
from tinyonn.store.repository import Store
from tinyonn.store.tree import ready_merges

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KILLS = 25
SLICES = {"even": 100, "odd": 60, "rare": 30, "sick": 2}
PATIENCE = 900.0  # seconds for anything that must happen


class Life:
    """One call of ``tinyonn record`` and what it says in its log."""

    all: ClassVar[list[Life]] = []

    def __init__(self, run: Path, config: Path, *arguments: str, **environment: str) -> None:
        self.run = run
        self.log = run / "logs" / "record.log"
        self.before = self.log.stat().st_size if self.log.exists() else 0
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tinyonn", "record", str(run), "--config", str(config), "--json", *arguments],
            cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        Life.all.append(self)

    @property
    def age(self) -> float:
        return time.monotonic() - self.started

    def said(self, pattern: str) -> list[str]:
        """What matches in this life's part of the log."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as stream:
            stream.seek(self.before)
            return re.findall(pattern, stream.read().decode())

    def committed(self) -> list[str]:
        return self.said(r"committed (\S+):")

    def wait_for(self, what: str, happened: Callable[[], object]) -> None:
        while not happened():
            assert self.process.poll() is None, f"ended without {what}"
            assert self.age < PATIENCE, f"no {what} in {PATIENCE:.0f} s"
            time.sleep(0.002)

    def wait_for_words(self, pattern: str) -> None:
        self.wait_for(f"{pattern!r} in its log", lambda: self.said(pattern))

    def wait_for_commits(self, count: int) -> None:
        self.wait_for(f"{count} commits", lambda: len(self.committed()) >= count)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def end(self) -> dict[str, object]:
        """Let it end by itself; returns its report."""
        out, err = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, err
        report: dict[str, object] = json.loads(out.splitlines()[-1])
        return report


def where_it_landed(run: Path) -> str:
    """The phase in which a driver was killed, from its files alone."""
    if not (run / "corpus.arrow").exists():
        return "tokenising" if list(run.glob("corpus.arrow.*")) else "importing"
    if not Store.exists(run / "store"):
        return "starting workers"
    store = Store.open(run / "store")
    if store.calibration is None:
        return "calibrating"
    if not store.segments():
        return "recording the first segments"
    return "merging" if ready_merges(store.manifest, store.segments()) else "recording and committing"


def wait_until_gone(what: str, living: Callable[[], list[psutil.Process]]) -> None:
    deadline = time.monotonic() + 60
    while left := living():
        assert time.monotonic() < deadline, f"{what} outlived their driver: {left}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def sick_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sick_model(tmp_path_factory.mktemp("crash") / "model")


@pytest.fixture(autouse=True)
def _no_life_left() -> Iterator[None]:
    yield
    while Life.all:
        Life.all.pop().process.kill()


def write_config(folder: Path, model: Path, slices: dict[str, int], **options: int) -> Path:
    write_rows(folder / "rows.jsonl", slices)
    config = config_of(model, folder / "rows.jsonl", **options)
    path = folder / "config.yaml"
    path.write_text(json.dumps(written(config)), "utf-8")  # JSON is YAML
    return path


@pytest.mark.timeout(3600)
def test_a_driver_killed_again_and_again_ends_in_the_same_bits(
    ray_cluster: str, sick_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, sick_model, SLICES, segment=2)
    run = tmp_path / "run"
    chance = random.Random(int(os.environ.get("TINYONN_SEED", "3")))
    landed: list[str] = []
    acknowledged: set[str] = set()
    covered: set[tuple[str, int]] = set()
    startup = 0.0  # seconds until a driver calibrates, as measured in the third life
    for number in range(KILLS):
        life = Life(run, config, "--address", ray_cluster)
        if number < 2:
            life.wait_for("corpus", lambda: list(run.glob("corpus.arrow*")))
            time.sleep(chance.uniform(0, 0.03))
        elif number < 4:
            life.wait_for_words("calibrating")
            startup = startup or life.age
            time.sleep(chance.uniform(0, 0.5))
        elif number % 3 == 2:  # at any moment of its start
            time.sleep(chance.uniform(0, startup))
        else:  # while it records, commits and merges
            life.wait_for_commits(chance.choice([1, 1, 2]))
            time.sleep(chance.uniform(0, 0.3))
        life.kill()
        acknowledged |= set(life.committed())
        landed.append(where_it_landed(run))
        wait_until_gone("actors", actors)
        if Store.exists(run / "store"):
            store = Store.open(run / "store")
            check_live(store.manifest, store.segments(), workers=2)
            now = {
                (name, position)
                for name in store.manifest.slices
                for first, last in store.covered(name)
                for position in range(first, last)
            }
            assert covered <= now, "what was committed is gone"
            covered = now
            parts = [parse_segment(name) for name in acknowledged]
            assert {(part.slice, i) for part in parts for i in range(part.first, part.last)} <= covered
    assert len(landed) == KILLS
    phases = Counter(landed)
    assert len(phases) >= 4, phases
    assert phases["recording and committing"] + phases["merging"] >= KILLS // 3, phases
    assert sum(SLICES.values()) > len(covered) > 0
    report = Life(run, config, "--address", ray_cluster).end()
    assert report["live_segments"] == len(SLICES)
    serial = serial_run(tmp_path / "serial", config_of(sick_model, tmp_path / "rows.jsonl", segment=2))
    assert_same_run(serial, Store.open(run / "store"))
    print(f"kills landed while {dict(phases)}")


@pytest.mark.timeout(3600)
def test_a_driver_killed_with_its_local_ray_leaves_nothing_behind(
    ray_cluster: str, sick_model: Path, tmp_path: Path
) -> None:
    slices = {"even": 30, "odd": 12, "rare": 7, "sick": 2}
    config = write_config(tmp_path, sick_model, slices, segment=2)
    run = tmp_path / "run"
    place = Path(tempfile.mkdtemp(prefix="tl-", dir="/tmp"))  # short: Ray's sockets lie below
    life = Life(run, config, RAY_TMPDIR=str(place))
    life.wait_for_commits(2)

    def daemons() -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["cmdline", "status"])
            if str(place) in " ".join(process.info["cmdline"] or [])
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    recorders = [psutil.Process(int(pid)) for pid in life.said(r"\(process (\d+)\)")]
    assert recorders
    assert len(daemons()) >= 2
    life.kill()
    wait_until_gone("Ray's processes", daemons)
    wait_until_gone("actors", lambda: [process for process in recorders if process.is_running()])
    shutil.rmtree(place)
    assert where_it_landed(run) in ("recording and committing", "merging")
    settings = config_of(sick_model, tmp_path / "rows.jsonl", segment=2)
    record(str(run), settings, address=ray_cluster, progress=False)
    assert_same_run(serial_run(tmp_path / "serial", settings), Store.open(run / "store"))
