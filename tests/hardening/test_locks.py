"""The lock file under attack: links, odd contents, other clocks; and stages that would change what another reads."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.hardening.neighbour import environment
from tests.store.machines import beating
from tests.train.runs import World, make_world
from tinyonn.cli import app
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import ExpertsConfig
from tinyonn.errors import StoreBusyError, StoreError
from tinyonn.evaluate.allocate import AllocateOptions, allocate_run
from tinyonn.evaluate.stage import EvaluateOptions, evaluate_run
from tinyonn.evaluate.trained import evaluate_trained
from tinyonn.experts.assemble import assemble_run
from tinyonn.profile.stage import ProfileOptions, profile_run
from tinyonn.record.driver import record
from tinyonn.run import merge_run
from tinyonn.score.stage import score_run
from tinyonn.store.lock import RunLock, only_writer, read_owner
from tinyonn.train.stage import train_run

TEXT = b"-----BEGIN PRIVATE KEY-----\n" + bytes(range(256))


def link(folder: Path, target: Path) -> None:
    (folder / "lock").symlink_to(target)


def hard_link(folder: Path, target: Path) -> None:
    (folder / "lock").hardlink_to(target)


@pytest.mark.parametrize("plant", [link, hard_link])
@pytest.mark.parametrize("shared", [False, True])
def test_a_lock_that_leads_elsewhere_is_refused_and_its_target_stays(
    tmp_path: Path, plant: Callable[[Path, Path], None], shared: bool
) -> None:
    (tmp_path / "run").mkdir()
    target = tmp_path / "key.pem"
    target.write_bytes(TEXT)
    plant(tmp_path / "run", target)
    with pytest.raises(StoreError, match=r"run/lock.* (symbolic link|one more name)"), lock(tmp_path, shared):
        pass
    assert target.read_bytes() == TEXT


@pytest.mark.parametrize("what", ["pipe", "folder", "socket", "large", "dangling"])
def test_what_is_no_file_of_ours_is_refused_and_stays(tmp_path: Path, what: str) -> None:
    place = tmp_path / "run" / "lock"
    place.parent.mkdir()
    if what == "pipe":
        os.mkfifo(place)
    elif what == "folder":
        place.mkdir()
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place))
    elif what == "large":
        place.write_bytes(b"x" * 10_000_000)
    else:
        place.symlink_to(tmp_path / "nowhere")
    before = place.lstat()
    with pytest.raises(StoreError, match="run/lock"), lock(tmp_path, False):
        pass
    assert read_owner(place) == {}
    assert (place.lstat().st_mode, place.lstat().st_size) == (before.st_mode, before.st_size)
    assert not (tmp_path / "nowhere").exists()


def lock(folder: Path, shared: bool = False) -> RunLock:
    return RunLock(folder / "run", stale=0.06, shared=True) if shared else RunLock(folder / "run", stale=0.06)


ODD = [
    b"",
    b"{",
    b"[1]",
    b"null",
    b"\xff\xfe{}",
    b"[" * 4000,
    b'{"host": ' + b"9" * 4000,
    b'{"host": "elsewhere", "heartbeat": NaN}',
    *(
        json.dumps({"host": host, "pid": pid, "started": moment, "heartbeat": moment}).encode()
        for host in ("elsewhere", socket.gethostname(), "", "a\x1b[2J[/red]b" * 9, 7, None)
        for pid, moment in (
            (-1, "soon"),
            (1e300, 1e300),
            ("5", [1]),
            (1 << 70, 1 << 70),
            (None, None),
            (True, -1e300),
        )
    ),
]


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("shared", [False, True])
def test_whatever_a_lock_file_says_nobody_holds_it_once_nothing_changes(
    tmp_path: Path, content: bytes, shared: bool
) -> None:
    place = tmp_path / "run" / "lock"
    place.parent.mkdir()
    place.write_bytes(content)
    with lock(tmp_path, shared) as held:
        held.check()
        place.write_bytes(content) if shared else None
        with pytest.raises(StoreBusyError, match=r"held by .*run/lock"), lock(tmp_path):
            pass
    assert shared or read_owner(place) == {}


def test_random_bytes_never_break_a_lock(tmp_path: Path) -> None:
    numbers = random.Random(0)
    good = json.dumps({"host": "elsewhere", "pid": 5, "started": 1.0, "heartbeat": 2.0}).encode()
    (tmp_path / "run").mkdir()
    for _ in range(60):
        spoilt = bytearray(good)
        for _ in range(numbers.randint(1, 6)):
            spoilt[numbers.randrange(len(spoilt))] = numbers.randrange(256)
        (tmp_path / "run" / "lock").write_bytes(bytes(spoilt))
        with RunLock(tmp_path / "run", stale=0.02):
            pass


def test_what_a_message_shows_of_a_lock_is_harmless(tmp_path: Path) -> None:
    host = "evil\x1b]0;x\x07\nhost" + "x" * 900
    with (
        beating(tmp_path / "run" / "lock", host=host),
        pytest.raises(StoreBusyError) as caught,
        lock_long(tmp_path),
    ):
        pass
    assert all(character.isprintable() for character in str(caught.value))
    assert len(str(caught.value)) < 400


def lock_long(folder: Path, shared: bool = False) -> RunLock:
    return RunLock(folder / "run", stale=20, shared=True) if shared else RunLock(folder / "run", stale=20)


@pytest.mark.parametrize("skew", [-1e9, -7200.0, -30.0, 0.0, 30.0, 7200.0, 1e9])
@pytest.mark.parametrize("shared", [False, True])
def test_another_machines_clock_neither_lets_in_nor_locks_out(
    tmp_path: Path, skew: float, shared: bool
) -> None:
    with (
        beating(tmp_path / "run" / "lock", skew),
        pytest.raises(StoreBusyError, match="process 5 on elsewhere"),
        lock_long(tmp_path, shared),
    ):
        pass
    with lock(tmp_path, shared):  # its last heartbeat stays what it was: dead
        pass


def test_a_machine_of_the_same_name_is_another_one(tmp_path: Path) -> None:
    """The kernel's lock of one says nothing of the other; what tells them apart is when they were started."""
    (tmp_path / "run").mkdir()
    owner = {"host": socket.gethostname(), "boot": "another", "pid": 5, "started": 1.0, "heartbeat": 1.0}
    (tmp_path / "run" / "lock").write_text(json.dumps(owner))
    started = time.monotonic()
    with lock(tmp_path):
        assert time.monotonic() - started >= 0.06, "watched first"


