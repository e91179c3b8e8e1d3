"""Ray: connect to a cluster or start a local one, for its user alone, and what it offers: who may work where."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import ray

from tinyonn import endings
from tinyonn.config import Config
from tinyonn.dense.load import choose_device
from tinyonn.errors import InputError, first_line
from tinyonn.files import scratch_folder
from tinyonn.machine import Device, free_ram, gpus, usable_cpus
from tinyonn.workers.alive import Watch, let_go, patiently, starting

LOG = logging.getLogger(__name__)
CONNECT_SECONDS = 10.0
RAY_SHARE = 0.7  # of a machine's free RAM that Ray counts as memory
FOLDER = "r"  # in the private folder: what Ray opens to everybody; short, since sockets lie below
SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # no cluster: this node's address is 127.0.0.1, and all bind to that
    "RAY_enable_metrics_collection": "0",
    # Of two more places for Prometheus, no ports: they fail to open, Ray writes that into its log and goes on.
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # of the groups that train
LOOPBACK = "lo"
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


@dataclass(frozen=True)
class Places:
    """Who trains where.

    Attributes
    ----------
    address : str or None
        Of the cluster; None is this machine.
    device : str
    workers, threads : int
        Of the group; CPU threads of each.
    sharing : int
        Workers that share the memory: of a GPU one.
    memory : int or None
        Free bytes of the smallest GPU, or of the machine with least RAM; None is not known.
    """

    address: str | None
    device: Device
    workers: int
    threads: int
    sharing: int
    memory: int | None


def alone(device: Device, threads: int) -> Places:
    """One worker in this process."""
    return Places(None, device, 1, threads, 1, _vram() if device == "cuda" else free_ram())


def places_of(
    address: str | None, device: Device, workers: int | None, threads: int | None, most: int
) -> Places:
    """On the Ray that is connected.

    Parameters
    ----------
    address : str or None
    device : str
    workers : int or None
        None is one for each GPU, or one for each machine without.
    threads : int or None
        None is a GPU worker's one, or a machine's CPUs dealt to its workers.
    most : int
        Workers that there is work for: samples of a step.

    Raises
    ------
    InputError
        More workers than that.
    """
    nodes = machines()
    if workers is not None and workers > most:
        raise InputError(
            f"{workers} workers are asked for and there is work for {most}; use fewer, or a larger batch"
        )
    if device == "cuda":
        found = sum(int(node.get("GPU", 0)) for node in nodes)
        memory = _vram() if len(nodes) == 1 else None
        return Places(address, device, workers or max(1, min(found, most)), threads or 1, 1, memory)
    count = workers or max(1, min(len(nodes), most))
    sharing = ceil(count / len(nodes))
    cpus = min(int(node.get("CPU", 1)) for node in nodes)
    memory = free_ram() if len(nodes) == 1 else _least_ram(nodes)
    return Places(address, device, count, threads or max(1, cpus // sharing), sharing, memory)


def take_places(
    address: str | None,
    workers: int | None,
    threads: int | None,
    config: Config,
    stack: ExitStack,
    most: int,
    held: Callable[[], str],
) -> Places:
    """Where a training runs, at most so many workers; Ray, if it is needed, stays connected while the stack is open.

    Parameters
    ----------
    address, workers, threads, most
        As of `cluster_address` and `places_of`.
    config : Config
    stack : ExitStack
    held : callable
        Says in words what is committed, for the error when Ray is lost.

    Raises
    ------
    InputError
        Numbers below 1, no such cluster or device, or more workers than there is work for.
    """
    address = cluster_address(address)
    if workers is not None and workers < 1:
        raise InputError(f"train.workers = {workers}; give at least 1")
    if threads is not None and threads < 1:
        raise InputError(f"train.threads = {threads}; give at least 1")
    if address is None and (workers or 1) == 1:
        device = choose_device(config.model.device)
        return alone("cuda" if device.type == "cuda" else "cpu", threads or usable_cpus())
    each = threads or max(1, usable_cpus() // (workers or 1))
    stack.enter_context(connected(address, max(usable_cpus(), each * (workers or 1)), held))
    return places_of(address, cluster_device(config), workers, threads, most)


def _vram() -> int | None:
    return min((gpu.free for gpu in gpus()), default=None)


def _least_ram(nodes: list[dict[str, Any]]) -> int:
    return int(min(node.get("memory", 0.0) for node in nodes) / RAY_SHARE)


@contextmanager
def private_session() -> Iterator[dict[str, Any]]:
    """The environment of a Ray of this machine alone; gives what `ray.init` must be given besides.

    Ray opens the folders of its sessions to everybody (0777) and listens on every address. Its folders are therefore
    put below a private one, and the settings by which it stays on 127.0.0.1 on Windows are used here too. What it
    offers for Prometheus answers without a token and is switched off. docs/security.md says what is left, as measured.

    Raises
    ------
    InputError
        There is no place for its folder.
    """
    import ray._private.ray_constants as constants

    if not _has_token():  # for this Ray alone, so that none is left in the user's home
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    chosen = SETTINGS | {name: LOOPBACK for name in INTERFACES if name not in os.environ}
    before = constants.ENABLE_RAY_CLUSTER
    with scratch_folder() as folder, _environment(chosen):
        constants.ENABLE_RAY_CLUSTER = False
        try:
            yield {"_temp_dir": str(folder / FOLDER)}
        finally:
            constants.ENABLE_RAY_CLUSTER = before


def _has_token() -> bool:
    """Whether the user has a token, which Ray's client reads once and then sends to every Ray of this process."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return bool(path.read_text("utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def _environment(chosen: Mapping[str, str]) -> Iterator[None]:
    """Set variables, and put back what was there."""
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
