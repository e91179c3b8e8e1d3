"""Ray: connect to a cluster or start a local one, and what it offers."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import ray

from tinyonn import endings
from tinyonn.config import Config
from tinyonn.errors import InputError
from tinyonn.machine import free_ram
from tinyonn.plan.cost import Device
from tinyonn.workers.alive import Watch, let_go, patiently, starting
from tinyonn.workers.session import private_session

LOG = logging.getLogger(__name__)
CONNECT_SECONDS = 10.0
RAY_SHARE = 0.7  # of a machine's free RAM that Ray counts as memory
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def cluster_address(address: str | None) -> str | None:
    """The cluster to use: as given, else ``RAY_ADDRESS`` (set inside a Ray job); None means a local Ray."""
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    return None if target == "local" else target


def is_connected() -> bool:
    """Whether this process is connected to a Ray already."""
    return bool(ray.is_initialized())


@contextmanager
def connected(
    address: str | None, cpus: int, held: Callable[[], str] = lambda: "what was committed stays"
) -> Iterator[None]:
    """Connect to Ray for the duration of a run.

    Parameters
    ----------
    address : str or None
        ``auto`` or ``host:port`` of a cluster; None starts a local Ray with `cpus` logical CPUs. Where this process
        is connected already, that cluster is used.
    cpus : int
    held : callable
        Says in words what is committed, for the error when Ray is lost.

    Raises
    ------
    InputError
        The cluster does not answer or refuses the token.
    EngineLostError
        Ray has ended, or does not answer any more.
    """
    if is_connected():
        with Watch(ray.get_runtime_context().gcs_address, held):
            yield
        return
    others = psutil.Process().children(recursive=True)
    with ExitStack() as stack:
        if address is None:
            session = stack.enter_context(private_session())
            with starting(held):
                _start_local(cpus, session)
        else:
            try:
                _check_reachable(address)
                ray.init(address=address, **QUIET)
            except Exception as error:  # ConnectionError, RuntimeError or Ray's own, depending on what fails
                raise InputError(
                    f"no Ray cluster answers at {address} ({first_line(error)}); start one as in docs/cluster.md, "
                    "give every machine the same token, or leave the address out to use this machine alone"
                ) from None
        endings.keep_signals()
        watch = Watch(address, held, others)
        stack.callback(watch.sweep)
        stack.callback(lambda: let_go(hurry=watch.lost is not None))
        with watch:
            yield


def _start_local(cpus: int, session: dict[str, Any]) -> None:
    """A Ray of this process alone; once more if it does not start, since another program may take its port."""
    options = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 256 << 20, **session}
    for last in (False, True):
        try:
            ray.init(address="local", **QUIET, **options)
            return
        except Exception as error:  # RuntimeError or Ray's own, depending on what fails
            LOG.debug("the local Ray did not start", exc_info=True)
            ray.shutdown()
            if last:
                raise InputError(
                    f"the local Ray did not start ({first_line(error)}); the run's logs say more; "
                    "end left-over ray processes (`ray stop`), or run the command again"
                ) from None


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def capacity(device: str, threads: int) -> int:
    """How many workers the cluster can hold now: one per GPU, or one per CPU share."""
    resources = patiently(ray.cluster_resources)
    return int(resources.get("GPU", 0)) if device == "cuda" else int(resources.get("CPU", 0) // threads)


def cluster_ram() -> int:
    """Free RAM of all machines; Ray counts `RAY_SHARE` of what was free on each when it joined."""
    nodes = [resources.get("memory", 0.0) for resources in machines()]
    return free_ram() if len(nodes) == 1 else int(sum(nodes) / RAY_SHARE)


def machines() -> list[dict[str, float]]:
    """What each machine of the cluster has, by the names that Ray gives it."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def cluster_device(config: Config) -> Device:
    """``cuda`` if GPUs are wanted and the cluster has some, else ``cpu``.

    Raises
    ------
    InputError
        A GPU is asked for and no machine of the cluster has one.
    """
    gpus = int(patiently(ray.cluster_resources).get("GPU", 0))
    if config.model.device == "cuda" and gpus == 0:
        raise InputError("model.device = 'cuda' but no machine of the Ray cluster has a GPU; use cpu or auto")
    return "cuda" if gpus and config.model.device != "cpu" else "cpu"


def first_line(error: BaseException) -> str:
    """Of what an error says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