def test_readers_share_and_keep_writers_out_who_are_told_whom(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run", shared=True, what="train"):  # nothing is there: nobody to keep out
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run", shared=True, what="train"):
        with RunLock(tmp_path / "run", shared=True, what="evaluate"):
            pass
        with (
            pytest.raises(
                StoreBusyError, match=rf"held by process {os.getpid()} on \S+ \(train\), started \d+ s ago"
            ),
            RunLock(tmp_path / "run", what="assemble"),
        ):
            pass
    with (
        RunLock(tmp_path / "run", what="assemble"),
        pytest.raises(StoreBusyError, match=r"\(assemble\)"),
        RunLock(tmp_path / "run", shared=True, what="train"),
    ):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_reader_on_another_machine_keeps_writers_out_until_it_dies(tmp_path: Path) -> None:
    reader = tmp_path / "run" / "lock.0123abcd"
    with beating(reader), lock_long(tmp_path, shared=True):  # readers do not mind each other
        pass
    with (
        beating(reader),
        pytest.raises(StoreBusyError, match=r"elsewhere \(.*lock\.0123abcd\)"),
        lock_long(tmp_path),
    ):
        pass
    with lock(tmp_path):
        assert not reader.exists()


def test_a_killed_reader_frees_the_run_at_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    code = (
        "import sys\nfrom tinyonn.store.lock import RunLock\n"
        "with RunLock(sys.argv[1], shared=True, what='train'):\n print('held', flush=True)\n sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(StoreBusyError, match=rf"process {child.pid} .*\(train\)"), lock_long(tmp_path):
        pass
    child.kill()
    child.communicate()
    started = time.monotonic()
    with lock_long(tmp_path):
        assert time.monotonic() - started < 5


def test_a_run_that_cannot_be_written_is_read_without_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    with lock(tmp_path, shared=True):
        pass
    with pytest.raises(StoreError, match="cannot make the lock file"), lock(tmp_path):
        pass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("locks"))


def changing(world: World) -> dict[str, Callable[[], Any]]:
    """The stages that change what others read."""
    return {
        "record": lambda: record(world.run, world.config, progress=False),
        "merge": lambda: merge_run(world.run),
        "score": lambda: score_run(world.run, world.config),
        "cluster": lambda: cluster_run(world.run, world.config, fresh=True),
        "assemble": lambda: assemble_run(world.run, world.config.model, ExpertsConfig(budget=0.3)),
        "profile": lambda: profile_run(world.run, world.config, ProfileOptions(workers=1, fresh=True)),
    }


def digests(folder: Path) -> dict[str, str]:
    """Of every file of what training reads."""
    files = (path for name in ("experts", "profile", "store") for path in sorted((folder / name).rglob("*")))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}


