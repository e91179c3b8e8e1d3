"""Where a stage's Dask tasks run: threads of this process, a Dask cluster, or Ray.

A stage hands over plain functions with their arguments and gets the results in the same order. What a task returns is
small: a fork of the store, counts. The bits of a result do not depend on the engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from dask import compute, delayed  # type: ignore[attr-defined]

from tinyonn.errors import CapacityError, EngineLostError, InputError
from tinyonn.files import scratch_folder
from tinyonn.machine import free_ram, freed_memory_kept, usable_cpus
from tinyonn.show.progress import Bar
from tinyonn.show.sizes import MiB, format_size

LOG = logging.getLogger(__name__)

Kind = Literal["threads", "distributed", "ray"]
KINDS: tuple[Kind, ...] = ("threads", "distributed", "ray")
WORKERS_PER_CPU = 2  # threads: while one waits for the disk, another computes
PROCESS_BYTES = 450 * MiB  # Python with the store, Numba's kernels and Dask, before any data

DASHBOARD = "TINYONN_DASHBOARD"  # in the environment: where a local Dask cluster shows its pages
LOOPBACK = "127.0.0.1"

Call = tuple[Callable[..., Any], tuple[Any, ...]]
Compute = Callable[[Sequence[Call]], list[Any]]


@dataclass(frozen=True)
class Fit:
    """Tasks at a time, and the bytes of RAM that all processes of the stage hold then at the most."""

    workers: int
    bytes: int


@dataclass(frozen=True)
class EngineOptions:
    """How a stage runs; none of it changes the result.

    Attributes
    ----------
    kind : str
        ``threads``, ``distributed`` or ``ray``.
    workers : int or None
        Tasks at a time; None: one per CPU, of threads two.
    memory : int or None
        Bytes that the whole may use; None: what is free.
    address : str or None
        Of a Dask scheduler or of a Ray cluster; None starts a local one.
    """

    kind: Kind = "threads"
    workers: int | None = None
    memory: int | None = None
    address: str | None = None

    def fit(self, tasks: Sequence[int], what: str, own: int = PROCESS_BYTES) -> Fit:
        """How many tasks may run at a time, and what they and this process hold together then.

        Parameters
        ----------
        tasks : sequence of int
            Bytes of each while it runs, beside its process. The largest may meet: they count.
        what : str
            Named in the error and in the log.
        own : int
            Bytes of this process beside them.

        Raises
        ------
        CapacityError
            Not even the largest task fits.
        """
        limit = free_ram() if self.memory is None else self.memory
        in_process = self.kind == "threads"
        wanted = self.workers or (WORKERS_PER_CPU if in_process else 1) * usable_cpus()
        each = sorted((size if in_process else size + PROCESS_BYTES for size in tasks), reverse=True)
        total = own + (each[0] if each else 0)
        if total > limit:
            source = "--memory" if self.memory is not None else "free RAM"
            raise CapacityError(
                f"{what} needs {format_size(total)} ({format_size(own)} of its own, {format_size(total - own)} for one "
                f"task), which does not fit in {format_size(limit)} of {source}; give it that much"
            )
        workers = 1
        for size in each[1:wanted]:
            if total + size > limit:
                break
            total, workers = total + size, workers + 1
        LOG.info("%s needs %s of RAM at most, %d task(s) at a time", what, format_size(total), workers)
        return Fit(workers, total)


THREADS = EngineOptions()


@dataclass(frozen=True)
class Watch:
    """A bar, and what each call that has ended adds to it."""

    bar: Bar
    cost: Callable[[Call], float]


@contextmanager
def computing(options: EngineOptions, workers: int, watch: Watch | None = None) -> Iterator[Compute]:
    """A function that carries out calls with the chosen engine.

    Parameters
    ----------
    options : EngineOptions
    workers : int
    watch : Watch, optional
        Is told of each call that ends; on Ray only of those that end together.

    Raises
    ------
    InputError
        Unknown engine, or the cluster does not answer.
    """
    if options.kind not in KINDS:
        raise InputError(f"--engine {options.kind!r} is unknown; choose {', '.join(KINDS)}")
    if options.kind == "distributed":
        with _distributed(options, workers, watch) as compute:
            yield compute
    elif options.kind == "ray":
        with _ray(options, workers, watch) as compute:
            yield compute
    else:
        with freed_memory_kept():
            yield lambda calls: _compute(calls, watch, scheduler="threads", num_workers=workers)


def _compute(calls: Sequence[Call], watch: Watch | None, **how: Any) -> list[Any]:
    from dask.callbacks import Callback

    tasks = [delayed(function, pure=False)(*arguments) for function, arguments in calls]
    costs = (
        {} if watch is None else dict(zip((task.key for task in tasks), map(watch.cost, calls), strict=True))
    )

    def ended(key: Any, *_: Any) -> None:
        if watch is not None and key in costs:
            watch.bar.add(costs[key])

    with Callback(posttask=ended):
        return list(compute(*tasks, **how))


@contextmanager
def _distributed(options: EngineOptions, workers: int, watch: Watch | None) -> Iterator[Compute]:
    from distributed import KilledWorker, as_completed

    with _dask_client(options, workers) as client:

        def run(calls: Sequence[Call]) -> list[Any]:
            futures = [client.submit(function, *arguments, pure=False) for function, arguments in calls]
            if watch is not None:
                costs = dict(zip(futures, map(watch.cost, calls), strict=True))
                for future in as_completed(futures):
                    watch.bar.add(costs[future])
            try:
                return list(client.gather(futures))
            except KilledWorker as error:
                raise CapacityError(
                    f"a task's workers died {error.allowed_failures + 1} times; most often memory is short: "
                    "use fewer --workers or less --memory; what was committed stays"
                ) from None

        yield run


@contextmanager
def _dask_client(options: EngineOptions, workers: int) -> Iterator[Any]:
    """Of the scheduler at the address, with the certificates of Dask's own configuration; else of a local cluster."""
    from distributed import Client

    with ExitStack() as stack:
        local = None if options.address is not None else stack.enter_context(_local_cluster(workers))
        try:
            security = {} if local is None else {"security": local.security}
            client = Client(local or options.address, timeout=20, **security)
        except (OSError, TimeoutError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(
                f"no Dask scheduler answers at {options.address or 'this machine'} ({error}); start one as in "
                "docs/security.md, or leave --address out"
            ) from None
        stack.callback(client.close)
        if options.address is not None or DASHBOARD in os.environ:
            LOG.info("dashboard: %s", client.dashboard_link)
        yield client


@contextmanager
def _local_cluster(workers: int) -> Iterator[Any]:
    """Processes on the loopback address that speak only to who has this cluster's key, which no file holds.

    Whoever may speak to a Dask scheduler runs code as its user. Its pages, which need no key, are off unless asked for.
    """
    import dask.config
    from distributed import LocalCluster
    from distributed.security import Security

    dashboard = os.environ.get(DASHBOARD)
    roles = () if dashboard else ("scheduler", "worker")
    settings: dict[str, Any] = {f"distributed.{role}.http.routes": [] for role in roles}
    with ExitStack() as stack:
        # Of every role, not of the workers alone: Dask looks for modules in these folders.
        settings["temporary-directory"] = folder = str(stack.enter_context(scratch_folder()))
        stack.enter_context(dask.config.set(settings))
        try:
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=0,
                host=LOOPBACK,
                protocol="tls://",
                security=Security.temporary(),
                local_directory=folder,
                dashboard_address=dashboard or f"{LOOPBACK}:0",
                scheduler_kwargs={"dashboard": bool(dashboard)},
            )
        except (RuntimeError, OSError, TimeoutError) as error:
            raise EngineLostError(
                f"the local Dask cluster did not start ({error}): a process of its own ended; what was committed stays "
                "and the same command goes on from there; most often memory is short: use fewer --workers"
            ) from None
        stack.callback(cluster.close)
        yield cluster


@contextmanager
def _ray(options: EngineOptions, workers: int, watch: Watch | None) -> Iterator[Compute]:
    from tinyonn.workers.alive import patiently
    from tinyonn.workers.ray import cluster_address, connected

    with connected(cluster_address(options.address), workers):
        from ray.util.dask import ray_dask_get

        yield lambda calls: list(patiently(lambda: _compute(calls, watch, scheduler=ray_dask_get)))
