"""Signals, and a Ray that is gone: real processes, which end in time, with a line and a code, and leave nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.hardening.lives import HANG, ROOT, slack
from tests.record.runs import make_sick_model
from tinyonn.errors import CapacityError
from tinyonn.workers.alive import Waiting

GOES_ON = "the same command goes on from there"
SCRIPT = """
import os, subprocess, sys, time
from pathlib import Path
from tinyonn import endings
from tinyonn.command import run_stage
endings.GRACE = {grace}
def body(location, settings):
    child = subprocess.Popen(["sleep", "300"])
    Path(sys.argv[1]).write_text(str(child.pid))
    {body}
endings.take_signals()
try:
    run_stage("merge", sys.argv[2], None, False, body)
finally:
    endings.leave()
"""
SLEEPS = "time.sleep(300)"
STUCK = """while True:
        try:
            time.sleep(300)
        except KeyboardInterrupt:
            pass"""


class Child:
    """A process that runs a stage with a body of its own, and has a child."""

    def __init__(self, folder: Path, body: str, grace: float = 8.0, ignored: tuple[int, ...] = ()) -> None:
        self.ready = folder / "ready"
        script = SCRIPT.format(body=body, grace=grace)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(self.ready), str(folder / "run")],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE, text=True, preexec_fn=lambda: [
                signal.signal(n, signal.SIG_IGN if n in ignored else signal.SIG_DFL)  # whatever this one ignores
                for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            ],
        )  # fmt: skip
        while not (self.ready.exists() and self.ready.read_text()):
            assert self.process.poll() is None
            time.sleep(0.02)
        self.child = psutil.Process(int(self.ready.read_text()))

    def end(self, seconds: float) -> tuple[int, str]:
        """Exit code and what it said; its child is gone."""
        _, said = self.process.communicate(timeout=seconds * slack())
        deadline = time.monotonic() + 10
        while self.child.is_running() and self.child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the child outlived it"
            time.sleep(0.02)
        return self.process.returncode, said


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "closed"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_ends_a_stage_with_one_line(tmp_path: Path, number: int, code: int, word: str) -> None:
    child = Child(tmp_path, SLEEPS)
    child.process.send_signal(number)
    ended, said = child.end(10)
    lines = [line for line in said.splitlines() if line]
    assert (ended, len(lines)) == (code, 1), said
    assert word in lines[0] and GOES_ON in lines[0]


def test_what_does_not_let_go_is_left_behind(tmp_path: Path) -> None:
    child = Child(tmp_path, STUCK, grace=1.5)
    began = time.monotonic()
    child.process.send_signal(signal.SIGTERM)
    code, said = child.end(10)
    assert code == 143 and "terminated" in said and "Traceback" not in said
    assert time.monotonic() - began >= 1.4


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    child = Child(tmp_path, STUCK, grace=120)
    child.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert child.process.poll() is None
    child.process.send_signal(signal.SIGTERM)
    assert child.end(10)[0] == 143


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    child = Child(tmp_path, SLEEPS, ignored=(signal.SIGHUP,))
    child.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert child.process.poll() is None
    child.process.send_signal(signal.SIGTERM)
    assert child.end(10)[0] == 143


def test_a_forked_child_that_is_terminated_does_not_end_its_parent(tmp_path: Path) -> None:
    fork = "pid = os.fork() or time.sleep(300); os.kill(pid, 15); told = os.waitpid(pid, 0)[1]"
    fork += "; Path(sys.argv[1] + '2').write_text(str(told))"
    child = Child(tmp_path, f"time.sleep(0.2); {fork}; time.sleep(300)")
    told = Path(f"{child.ready}2")
    while not (told.exists() and told.read_text()):
        assert child.process.poll() is None
        time.sleep(0.05)
    assert told.read_text() == "15"  # by the signal, as processes do
    assert child.process.poll() is None
    child.process.send_signal(signal.SIGTERM)
    assert child.end(10)[0] == 143


LOCAL = """
import sys, time
import psutil
from pathlib import Path
from tinyonn import endings
from tinyonn.command import run_stage
def body(location, settings):
    import ray
    from tinyonn.workers.alive import check, patiently
    from tinyonn.workers.ray import connected
    with connected(None, 1, lambda: "7 of 9 samples are committed and stay"):
        Path(sys.argv[1]).write_text("ready")
        {wait}
endings.take_signals()
try:
    run_stage("merge", sys.argv[2], None, False, body)
finally:
    endings.leave()