def test_nothing_changes_what_a_training_reads(world: World, tmp_path: Path) -> None:
    before, refusals = digests(Path(world.run)), dict[str, str]()

    def meanwhile(line: str) -> None:
        """Called by the training as it goes."""
        for stage, call in changing(world).items():
            if stage not in refusals:
                with pytest.raises(StoreBusyError) as caught:
                    call()
                refusals[stage] = str(caught.value)

    train_run(world.run, world.config, world.options(tmp_path, steps=1, warm_start=0), meanwhile)
    assert refusals.keys() == changing(world).keys()
    assert all(
        f"held by process {os.getpid()} on" in text and "(train)" in text for text in refusals.values()
    )
    assert digests(Path(world.run)) == before


def test_nothing_is_read_that_is_being_changed(world: World, tmp_path: Path) -> None:
    held_out = EvaluateOptions(
        data=world.config.data.model_copy(update={"samples": 2}), samples=2, split="all"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    reading: dict[str, Callable[[], Any]] = {
        "train": lambda: train_run(world.run, world.config, world.options(tmp_path)),
        "evaluate": lambda: evaluate_run(world.run, world.config, held_out),
        "evaluate --trained": lambda: evaluate_trained(world.run, world.config, held_out, tmp_path / "model"),
        "evaluate --allocate": lambda: allocate_run(world.run, world.config, AllocateOptions()),
    }
    with RunLock(world.run, what="assemble"):
        for stage, call in reading.items():
            with pytest.raises(StoreBusyError, match=r"\(assemble\)"):
                call()
            assert stage
    done = CliRunner().invoke(app, ["export", world.run, str(tmp_path / "out"), "--format", "npz"])
    assert done.exit_code == 0, done.output
    with RunLock(world.run, what="assemble"):
        done = CliRunner().invoke(app, ["export", world.run, str(tmp_path / "again"), "--format", "npz"])
    assert done.exit_code == StoreBusyError.exit_code
    assert not (tmp_path / "again").exists()


def test_one_evaluates_at_a_time_beside_a_training(world: World) -> None:
    from tinyonn.store.lock import evaluating

    with (
        RunLock(world.run, shared=True, what="train"),
        evaluating(world.run),
        pytest.raises(StoreBusyError, match=r"\(evaluate\)"),
        evaluating(world.run),
    ):
        pass


def test_one_assembles_into_a_folder_at_a_time(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with only_writer(folder), pytest.raises(StoreBusyError, match=rf"writes into {folder}; .*another folder"):
        assemble_run(world.run, world.config.model, ExpertsConfig(budget=0.3), folder=folder)
    assemble_run(world.run, world.config.model, ExpertsConfig(budget=0.3), folder=folder)
    assert not list(folder.glob("lock*"))
