"""Actors on a real Ray: which thread does what."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from tinyonn.workers.crew import THREADS, use_of


class Thread:
    """A worker that tells in which thread it is called."""

    def record(self, seconds: float) -> int:
        time.sleep(seconds)
        return threading.get_ident()

    def use(self) -> int:
        return threading.get_ident()


@pytest.fixture
def worker(ray_cluster: str) -> Iterator[Any]:
    ray.init(address=ray_cluster, log_to_driver=False, logging_level="ERROR")
    try:
        yield ray.remote(num_cpus=1, **THREADS)(Thread).remote()
    finally:
        ray.shutdown()


def test_work_stays_in_one_thread_and_another_says_how_far_it_is(worker: Any) -> None:
    work = [worker.record.remote(0.05) for _ in range(8)]
    long = worker.record.remote(600.0)
    looks = ray.get([use_of(worker) for _ in range(8)], timeout=60)
    done = ray.get(work, timeout=60)
    looks += ray.get([use_of(worker) for _ in range(8)], timeout=60)
    assert len(set(done)) == 1 and not set(done) & set(looks)
    assert not ray.wait([long], timeout=0)[0]
