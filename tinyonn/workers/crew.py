"""A crew: actors on Ray that all do the same, whatever it is, by pull; lost ones are replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from tinyonn.errors import CapacityError, EngineLostError, TinyONNError, first_line
from tinyonn.machine import Device, worker_environment
from tinyonn.workers.alive import LOOK, Waiting, check
from tinyonn.workers.facts import WorkerFacts

LOG = logging.getLogger(__name__)
MAX_LOSSES = 3  # times the whole crew may die without a segment committed in between
# `use` is answered while the worker works; all else is done in one thread, always the same: kernels that are kept by
# thread, and heaps of threads, would else be there twice (280 MiB for a model of 135 million weights).
LOOKING = "looking"
THREADS: dict[str, Any] = {"max_concurrency": 1, "concurrency_groups": {LOOKING: 1}}
LOST = (RayActorError, ObjectLostError)  # a worker is gone, or its machine with the result

Work = TypeVar("Work")


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
        **_resources(device, threads),
        **THREADS,
        "runtime_env": {"env_vars": worker_environment(threads)},
    }
    return ray.remote(**options)(kind).remote(*arguments)


def run_tasks(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], device: Device, threads: int
) -> None:
    """Call a function with each of the arguments in tasks of the connected Ray, and wait for all.

    Raises
    ------
    TinyONNError
        As raised in a task.
    EngineLostError
        Ray is gone.
    """
    environment = {"env_vars": worker_environment(threads)}
    task = ray.remote(function).options(**_resources(device, threads), runtime_env=environment)
    for reference in [task.remote(*arguments) for arguments in calls]:
        outcome(reference)


def share(value: Any) -> Any:
    """What many calls are given, sent once."""
    return ray.put(value)


def use_of(worker: Any) -> Any:
    """Reference of `Worker.use`, which is answered while the worker works."""
    return worker.use.options(concurrency_group=LOOKING).remote()


@dataclass(frozen=True)
class Answer(Generic[Work]):
    """A call that has ended.

    Attributes
    ----------
    worker : int
    work : object or None
        As given to `Crew.send`; None where the worker has loaded, or was lost before it had.
    result : object
    lost : Exception or None
        The worker is gone, and the call with it.
    """

    worker: int
    work: Work | None
    result: Any = None
    lost: BaseException | None = None


class Crew(Generic[Work]):
    """Workers of one kind: starts them, replaces the lost ones, adds some when machines join.

    Parameters
    ----------
    start : callable
        Starts one as an actor, see `start_actor`; it has ``load``, which returns `WorkerFacts`, and ``use``.
    device : str
        ``cuda`` or ``cpu``.
    threads : int
        CPU threads of a worker.
    say : callable
        Takes a line for the user.
    held : callable
        Says in words what is done and stays.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        device: Device,
        threads: int,
        say: Callable[[str], None],
        held: Callable[[], str],
    ) -> None:
        self.device, self.threads = device, threads
        self.workers: dict[int, Any] = {}  # actor by number
        self.facts: dict[int, WorkerFacts] = {}  # of those that have loaded
        self.idle: list[int] = []
        self._start = start
        self._calls: dict[Any, tuple[int, Work]] = {}  # by the reference of the call under way
        self._loading: dict[Any, int] = {}  # worker by the reference of its loading
        self._hellos: dict[Any, int] = {}  # worker by the reference of its first answer
        self._up: set[int] = set()  # workers whose process runs
        self._wanted, self._next, self._losses = 1, 0, 0
        self._waiting = Waiting(say, held)

    def hire(self, count: int) -> None:
        """Start workers until there are `count`, and have them load."""
        self._wanted = count
        while len(self.workers) < count:
            worker = self.workers[self._next] = self._start()
            self._hellos[use_of(worker)] = self._next
            self._loading[worker.load.remote()] = self._next
            self._next += 1

    def send(self, number: int, work: Work, method: str, *arguments: Any) -> None:
        """Have a worker do something."""
        self._calls[getattr(self.workers[number], method).remote(*arguments)] = number, work

    def under_way(self) -> list[tuple[int, Work]]:
        """What is being done, with the number of its worker, the oldest first."""
        return list(self._calls.values())

    def wait(self, timeout: float) -> list[Answer[Work]]:
        """Finished calls, one at most, if there is one in so many seconds. Who has loaded is idle.

        Raises
        ------
        TinyONNError
            As raised in the worker.
        CapacityError
            No worker could be had for long.
        EngineLostError
            Ray is gone.
        """
        check()
        ready, _ = ray.wait([*self._calls, *self._loading], num_returns=1, timeout=timeout)
        self._waiting.see(self._any_up())
        return [self._answer(reference) for reference in ready]

    def lose(self, number: int, error: BaseException) -> None:
        """Forget a worker that died.

        Raises
        ------
        CapacityError
            Too many in a row died before anything was committed. A machine that dies takes several with it, so the
            limit grows with the crew.
        """
        LOG.warning("worker %d is lost and will be replaced; what it had in hand is done again", number)
        worker = self.workers.pop(number)
        with suppress(Exception):  # Ray itself may be gone, and is looked after elsewhere
            ray.kill(worker)
        self.facts.pop(number, None)
        self.idle = [other for other in self.idle if other != number]
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
        self._calls.clear()

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

    def _any_up(self) -> bool:
        """Whether the process of some worker runs, be it that it still loads."""
        answered, _ = (
            ray.wait(list(self._hellos), num_returns=len(self._hellos), timeout=0)
            if self._hellos
            else ([], [])
        )
        self._up.update(self._hellos.pop(reference) for reference in answered)
        return any(number in self._up for number in self.workers)

    def _answer(self, reference: Any) -> Answer[Work]:
        work: Work | None = None
        if reference in self._loading:
            number = self._loading.pop(reference)
        else:
            number, work = self._calls.pop(reference)
        try:
            result = outcome(reference)
        except LOST as error:
            return Answer(number, work, lost=error)
        if work is None:
            self._loaded(number, result)
        return Answer(number, work, result)

    def _loaded(self, number: int, facts: WorkerFacts) -> None:
        self.facts[number] = facts
        self.idle.append(number)
        LOG.info("worker %d: %s on %s (process %d)", number, facts.device, facts.host, facts.pid)


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


def _resources(device: Device, threads: int) -> dict[str, int]:
    on_gpu = device == "cuda"
    return {"num_cpus": 1 if on_gpu else threads, "num_gpus": int(on_gpu)}
