"""What all tests share: a home and a Ray of their own, so that nothing of the user's is read or written."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Before anything imports Ray, which reads its environment then. Short: sockets lie below, and their paths are limited.
HOME = Path(tempfile.mkdtemp(prefix="tonn-", dir="/tmp"))
TOKEN = HOME / "ray_token"
TOKEN.write_text(secrets.token_hex(32))
os.environ.update(
    HOME=str(HOME),
    RAY_TMPDIR=str(HOME),
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN_PATH=str(TOKEN),
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    HF_HUB_DISABLE_TELEMETRY="1",
)
for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):
    os.environ.pop(name, None)


# What takes longest comes first: the last of several processes is then done when the others are.
LONGEST = ("tests/benchmarks/", "tests/hardening/", "tests/train/")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each process of `pytest -n`, and for what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@cache
def part_of(file: str) -> str:
    """What `pytest -n` deals to one process: a file, whose fixtures are made once, or all files that share a Ray."""
    return "Ray" if "ray_cluster" in (ROOT / file).read_text("utf-8") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Parts(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return part_of(nodeid.split("::")[0])

    config.option.loadscopereorder = False  # which would begin with what has most tests
    return Parts(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (part_of(file_of(item)) != "Ray", not file_of(item).startswith(LONGEST)))


def file_of(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


def pytest_sessionfinish() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a Ray of four logical CPUs, started once; its processes end with this one."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 4, "include_dashboard": False, "gcs_server_port": free_ports(1)[0]}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    yield str(cluster.address)
    cluster.shutdown()


def free_ports(count: int) -> list[int]:
    """Ports below 32768, where the kernel deals none, and outside 10002-19999, which Ray deals to its workers."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports between 20000 and 32000")
