"""The recording stage: deal segments to workers, commit what they bring back, merge meanwhile.

Data flow: corpus -> `next_segment` -> `Task` -> worker records -> fork of the store -> worker writes -> commit, here
and nowhere else. A worker takes its next segment when it has finished one, so a slow one takes fewer; one that is
lost costs the segment it had in hand. Everything committed stays, and a later call goes on from it.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tinyonn.checks import check_model
from tinyonn.config import Config
from tinyonn.corpus.file import Corpus
from tinyonn.dense.copies import warn_of_links
from tinyonn.dense.load import choose_device, recordable_shape
from tinyonn.dense.parameters import list_parameters
from tinyonn.dense.weights import BaseWeights
from tinyonn.machine import Device, usable_cpus
from tinyonn.places import local_folder, store_location
from tinyonn.plan.facts import plan_recording
from tinyonn.plan.recording import layer_windows
from tinyonn.plan.usage import Meter, measured
from tinyonn.record.identity import check_same, corpus_of_run, identity_of
from tinyonn.record.report import Efforts, Progress, RecordReport, Task
from tinyonn.record.worker import Worker
from tinyonn.show.progress import Bar
from tinyonn.show.track import Tracker
from tinyonn.store.lock import RunLock
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.merge import merge_ready, next_segment, ready_merges
from tinyonn.store.repository import Store
from tinyonn.workers.crew import LOST, Answer, Crew, share, start_actor
from tinyonn.workers.ray import (
    capacity,
    cluster_address,
    cluster_device,
    cluster_ram,
    connected,
    is_connected,
)

LOG = logging.getLogger(__name__)
POLL = 1.0  # seconds between looks at progress
SCALE = 10.0  # seconds between looks for machines that joined


def record(
    location: str, config: Config, *, address: str | None = None, progress: bool = True
) -> RecordReport:
    """Record a corpus through a model into a run, or go on with it.

    Parameters
    ----------
    location : str
        The run's folder, or its ``s3://`` address.
    config : Config
    address : str, optional
        Of a Ray cluster; see `tinyonn.workers.ray.cluster_address`.
    progress : bool
        Show a progress bar on a terminal, a line now and then elsewhere.

    Raises
    ------
    InputError
        Model, corpus or configuration cannot be used, or are not those that the run was begun with.
    CapacityError
        It does not fit.
    StoreError
        The store is held by another process, damaged or full.
    """
    folder, place = local_folder(location), store_location(location)
    cluster = cluster_address(address)
    with RunLock(folder, what="record") as lock, measured() as meter:
        if cluster is None and not is_connected():
            choose_device(config.model.device)
        shape = recordable_shape(config.model)  # what cannot be recorded is refused before anything is done
        check_model(config, list_parameters(shape))
        base = BaseWeights(config.model)
        base.check(name for name, _ in shape.named_parameters())
        warn_of_links(base.folder)
        store = Store.open(place, read_only=False) if Store.exists(place) else None
        identity = identity_of(config)
        stored = None if store is None else store.manifest
        if stored is not None:
            check_same(folder, stored, config, identity)
        corpus = corpus_of_run(folder, config, identity, stored)
        data = {"corpus": corpus.fingerprint}
        identity |= {"data": data, "slices": corpus.slices}
        grown = stored.grow(data, corpus.slices) if stored is not None and stored.data != data else None
        recording = _Recording(folder, place, config, corpus, lock, store, progress, meter)
        return recording.run(identity, cluster, grown)


class _Recording:
    """One call of `record`."""

    def __init__(
        self,
        folder: Path,
        location: str,
        config: Config,
        corpus: Corpus,
        lock: RunLock,
        store: Store | None,
        progress: bool,
        meter: Meter,
    ) -> None:
        self.folder, self.location, self.config, self.corpus = folder, location, config, corpus
        self.lock, self.meter = lock, meter
        self.progress = Progress(sum(corpus.slices.values()), progress)
        self.merging: Future[int] | None = None
        self.stop = threading.Event()  # ends a merge under way
        self.started = time.monotonic()
        self.looked = self.shown = 0.0
        self.committed = 0
        self.crew: Crew[Task]
        self.planned = 0  # bytes of RAM; 0: nothing is to do
        self.store: Store
        if store is not None:
            self.store = store

    def _worker(self, device: Device) -> Any:
        record = self.config.record
        model = self.config.model.model_copy(update={"device": device})
        arguments = model, record.threads, record.seed
        return start_actor(Worker, *arguments, device=device, threads=record.threads)

    def run(self, identity: dict[str, Any], address: str | None, grown: Manifest | None) -> RecordReport:
        if hasattr(self, "store") and self._missing() == 0 and grown is None:
            LOG.info("all %d samples are recorded: nothing to do", self.progress.total)
            merge_ready(self.store)
            return self._report()
        record = self.config.record
        wanted = record.workers if isinstance(record.workers, int) else 1
        self.tracker = Tracker(self.config.track, self.folder, self.folder.name)
        try:
            with (
                connected(address, max(usable_cpus(), record.threads * wanted), self._held),
                ThreadPoolExecutor(1, "merge") as self.merger,
            ):
                device = cluster_device(self.config)
                start = partial(self._worker, device)
                self.crew = Crew(start, device, record.threads, self.progress.say, self._held)
                room = capacity(device, record.threads)
                self.plan = plan_recording(self.config, self.corpus, device, room, cluster_ram(), self.folder)
                self.planned = self.plan.ram_bytes
                try:
                    self._scale()
                    self._open_store(identity)
                    if grown is not None:
                        self._grow(grown)
                    self._loop()
                except BaseException:
                    self.stop.set()
                    raise
                finally:
                    self._dismiss()
                if self.merging is not None:
                    self.merging.result()
            self.progress.close()
            with Bar("merging", shown=self.progress.shown):
                merge_ready(self.store)
        finally:
            self.progress.close()
            self.tracker.close()
        return self._report()

    def _open_store(self, identity: dict[str, Any]) -> None:
        """With the first worker that is up: commit the manifest and the calibration unless they are there."""
        while not hasattr(self, "calibration"):
            self._await_worker()
            try:
                self._begin(identity, self.crew.idle[0])
            except LOST as error:
                self._lost(self.crew.idle[0], error)
        for number in self.crew.idle[:]:
            self._prepare(number)

    def _grow(self, grown: Manifest) -> None:
        """Go on with a corpus that has grown."""
        before, now = sum(self.store.manifest.slices.values()), sum(grown.slices.values())
        self.store.grow(grown)
        self.progress.say(f"the corpus has grown from {before:,} to {now:,} samples: what is recorded stays")

    def _await_worker(self) -> None:
        while not self.crew.idle:
            self._wait(POLL)

    def _begin(self, identity: dict[str, Any], first: int) -> None:
        parameters = self.crew.facts[first].parameters
        if not hasattr(self, "store"):
            size = self.config.record.segment
            manifest = Manifest(
                **identity,
                segment_size=self.plan.segment_size if size == "auto" else size,
                parameters=parameters,
            )
            self.store = Store.create(self.location, manifest)
        self.windows = layer_windows([(p.name, p.layer, p.size) for p in parameters], self.plan.windows)
        calibration = self.store.calibration
        if calibration is None:
            # of what the run was begun with, also where the corpus has grown before it was calibrated
            samples = self.corpus.calibration(self.config.record.calibration, self.store.manifest.slices)
            self.progress.say(f"calibrating on {len(samples)} samples")
            with Bar("calibrating", shown=self.progress.shown):
                calibration = self.crew.call(first, "calibrate", samples, self.windows)
            self.store.commit_calibration(calibration)
        self.calibration = share(calibration)

    def _prepare(self, number: int) -> None:
        """Tell a worker what it needs beside the model, or lose it."""
        try:
            self.crew.call(number, "prepare", self.calibration, self.windows)
        except LOST as error:
            self._lost(number, error)

    def _loop(self) -> None:
        manifest = self.store.manifest
        self.efforts = Efforts(
            self.corpus,
            manifest.parameters,
            self.crew.device,
            len(self.windows),
            self.config.model.checkpointing,
            manifest.segment_size,
        )
        committed = self.progress.total - self._missing()
        self.progress.begin(self.efforts.of_rest(self.store.segments()), committed)
        while self._missing():
            while self.crew.idle and (segment := self._next()) is not None:
                self._start(Task(segment, self.crew.idle.pop(0)))
            self._wait(POLL)
            self._merge()
            now = time.monotonic()
            if now - self.looked > SCALE:
                self.looked = now
                self._scale()
            if now - self.shown > POLL:
                self.shown = now
                self._show()
        self._show()

    def _merge(self) -> bool:
        """Keep the background merge going while there is something to merge; says whether it runs."""
        if self.merging is not None and self.merging.done():
            self.merging.result()
            self.merging = None
        if self.merging is None and ready_merges(self.store.manifest, self.store.segments()):
            self.merging = self.merger.submit(merge_ready, self.store, self.stop.is_set)
        return self.merging is not None

    def _make_room(self, slice: str) -> None:
        """Wait for merges that are behind, so that a commit keeps to the bound on live segments."""
        most = self.store.manifest.max_live + max(1, len(self.crew.workers))
        while len(self.store.segments(slice)) >= most and self._merge():
            assert self.merging is not None
            self.merging.result()

    def _scale(self) -> None:
        """Start as many workers as the plan and the cluster allow, now that some may have joined or died."""
        wanted = self.config.record.workers
        room = capacity(self.crew.device, self.crew.threads)
        count = (
            wanted
            if isinstance(wanted, int)
            else max(1, min(self.plan.workers_for(room), self.plan.segments))
        )
        self.crew.hire(count)

    def _next(self) -> Segment | None:
        in_flight = [task.segment for task in self._tasks()]
        return next_segment(
            self.store.manifest, self.store.segments(), in_flight, max(1, len(self.crew.workers))
        )

    def _start(self, task: Task) -> None:
        """Send a task's next step to its worker."""
        if task.writing:
            if task.fork is None:
                task.fork = self.store.begin(task.segment)
            self.crew.send(task.worker, task, "write", task.fork, self._counted(task), task.window)
        else:
            segment = task.segment
            samples = self.corpus.range(segment.slice, segment.first, segment.last)
            self.crew.send(task.worker, task, "record", samples, task.window, task.bad)
            task.begun, task.seen = None, 0

    def _tasks(self) -> list[Task]:
        """Under way."""
        return [task for _, task in self.crew.under_way()]

    def _drop(self, task: Task) -> None:
        """Forget a task's fork, unless another worker writes the same segment: the store knows them by name."""
        task.fork = None
        if not any(other.fork is not None and other.segment == task.segment for other in self._tasks()):
            self.store.drop(task.segment)

    def _counted(self, task: Task) -> Segment:
        segment = task.segment
        set_aside = tuple({"index": index, "reason": reason} for index, reason in sorted(task.bad.items()))
        good = segment.last - segment.first - len(set_aside)
        return Segment(segment.slice, segment.first, segment.last, good, set_aside)

    def _wait(self, timeout: float) -> None:
        """Take one finished call, if there is one in time, and do what comes next."""
        for answer in self.crew.wait(timeout):
            self._take(answer)

    def _take(self, answer: Answer[Task]) -> None:
        if answer.lost is not None:
            if answer.work is not None:
                self._drop(answer.work)
            self._lost(answer.worker, answer.lost)
        elif answer.work is not None:
            self._advance(answer.work, answer.result)
        elif hasattr(self, "calibration"):
            self._prepare(answer.worker)

    def _lost(self, number: int, error: BaseException) -> None:
        self.crew.lose(number, error)
        self._scale()

    def _dismiss(self) -> None:
        """Let all workers go; whoever still records a segment does so a second time, or in vain."""
        tasks = self._tasks()
        self.crew.dismiss()
        for task in tasks:
            self.store.drop(task.segment)

    def _advance(self, task: Task, result: Any) -> None:
        """What comes after a step: the next window, another try without the bad samples, or the commit."""
        if not task.writing:
            task.bad.update(result)
            if result and task.window > 0:  # the windows before have these samples in their sums
                self._drop(task)
                task.window = 0
            else:
                task.writing = True
            self._start(task)
            return
        task.fork, task.writing = result, False
        if task.window + 1 < len(self.windows):
            task.window += 1
            self._start(task)
            return
        self._commit(task)

    def _commit(self, task: Task) -> None:
        segment = self._counted(task)
        self._make_room(segment.slice)
        self.lock.check()
        if self.store.commit(task.fork, segment):
            self.committed += segment.samples
            self.efforts.commit(task.segment)
            seconds = time.monotonic() - task.started
            LOG.debug("committed %s: %d samples, %d set aside, %.1f s by worker %d", segment.name, segment.samples,
                      len(segment.set_aside), seconds, task.worker)  # fmt: skip
        self.crew.succeeded()
        self.crew.idle.append(task.worker)

    def _show(self) -> None:
        uses = self.crew.use(timeout=0.5)
        effort, under_way = self.efforts.spent(self._tasks(), uses)
        self.progress.update(self.store.segments(), uses, effort, under_way)
        rates = {f"samples_per_second/worker_{n}": rate for n, rate in self.progress.rates.items()}
        self.tracker.log(self.progress.done, {**rates, "live_segments": float(len(self.store.segments()))})

    def _held(self) -> str:
        """What is committed, in words."""
        if not hasattr(self, "store"):
            return "nothing was committed yet"
        total = self.progress.total
        return f"{total - self._missing():,} of {total:,} samples are committed and stay"

    def _missing(self) -> int:
        held = sum(segment.last - segment.first for segment in self.store.segments())
        return sum(self.store.manifest.slices.values()) - held

    def _report(self) -> RecordReport:
        return RecordReport.of(
            self.folder,
            self.store,
            self.corpus,
            self.progress,
            self.committed,
            time.monotonic() - self.started,
            self.meter,
            self.planned,
        )
