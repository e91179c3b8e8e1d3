"""Workers on a real Ray: however many there are and whichever die, the bytes are those of one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from tests.profile.runs import World, contents
from tinyonn.errors import CapacityError, InputError
from tinyonn.profile.profile import ProfileReport
from tinyonn.profile.stage import ProfileOptions, profile_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def wanted(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The profile, measured in this process."""
    assert not ray.is_initialized()
    run = world.copy(tmp_path_factory.mktemp("alone") / "run")
    assert profile_run(str(run), world.config).workers == 1
    return contents(run / "profile")


@pytest.fixture
def address(ray_cluster: str, wanted: dict[str, bytes]) -> Iterator[str]:
    """Of a cluster that this process is connected to."""
    ray.init(address=ray_cluster, log_to_driver=False, logging_level="ERROR")
    yield ray_cluster
    ray.shutdown()


def profile(run: Path, world: World, workers: int, address: str) -> ProfileReport:
    return profile_run(str(run), world.config, ProfileOptions(workers=workers), address=address)


def actors() -> list[psutil.Process]:
    """Living processes of profiling actors below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            named = "ray::ProfileWorker" in " ".join([process.name(), *process.cmdline()])
            if named and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until_gone() -> None:
    deadline = time.monotonic() + 60
    while left := actors():
        assert time.monotonic() < deadline, f"actors outlived their profile: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [*(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2)), 3])
def test_any_number_of_workers_writes_the_same_bytes(
    world: World, wanted: dict[str, bytes], address: str, tmp_path: Path, workers: int
) -> None:
    run = world.copy(tmp_path / "run")
    report = profile(run, world, workers, address)
    assert contents(run / "profile") == wanted
    assert 1 <= report.workers <= workers and report.seconds_measuring > 0
    wait_until_gone()


def test_a_worker_that_dies_costs_the_part_that_it_had_in_hand(
    world: World, wanted: dict[str, bytes], address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = world.copy(tmp_path / "run")
    killed: list[int] = []

    def kill_the_first() -> None:
        while not killed:
            for process in actors():
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=kill_the_first)
    thread.start()
    profile(run, world, 2, address)
    thread.join()
    assert killed and "is lost and will be replaced" in caplog.text
    assert contents(run / "profile") == wanted


def test_errors_of_workers_come_out_as_they_are(world: World, address: str, tmp_path: Path) -> None:
    run = world.copy(tmp_path / "run")
    for shard in (run / "experts").glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(InputError, match="cannot be read on"):
        profile(run, world, 1, address)
    wait_until_gone()


def test_more_workers_than_fit_are_refused(world: World, address: str, tmp_path: Path) -> None:
    run = world.copy(tmp_path / "run")
    options = ProfileOptions(workers=3, memory=3 << 30)
    with pytest.raises(CapacityError, match=r"of the workers.*use fewer workers"):
        profile_run(str(run), world.config, options, address=address)
