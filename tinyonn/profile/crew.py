"""Deal parts to workers: in this process, or actors on Ray; a lost worker costs the part that it had in hand."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from tinyonn.corpus.file import Corpus
from tinyonn.profile.manifest import Part
from tinyonn.profile.tables import PartProfile
from tinyonn.profile.worker import Job, ProfileWorker
from tinyonn.workers.crew import Answer, Crew
from tinyonn.workers.facts import WorkerUse
from tinyonn.workers.ray import capacity

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


class Dealer:
    """Parts in their order to whoever is idle, on the Ray cluster that this process is connected to.

    Parameters
    ----------
    crew : Crew
        Its actors are `ProfileWorker`s.
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
    """

    def __init__(
        self,
        crew: Crew[Part],
        corpus: Corpus,
        parts: Sequence[Part],
        workers: int | None,
        most: int,
        done: Done,
        seen: Seen,
    ) -> None:
        self.crew, self.corpus, self.done, self.seen = crew, corpus, done, seen
        self._before: dict[int, int] = {}  # samples of a worker when it began its part
        self._looked = 0.0
        self._wanted, self._most = workers, most
        self._queue = deque(parts)

    def run(self) -> list[WorkerUse]:
        """Until every part is done; what the workers have used.

        Raises
        ------
        CapacityError
            Workers die one after another.
        """
        try:
            looked = 0.0
            while self._queue or self.crew.under_way():
                if time.monotonic() - looked > SCALE:
                    looked = time.monotonic()
                    self._scale()
                while self.crew.idle and self._queue:
                    self._start(self.crew.idle.pop(0), self._queue.popleft())
                for answer in self.crew.wait(LOOK):
                    self._take(answer)
                self._look()
            return list(self.crew.use().values())
        finally:
            self.crew.dismiss()

    def _scale(self) -> None:
        room = capacity(self.crew.device, self.crew.threads)
        count = self._wanted or max(1, min(room, self._most))
        self.crew.hire(max(1, min(count, len(self._queue) + len(self.crew.under_way()))))

    def _start(self, number: int, part: Part) -> None:
        samples = self.corpus.range(part.slice, part.first, part.last)
        self.crew.send(number, part, "measure", samples, part.first)
        self._before.pop(number, None)

    def _look(self) -> None:
        """Tell what is done of the parts under way."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        uses = self.crew.use(timeout=LOOK / 2)
        counts = {}
        for number, part in self.crew.under_way():
            if number in uses:
                done = uses[number].samples
                counts[part] = min(done - self._before.setdefault(number, done), part.last - part.first)
        self.seen(counts)

    def _take(self, answer: Answer[Part]) -> None:
        part = answer.work
        if answer.lost is not None:
            if part is not None:
                self._queue.appendleft(part)
            self.crew.lose(answer.worker, answer.lost)
            self._scale()
        elif part is not None:
            self.crew.idle.append(answer.worker)
            self.done(part, answer.result)
            self.crew.succeeded()
