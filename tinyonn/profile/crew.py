"""Deal parts to workers: in this process, or actors on Ray; a lost worker costs the part that it had in hand."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray

from tinyonn.corpus.file import Corpus
from tinyonn.plan.cost import Device
from tinyonn.profile.manifest import Part
from tinyonn.profile.tables import PartProfile
from tinyonn.profile.worker import Job, ProfileWorker
from tinyonn.workers.alive import Waiting, check
from tinyonn.workers.crew import LOST, Crew, outcome, start_actor
from tinyonn.workers.facts import WorkerUse
from tinyonn.workers.ray import capacity

LOG = logging.getLogger(__name__)
SCALE = 10.0  # seconds between looks for machines that joined
LOOK = 1.0  # seconds between looks at what the workers have done

Done = Callable[[Part, PartProfile], None]
Seen = Callable[[Mapping[Part, int]], None]  # samples done of the parts under way


def measure_here(job: Job, corpus: Corpus, parts: Sequence[Part], done: Done, seen: Seen) -> list[WorkerUse]:
    """One part after another in this process; `done` takes each."""
    worker = ProfileWorker(job)
    worker.load()
    seen({})
    for part in parts:

        def tick(count: int, part: Part = part) -> None:
            seen({part: count})

        done(part, worker.measure(corpus.range(part.slice, part.first, part.last), part.first, tick))
    return [worker.use()]


def profile_crew(job: Job, device: Device) -> Crew:
    """The actors of a profile."""
    start = partial(start_actor, ProfileWorker, job, device=device, threads=job.threads)
    return Crew(start, device, job.threads)


class Dealer:
    """Parts in their order to whoever is idle, on the Ray cluster that this process is connected to.

    Parameters
    ----------
    crew : Crew
        Of `profile_crew`.
    corpus : Corpus
    parts : sequence of Part
    workers : int or None
        How many; None takes one per GPU or CPU share of the cluster, also of machines that join.
    most : int
        Workers that fit.
    done : callable
        Takes each part as it comes back.
    seen : callable
        Is told now and then what is done of the others.
    held : callable
        Says in words what is written.
    """

    def __init__(
        self,
        crew: Crew,
        corpus: Corpus,
        parts: Sequence[Part],
        workers: int | None,
        most: int,
        done: Done,
        seen: Seen,
        held: Callable[[], str],
    ) -> None:
        self.crew, self.corpus, self.done, self.seen = crew, corpus, done, seen
        self._before: dict[int, int] = {}  # samples of a worker when it began its part
        self._looked = 0.0
        self._wanted, self._most = workers, most
        self._queue = deque(parts)
        self._tasks: dict[Any, tuple[int, Part]] = {}  # by the reference of the call under way
        self._loading: dict[Any, int] = {}
        self._idle: list[int] = []
        self._waiting = Waiting(LOG.info, held)

    def run(self) -> list[WorkerUse]:
        """Until every part is done; what the workers have used.

        Raises
        ------
        CapacityError
            Workers die one after another.
        """
        try:
            looked = 0.0
            while self._queue or self._tasks:
                if time.monotonic() - looked > SCALE:
                    looked = time.monotonic()
                    self._scale()
                while self._idle and self._queue:
                    self._start(self._idle.pop(0), self._queue.popleft())
                self._wait()
            return list(self.crew.use().values())
        finally:
            self.crew.dismiss()

    def _scale(self) -> None:
        room = capacity(self.crew.device, self.crew.threads)
        count = self._wanted or max(1, min(room, self._most))
        count = min(count, len(self._queue) + len(self._tasks))
        for number in self.crew.hire(max(1, count)):
            self._loading[self.crew.workers[number].load.remote()] = number

    def _start(self, number: int, part: Part) -> None:
        samples = self.corpus.range(part.slice, part.first, part.last)
        reference = self.crew.workers[number].measure.remote(samples, part.first)
        self._tasks[reference] = number, part
        self._before.pop(number, None)

    def _look(self) -> None:
        """Tell what is done of the parts under way."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        uses = self.crew.use(timeout=LOOK / 2)
        counts = {}
        for number, part in self._tasks.values():
            if number in uses:
                done = uses[number].samples
                counts[part] = min(done - self._before.setdefault(number, done), part.last - part.first)
        self.seen(counts)

    def _wait(self) -> None:
        check()
        ready, _ = ray.wait([*self._tasks, *self._loading], num_returns=1, timeout=LOOK)
        self._look()
        self._waiting.see(self.crew.any_up())
        for reference in ready:
            number: int
            part: Part | None = None
            if reference in self._loading:
                number = self._loading.pop(reference)
            else:
                number, part = self._tasks.pop(reference)
            try:
                result = outcome(reference)
            except LOST as error:
                self._lost(number, part, error)
                continue
            self._idle.append(number)
            if part is None:
                self.crew.facts[number] = result
                LOG.info("worker %d: %s on %s (process %d)", number, result.device, result.host, result.pid)
            else:
                self.done(part, result)
                self.crew.succeeded()

    def _lost(self, number: int, part: Part | None, error: BaseException) -> None:
        LOG.warning("worker %d is lost and will be replaced; its part is measured again", number)
        if part is not None:
            self._queue.appendleft(part)
        self.crew.lose(number, error)
        self._scale()