"""
ASKS = """while True:
            check()
            time.sleep(0.2)"""
SITS = "ray.get(ray.remote(lambda: time.sleep(300)).remote())"  # in a call of Ray's, as a stage may
CASES = [
    ("gcs_server", ASKS),
    pytest.param("raylet", SITS, marks=pytest.mark.slow),
    pytest.param("gcs_server", SITS, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("server", "wait"), CASES, ids=["gcs-asks", "raylet-sits", "gcs-sits"])
def test_a_local_ray_whose_process_is_killed_ends_the_stage(tmp_path: Path, server: str, wait: str) -> None:
    ready, run = tmp_path / "ready", tmp_path / "run"
    run.mkdir()
    script = LOCAL.format(wait=wait)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    with (tmp_path / "said").open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(ready), str(run)], cwd=tmp_path, env=environment, stderr=stream
        )
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    next(child for child in family if child.name() == server).kill()
    code = process.wait(HANG)
    said = (tmp_path / "said").read_text()
    assert code == 4, said
    assert server in said and "7 of 9 samples are committed and stay" in said and GOES_ON in said
    assert len([line for line in said.splitlines() if line]) == 1  # Ray's own words are in the run's logs
    deadline = time.monotonic() + 20 * slack()
    while left := [
        child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_without_any_worker_for_long_it_says_so_and_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    waiting = Waiting(told.append, lambda: "nothing was committed yet")
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    waiting = Waiting(told.append, lambda: "nothing was committed yet")
    for seconds in (1, 61, 100, 125):
        now[0] = float(seconds)
        waiting.see(any_worker=False)
    assert len(told) == 2 and "still waiting for a worker to start, for 61 of 900 s" in told[0]
    now[0] = 899.0
    waiting.see(any_worker=True)
    now[0] = 1700.0
    waiting.see(any_worker=False)
    monkeypatch.setenv("TINYONN_PATIENCE", "700")
    with pytest.raises(
        CapacityError, match=r"no worker could be had for 700 s.*nothing was committed yet.*goes on"
    ):
        waiting.see(any_worker=False)


@pytest.fixture
def full(ray_cluster: str) -> Iterator[str]:
    """A cluster that is full of other work."""
    import ray

    ray.init(address=ray_cluster, log_to_driver=False, logging_level="ERROR")
    hog = ray.remote(num_cpus=4)(type("Hog", (), {"there": lambda self: True})).remote()
    ray.get(hog.there.remote())
    yield ray_cluster
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_without_a_free_place_ends_a_recording(full: str, tmp_path: Path) -> None:
    from tests.record.test_crash import write_config

    config = write_config(tmp_path, make_sick_model(tmp_path / "model"), {"even": 6})
    process = subprocess.run(
        [sys.executable, "-m", "tinyonn", "record", str(tmp_path / "run"), "--config", str(config), "--address", full],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "TINYONN_PATIENCE": "5"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert process.returncode == 3, process.stderr
    assert "no worker could be had for 5 s" in process.stderr and GOES_ON in process.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_a_cluster_whose_head_is_gone_ends_a_recording(server: str, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    from tests.conftest import free_ports
    from tests.record.test_crash import Life, write_config

    head = {"num_cpus": 2, "include_dashboard": False, "gcs_server_port": free_ports(1)[0]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        config = write_config(tmp_path, make_sick_model(tmp_path / "model"), {"even": 400}, segment=2)
        life = Life(tmp_path / "run", config, "--address", str(cluster.address))
        life.wait_for_commits(1)
        cluster.head_node.all_processes[server][0].process.kill()
        began = time.monotonic()
        _, said = life.process.communicate(timeout=HANG)
        print(f"{server} of a cluster: ended after {time.monotonic() - began:.1f} s")
        assert life.process.returncode == 4, said
        assert "of 400 samples are committed and stay" in said and GOES_ON in said
        assert "core_worker" not in said and "Traceback" not in said
    finally:
        cluster.shutdown()


FINISHED = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from tinyonn import endings
class Told:
    def __init__(self, text):
        self.text = text
    def __del__(self):
        print(self.text, flush=True)
taken_apart = Told("the interpreter was taken apart")
atexit.register(print, "exit handlers ran")
ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.3), print("the pool's work is done")))
threading.Thread(target=time.sleep, args=(300,), daemon=True).start()
sys.stdout.write("held back, ")
endings.finish({code})
"""


def finished(code: int, stdout: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    script = [sys.executable, "-c", FINISHED.format(code=code)]
    return subprocess.run(
        script, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
    )


def test_a_process_that_is_done_ends_as_python_does_but_whole() -> None:
    """A thread of a library that asks for an interpreter which is taken apart aborts the process."""
    done = finished(3, subprocess.PIPE)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "held back, the pool's work is done\nexit handlers ran\n"


def test_what_cannot_be_written_at_the_end_is_no_success() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        assert [finished(code, full.fileno()).returncode for code in (0, 3)] == [120, 3]
