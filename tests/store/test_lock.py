from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.store.machines import beating
from tinyonn.errors import StoreBusyError
from tinyonn.store.lock import RunLock, read_owner

HOLD = """
import sys, time
from tinyonn.store.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_a_second_process_is_told_who_holds_the_run_and_a_kill_frees_it(tmp_path: Path) -> None:
    child = holder(tmp_path / "run")
    try:
        with pytest.raises(StoreBusyError) as caught, RunLock(tmp_path / "run"):
            pass
        message = str(caught.value)
        assert f"process {child.pid} on {socket.gethostname()}" in message
        assert "s ago" in message
        assert str(tmp_path / "run" / "lock") in message
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    with RunLock(tmp_path / "run"):
        assert read_owner(tmp_path / "run" / "lock")["pid"] == os.getpid()
    assert read_owner(tmp_path / "run" / "lock") == {}


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(StoreBusyError), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


def other_host(path: Path, age: float) -> None:
    now = time.time()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 5, "started": now - 900, "heartbeat": now - age}))


@pytest.mark.parametrize("skew", [0.0, 3600.0, -3600.0])
def test_another_machine_counts_by_whether_its_heartbeat_changes(tmp_path: Path, skew: float) -> None:
    with (
        beating(tmp_path / "lock", -skew),
        pytest.raises(StoreBusyError, match=r"held by process 5 on elsewhere \(.*lock\)"),
    ):
        RunLock(tmp_path, stale=30).__enter__()
    other_host(tmp_path / "lock", skew)
    started = time.monotonic()
    with RunLock(tmp_path, stale=0.4):
        assert read_owner(tmp_path / "lock")["host"] == socket.gethostname()
    assert time.monotonic() - started >= 0.4


def test_the_heartbeat_goes_on_and_a_lost_lock_is_noticed(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, heartbeat=0.02)
    with lock:
        before = read_owner(lock.path)["heartbeat"]
        deadline = time.monotonic() + 5
        while read_owner(lock.path)["heartbeat"] == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lock.check()
        other_host(tmp_path / "new", age=0)
        (tmp_path / "new").replace(lock.path)
        with pytest.raises(StoreBusyError, match="elsewhere"):
            lock.check()
    assert read_owner(lock.path)["host"] == "elsewhere", "leaving must not free what another holds"


@pytest.mark.parametrize("text", ["", "not json", "[1]", '{"host": "' + "x" * 10])
def test_an_unreadable_lock_file_belongs_to_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    with RunLock(tmp_path):
        assert read_owner(tmp_path / "lock")["pid"] == os.getpid()
