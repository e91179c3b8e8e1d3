"""Actors on a real Ray: which thread does what, and what a crew says of those that are lost."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import ray

from tinyonn.errors import CapacityError
from tinyonn.workers.crew import MAX_LOSSES, THREADS, Answer, Crew, start_actor, use_of
from tinyonn.workers.facts import WorkerFacts


class Thread:
    """A worker that tells in which thread it is called."""

    def record(self, seconds: float) -> int:
        time.sleep(seconds)
        return threading.get_ident()

    def use(self) -> int:
        return threading.get_ident()


class Doubler:
    """A worker that doubles numbers."""

    def load(self) -> WorkerFacts:
        return WorkerFacts((), "cpu", platform.node(), os.getpid())

    def use(self) -> None:
        pass

    def double(self, number: int) -> int:
        return 2 * number


@pytest.fixture
def connected(ray_cluster: str) -> Iterator[None]:
    ray.init(address=ray_cluster, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def answers(crew: Crew[str]) -> list[Answer[str]]:
    """The next ones."""
    deadline = time.monotonic() + 60
    while not (found := crew.wait(1.0)):
        assert time.monotonic() < deadline
    return found


def test_who_is_lost_is_an_answer_and_another_is_hired(connected: None) -> None:
    start = partial(start_actor, Doubler, device="cpu", threads=1)
    crew: Crew[str] = Crew(start, "cpu", 1, print, lambda: "all stays")
    try:
        crew.hire(1)
        assert [(a.worker, a.work, a.lost) for a in answers(crew)] == [(0, None, None)] and crew.idle == [0]
        crew.send(crew.idle.pop(), "six", "double", 3)
        assert crew.under_way() == [(0, "six")]
        assert answers(crew) == [Answer(0, "six", 6)] and crew.under_way() == []
        os.kill(crew.facts[0].pid, signal.SIGKILL)
        crew.send(0, "eight", "double", 4)
        (lost,) = answers(crew)
        assert (lost.worker, lost.work, lost.result) == (0, "eight", None) and lost.lost is not None
        crew.lose(lost.worker, lost.lost)
        crew.hire(1)
        answers(crew)
        assert crew.idle == [1] and crew.call(1, "double", 4) == 8
        for _ in range(MAX_LOSSES - 2):
            crew.lose(crew.idle[0], lost.lost)
            crew.hire(1)
            answers(crew)
        with pytest.raises(CapacityError, match=rf"{MAX_LOSSES} workers died in a row"):
            crew.lose(crew.idle[0], lost.lost)
    finally:
        crew.dismiss()


def test_work_stays_in_one_thread_and_another_says_how_far_it_is(connected: None) -> None:
    worker = ray.remote(num_cpus=1, **THREADS)(Thread).remote()
    work = [worker.record.remote(0.05) for _ in range(8)]
    long = worker.record.remote(600.0)
    looks = ray.get([use_of(worker) for _ in range(8)], timeout=60)
    done = ray.get(work, timeout=60)
    looks += ray.get([use_of(worker) for _ in range(8)], timeout=60)
    assert len(set(done)) == 1 and not set(done) & set(looks)
    assert not ray.wait([long], timeout=0)[0]
