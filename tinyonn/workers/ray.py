"""Ray: connect to a cluster or start a local one, and keep recorders running on whatever it offers."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from tinyonn import endings
from tinyonn.config import Config
from tinyonn.errors import CapacityError, EngineLostError, InputError, TinyONNError
from tinyonn.plan.cost import Device
from tinyonn.record.worker import Worker, WorkerFacts
from tinyonn.runtime import worker_environment
from tinyonn.store.manifest import Segment
from tinyonn.workers.alive import LOOK, Watch, check, let_go, patiently, starting
from tinyonn.workers.session import private_session

LOG = logging.getLogger(__name__)
MAX_LOSSES = 3  # times the whole crew may die without a segment committed in between
CONNECT_SECONDS = 10.0
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
# `use` is answered while the worker works; all else is done in one thread, always the same: kernels that are kept by
# thread, and heaps of threads, would else be there twice (280 MiB for a model of 135 million weights).
LOOKING = "looking"
THREADS: dict[str, Any] = {"max_concurrency": 1, "concurrency_groups": {LOOKING: 1}}
LOST = (RayActorError, ObjectLostError)  # a worker is gone, or its machine with the result


def cluster_address(address: str | None) -> str | None:
    """The cluster to use: as given, else ``RAY_ADDRESS`` (set inside a Ray job); None means a local Ray."""
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    return None if target == "local" else target


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
    if ray.is_initialized():
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
                    f"no Ray cluster answers at {address} ({_first_line(error)}); start one as in docs/cluster.md, "
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
                    f"the local Ray did not start ({_first_line(error)}); the run's logs say more; "
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


def use_of(worker: Any) -> Any:
    """Reference of `Worker.use`, which is answered while the worker works."""
    return worker.use.options(concurrency_group=LOOKING).remote()


@dataclass
class Crew:
    """The workers of a run: starts them, replaces the lost ones, adds some when machines join.

    Parameters
    ----------
    config : Config
    device : str
        ``cuda`` or ``cpu``.
    """

    config: Config
    device: Device
    workers: dict[int, Any] = field(default_factory=dict)  # actor by number
    facts: dict[int, WorkerFacts] = field(default_factory=dict)
    _hellos: dict[Any, int] = field(default_factory=dict)  # worker by the reference of its first answer
    _up: set[int] = field(default_factory=set)  # workers whose process runs
    _wanted: int = 1
    _next: int = 0
    _losses: int = 0

    def hire(self, count: int) -> list[int]:
        """Start workers until there are `count`; returns the numbers of the new ones."""
        new = []
        self._wanted = count
        while len(self.workers) < count:
            worker = self.workers[self._next] = self._start()
            self._hellos[use_of(worker)] = self._next
            new.append(self._next)
            self._next += 1
        return new

    def _start(self) -> Any:
        record = self.config.record
        threads = record.threads
        options: dict[str, Any] = {
            "num_cpus": record.threads if self.device == "cpu" else 1,
            "num_gpus": 1 if self.device == "cuda" else 0,
            **THREADS,
            "runtime_env": {"env_vars": worker_environment(threads)},
        }
        model = self.config.model.model_copy(update={"device": self.device})
        return ray.remote(**options)(Worker).remote(model, record.threads, record.seed)

    def any_up(self) -> bool:
        """Whether the process of some worker runs, be it that it still loads."""
        answered, _ = (
            ray.wait(list(self._hellos), num_returns=len(self._hellos), timeout=0)
            if self._hellos
            else ([], [])
        )
        self._up.update(self._hellos.pop(reference) for reference in answered)
        return any(number in self._up for number in self.workers)

    def lose(self, number: int, error: BaseException) -> None:
        """Forget a worker that died.

        Raises
        ------
        CapacityError
            Too many in a row died before anything was committed. A machine that dies takes several with it, so the
            limit grows with the crew.
        """
        worker = self.workers.pop(number)
        with suppress(Exception):  # Ray itself may be gone, and is looked after elsewhere
            ray.kill(worker)
        self.facts.pop(number, None)
        self._losses += 1
        limit = MAX_LOSSES * max(1, self._wanted)
        if self._losses >= limit:
            raise CapacityError(
                f"{self._losses} workers died in a row without finishing a segment, {limit} may "
                f"({_first_line(error)}); most often the machine is out of memory: see `tinyonn plan`, use fewer "
                "record.workers or a smaller data.max_tokens"
            )

    def dismiss(self) -> None:
        """Stop all workers; a cluster that others use too has their places back at once."""
        with suppress(EngineLostError):  # of a Ray that is gone nothing is asked
            check()
            for worker in self.workers.values():
                with suppress(Exception):
                    ray.kill(worker)
        self.workers.clear()
        self.facts.clear()

    def succeeded(self) -> None:
        """A segment was committed: losses are not in a row any more."""
        self._losses = 0

    def call(self, number: int, method: str, *args: Any) -> Any:
        """Wait for one call; an error of ours inside the worker comes out as itself."""
        return outcome(getattr(self.workers[number], method).remote(*args))

    def use(self, timeout: float = 2.0) -> dict[int, Any]:
        """`Worker.use` of those that answer in time."""
        asked = {use_of(worker): number for number, worker in self.workers.items() if number in self.facts}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout) if asked else ([], [])
        result = {}
        for reference in done:
            try:
                result[asked[reference]] = ray.get(reference)
            except LOST:  # noticed and mended by whoever waits for its segment
                continue
        return result


def outcome(reference: Any) -> Any:
    """Result of a finished call.

    Raises
    ------
    TinyONNError
        As raised in the worker.
    one of LOST
        The worker or its machine is gone.
    EngineLostError
        Ray is gone.
    """
    while not ray.wait([reference], timeout=LOOK)[0]:
        check()
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, TinyONNError):
            raise cause from None
        raise


@dataclass
class Task:
    """A segment on its way: recorded and written window by window."""

    segment: Segment
    worker: int
    window: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    writing: bool = False
    fork: Any = None
    begun: int | None = None  # samples that its worker had recorded before this window, once that is known
    seen: int = 0  # of this window's samples, as last looked at
    started: float = field(default_factory=time.monotonic)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
