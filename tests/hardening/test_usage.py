"""What a run holds: all of its processes, what they share once, at one time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np

from tinyonn.plan import usage
from tinyonn.plan.usage import Meter, measured, total_peak
from tinyonn.show.sizes import MiB

SIZE = 160 * MiB
SLACK = 24 * MiB
HOLD = f"import sys, time; held = bytearray(b'x') * {SIZE}; print('held', flush=True); sys.stdin.read()"
ROOT = Path(__file__).parents[2]


class Holder:
    """A process that holds `SIZE` bytes until it is let go."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()
        time.sleep(usage.LISTING + 4 * usage.LOOK)

    def end(self) -> None:
        self.process.communicate()


def alone(test: Callable[[], None]) -> Callable[[], None]:
    """Run a test in a process of its own, which has no other children."""

    def run() -> None:
        code = f"import {__name__} as tests; tests.{test.__name__}.__wrapped__()"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    return wraps(test)(run)


def grown(meter: Meter, before: int) -> int:
    return meter.usage.peak - before


@alone
def test_processes_at_one_time_are_added_and_one_after_another_are_not() -> None:
    with measured() as meter:
        before = meter.usage.peak
        for _ in range(2):
            Holder().end()
        assert SIZE <= grown(meter, before) < SIZE + SLACK
        pair = [Holder(), Holder()]
        assert 2 * SIZE <= grown(meter, before) < 2 * SIZE + 2 * SLACK
        for holder in pair:
            assert meter.saw(holder.process.pid)
            holder.end()
        parts = meter.usage.parts()
        assert 2 * SIZE <= parts["workers"] < 2 * SIZE + 2 * SLACK
        assert sum(parts.values()) == meter.usage.peak


@alone
def test_what_a_fork_has_in_common_is_counted_once() -> None:
    held = np.ones(SIZE, np.uint8)
    with measured() as meter:
        before = meter.usage.peak
        child = os.fork()
        if not child:
            time.sleep(1.5)
            os._exit(0)
        time.sleep(1.2)
        assert meter.saw(child)
        assert grown(meter, before) < SLACK
        os.waitpid(child, 0)
        extra = np.ones(SIZE // 2, np.uint8)  # what was shared is this process's own again
        time.sleep(usage.LISTING + 4 * usage.LOOK)
        assert len(extra) <= grown(meter, before) < len(extra) + SLACK
    assert held.all()


@alone
def test_shared_memory_is_counted_once() -> None:
    code = (
        "import sys; from multiprocessing.shared_memory import SharedMemory as M; m = M(sys.argv[1], track=False)"
        if sys.version_info >= (3, 13)
        else "import sys; from multiprocessing import resource_tracker as t; t.register = lambda *a: None; "
        "from multiprocessing.shared_memory import SharedMemory as M; m = M(sys.argv[1])"
    )
    code += "; s = sum(m.buf[::4096]); print(s, flush=True); sys.stdin.read()"
    memory = SharedMemory(create=True, size=SIZE)
    try:
        with measured() as meter:
            before = meter.usage.peak
            np.ndarray(SIZE, np.uint8, memory.buf)[:] = 1
            process = subprocess.Popen(
                [sys.executable, "-c", code, memory.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(2.0)
            process.communicate()
            assert SIZE <= grown(meter, before) < SIZE + SLACK
    finally:
        memory.close()
        memory.unlink()


@alone
def test_pages_of_a_mapped_file_are_not_counted() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(SIZE)
        pages = np.memmap(file.name, np.uint8, "r")
        with measured() as meter:
            before = meter.usage.peak
            assert not pages.any()
            assert grown(meter, before) < SLACK


@alone
def test_what_rises_and_falls_between_two_looks_is_seen() -> None:
    usage.LOOK = 30.0  # none but those that are asked for
    with measured() as meter:
        before = meter.usage.peak
        held = np.ones(SIZE, np.uint8)
        assert held.all()
        del held
        assert SIZE - MiB <= grown(meter, before) < SIZE + SLACK


class Heavy:
    def __init__(self) -> None:
        self.held = np.ones(SIZE, np.uint8)

    def pid(self) -> int:
        return os.getpid()


def test_rays_own_processes_count_and_so_do_its_workers(ray_cluster: str) -> None:
    import ray

    with measured() as meter:
        ray.init(address=ray_cluster, log_to_driver=False, logging_level="ERROR")
        try:
            heavy = ray.remote(Heavy).remote()
            pid = ray.get(heavy.pid.remote())
            time.sleep(usage.LISTING + 4 * usage.LOOK)
            assert meter.saw(pid)
        finally:
            ray.shutdown()
        parts = meter.usage.parts()
    assert parts["workers"] >= SIZE
    assert parts["ray"] > 50 * MiB
    assert parts["libraries"] > 10 * MiB


def test_workers_of_other_machines_are_added_and_those_seen_are_not() -> None:
    with measured() as meter:
        own = meter.usage.peak
        here = os.uname().nodename
        assert total_peak(meter, [(here, os.getpid(), 1 << 40)]) < 1 << 40
        assert total_peak(meter, [("other", os.getpid(), SIZE), ("more", 1, SIZE)]) >= own + 2 * SIZE


@alone
def test_without_proc_it_is_resident_memory() -> None:
    usage.PROC = Path("/nowhere")
    with measured() as meter:
        before = meter.usage
        holder = Holder()
        found = meter.usage
        holder.end()
    assert before.main > 10 * MiB
    assert found.peak >= before.peak + SIZE
    assert found.processes == before.processes + 1


def test_every_stage_tells_it_as_json_and_to_people(tmp_path: Path) -> None:
    code = f"""
import subprocess, sys, tinyonn.command as command
from tinyonn.show.sheet import pairs
class Report:
    def figures(self): return {{}}
    def table(self): return pairs("done", {{"answer": "42"}})
def body(location, config):
    child = subprocess.Popen([sys.executable, "-c", {HOLD!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    import time; time.sleep(0.8)
    child.communicate()
    return Report()
command.run_stage("score", {str(tmp_path / "run")!r}, None, sys.argv[1] == "json", body)
"""
    said = {}
    for way in ("json", "table"):
        process = subprocess.run([sys.executable, "-c", code, way], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        said[way] = process.stdout
    figures = json.loads(said["json"])
    assert SIZE < figures["peak_rss_bytes"] == sum(figures["peak_parts_bytes"].values())
    assert "memory held at most, all processes together" in said["table"]
