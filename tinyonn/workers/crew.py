"""A crew: actors on Ray that all do the same, whatever it is; lost ones are replaced."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from tinyonn.errors import CapacityError, EngineLostError, TinyONNError
from tinyonn.plan.cost import Device
from tinyonn.runtime import worker_environment
from tinyonn.store.manifest import Segment
from tinyonn.workers.alive import LOOK, check
from tinyonn.workers.facts import WorkerFacts
from tinyonn.workers.ray import first_line

MAX_LOSSES = 3  # times the whole crew may die without a segment committed in between
# `use` is answered while the worker works; all else is done in one thread, always the same: kernels that are kept by
# thread, and heaps of threads, would else be there twice (280 MiB for a model of 135 million weights).
LOOKING = "looking"
THREADS: dict[str, Any] = {"max_concurrency": 1, "concurrency_groups": {LOOKING: 1}}
LOST = (RayActorError, ObjectLostError)  # a worker is gone, or its machine with the result


def start_actor(kind: type, *arguments: Any, device: Device, threads: int) -> Any:
    """A worker as an actor, on a GPU or on so many CPUs.

    Parameters
    ----------
    kind : type
        Its class.
    arguments
        Of the class.
    device : str
        ``cuda`` or ``cpu``.
    threads : int
    """
    options: dict[str, Any] = {
        "num_cpus": threads if device == "cpu" else 1,
        "num_gpus": 1 if device == "cuda" else 0,
        **THREADS,
        "runtime_env": {"env_vars": worker_environment(threads)},
    }
    return ray.remote(**options)(kind).remote(*arguments)


def use_of(worker: Any) -> Any:
    """Reference of `Worker.use`, which is answered while the worker works."""
    return worker.use.options(concurrency_group=LOOKING).remote()


@dataclass
class Crew:
    """Workers of one kind: starts them, replaces the lost ones, adds some when machines join.

    Parameters
    ----------
    start : callable
        Starts one as an actor, see `start_actor`; it has ``load``, which returns `WorkerFacts`, and ``use``.
    device : str
        ``cuda`` or ``cpu``.
    threads : int
        CPU threads of a worker.
    """

    start: Callable[[], Any]
    device: Device
    threads: int
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
            worker = self.workers[self._next] = self.start()
            self._hellos[use_of(worker)] = self._next
            new.append(self._next)
            self._next += 1
        return new

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
                f"({first_line(error)}); most often the machine is out of memory: see `tinyonn plan`, use fewer "
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
