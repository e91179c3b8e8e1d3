"""``tinyonn profile``: what every expert did on every sample, as a Parquet dataset.

Data flow: the run's corpus, the dense model, the groups of the assembled model (or the run's cells) → parts, dealt to
workers (`crew`), each of which runs the model forward and backward per sample and sums by group (`measure`) → two
Parquet files a part (`dataset`). Parts that are there already are kept, so a killed call goes on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tinyonn.config import Config, ProfileConfig
from tinyonn.corpus.corpus import even_shares
from tinyonn.corpus.file import Corpus
from tinyonn.corpus.tokens import PROMPT_TOKENS
from tinyonn.dense.load import choose_device
from tinyonn.errors import InputError
from tinyonn.machine import Device, free_ram, gpus, usable_cpus
from tinyonn.places import local_folder
from tinyonn.plan.demands import DataFacts, Machine
from tinyonn.plan.facts import describe_model
from tinyonn.plan.profiling import ProfilePlan, plan_profile
from tinyonn.plan.usage import Meter, measured, total_peak
from tinyonn.profile.dataset import Dataset, Manifest, Part
from tinyonn.profile.groups import Wanted, WeightGroups, find_groups
from tinyonn.profile.measure import Job, PartProfile, ProfileWorker
from tinyonn.profile.profile import Profile, ProfileReport, open_profile, spread
from tinyonn.record.identity import check_base, recorded_corpus
from tinyonn.run import Run, open_run
from tinyonn.show.progress import Bar
from tinyonn.show.sizes import format_size
from tinyonn.store.lock import RunLock
from tinyonn.workers.crew import Answer, Crew, start_actor
from tinyonn.workers.facts import WorkerUse
from tinyonn.workers.ray import (
    capacity,
    cluster_address,
    cluster_device,
    cluster_ram,
    connected,
    is_connected,
)

LOG = logging.getLogger(__name__)
SCALE = 10.0  # seconds between looks for machines that joined
LOOK = 1.0  # seconds between looks at what the workers have done
SAMPLE_TOKENS = 100  # that a sample costs like, beside its own: its weights' gradients and levels

Done = Callable[[Part, PartProfile], None]
Seen = Callable[[Mapping[Part, int]], None]  # samples done of the parts under way


@dataclass(frozen=True)
class ProfileOptions:
    """How a run is profiled.

    Attributes
    ----------
    groups : str
        ``experts`` of the assembled model, ``labels`` of the run, or ``auto``: experts if there are any.
    samples : int or None
        Of the corpus, evenly over the slices, the first in their stored order; None takes all.
    prompt_tokens : int
        Most tokens of a text's prompt.
    excerpt : int
        Characters of a sample that are kept.
    workers : int or None
        None: those of ``record.workers``; ``auto`` there is one per GPU or CPU share, as many as fit.
    memory : int or None
        Bytes of RAM that all workers may use; None: what is free.
    fresh : bool
        Measure anew, whatever is there.
    """

    groups: Wanted = "auto"
    samples: int | None = ProfileConfig().samples
    prompt_tokens: int = PROMPT_TOKENS
    excerpt: int = 160
    workers: int | None = None
    memory: int | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("prompt_tokens", 1), ("excerpt", 0), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"profile.{name} = {value}; it must be at least {least}")


def profile_options(config: Config, fresh: bool = False, workers: int | None = None) -> ProfileOptions:
    """A call of `profile_run` as the configuration's section ``profile`` wants it."""
    return ProfileOptions(**config.profile.model_dump(), fresh=fresh, workers=workers)


def profile_run(
    location: str,
    config: Config,
    options: ProfileOptions = ProfileOptions(),
    *,
    address: str | None = None,
    tell: Callable[[str], None] = LOG.info,
) -> ProfileReport:
    """Profile a run's samples; may be killed at any moment and called again.

    One worker without a cluster measures in this process; several are actors of a local Ray or of the cluster, whose
    machines must reach the run's folder.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : Config
        Its model must be the recorded one; its corpus is the run's own.
    options : ProfileOptions
    address : str, optional
        Of a Ray cluster; see `tinyonn.workers.ray.cluster_address`.
    tell : callable
        Takes a line of progress now and then.

    Raises
    ------
    InputError
        The run is not clustered; the base model or the corpus is not the recorded one; a profile of something else is
        there.
    CapacityError
        It does not fit.
    StoreBusyError
        Another process works on the run.
    """
    run = open_run(location)
    with RunLock(local_folder(location), what="profile") as lock, measured() as meter:
        profiling = _Profiling(run, location, config, options, tell, lock.check, meter)
        return profiling.carry_out(cluster_address(address))


class _Profiling:
    """One call of `profile_run`."""

    def __init__(
        self,
        run: Run,
        location: str,
        config: Config,
        options: ProfileOptions,
        tell: Callable[[str], None],
        check: Callable[[], None],
        meter: Meter,
    ) -> None:
        self.run, self.location, self.config, self.options = run, location, config, options
        self.tell, self.check, self.meter = tell, check, meter
        self.folder = local_folder(location)
        self.started = time.monotonic()
        self.measured, self.planned = 0, 0
        fingerprint = check_base(run.store, location, config.model)
        self.groups: WeightGroups = find_groups(run, self.folder / "experts", config.model, options.groups)
        self.corpus = recorded_corpus(self.folder, config, run.manifest)
        model = {"quantization": config.model.quantization, "dtype": config.model.dtype}
        shares = even_shares(list(self.corpus.slices.values()), options.samples)
        manifest = Manifest(
            groups=self.groups.identity,
            model=fingerprint | model,
            corpus=self.corpus.fingerprint,
            threads=config.record.threads,
            prompt_tokens=options.prompt_tokens,
            excerpt=options.excerpt,
            taken=dict(zip(self.corpus.slices, shares, strict=True)),
        )
        self.dataset = Dataset(self.folder / "profile", manifest, options.fresh)

    def carry_out(self, address: str | None) -> ProfileReport:
        """Measure what is missing."""
        parts = self.dataset.missing()
        total = self.dataset.manifest.samples
        self.before = total - sum(part.last - part.first for part in parts)
        self.effort = 0.0
        self.efforts = {part: self._effort(part) for part in parts}
        work = sum(self.efforts.values())
        with Bar("profiling", work, "samples", count=total, before=self.before) as self.bar:
            uses = self._measure(parts, address) if parts else []
        return self._report(open_profile(self.dataset.folder), uses)

    def _effort(self, part: Part) -> float:
        """Tokens, and as much again for every sample as its weights' gradients take."""
        return self.corpus.tokens_of(part.slice, part.first, part.last) + SAMPLE_TOKENS * (
            part.last - part.first
        )

    def _measure(self, parts: list[Part], address: str | None) -> list[WorkerUse]:
        on_ray = address is not None or is_connected()
        threads = self.config.record.threads
        wanted = self._wanted
        if not on_ray:
            device: Device = "cuda" if choose_device(self.config.model.device).type == "cuda" else "cpu"
            plan = self._plan(device, len(gpus()) if device == "cuda" else usable_cpus(), free_ram())
            count = min(plan.workers, len(parts))
            self._state(plan, count)
            if count == 1:
                return measure_here(self._job(device), self.corpus, parts, self._done, self._seen)
        cpus = max(usable_cpus(), threads * (wanted or 1))
        with connected(address, cpus, self._held):
            device = cluster_device(self.config)
            plan = self._plan(device, capacity(device, threads=1), cluster_ram())
            self._state(plan, min(plan.workers, len(parts)))
            start = partial(start_actor, ProfileWorker, self._job(device), device=device, threads=threads)
            crew: Crew[Part] = Crew(start, device, threads, LOG.info, self._held)
            return Dealer(crew, self.corpus, parts, wanted, plan.workers, self._done, self._seen).run()

    @property
    def _wanted(self) -> int | None:
        if self.options.workers is not None:
            return self.options.workers
        recorded = self.config.record.workers
        return recorded if isinstance(recorded, int) else None

    def _state(self, plan: ProfilePlan, workers: int) -> None:
        """Say what so many workers need."""
        self.planned = plan.ram(workers)
        largest = max(plan.worker.needs, key=lambda need: need.bytes)
        self.tell(
            f"profiling needs {format_size(self.planned)} of RAM at most for {workers} worker(s), "
            f"{largest.what} {format_size(largest.bytes)} of each"
        )

    def _plan(self, device: Device, units: int, ram: int) -> ProfilePlan:
        parameters, model = describe_model(self.config.model)
        corpus = self.corpus
        data = DataFacts(len(corpus), corpus.mean_tokens, corpus.longest, len(corpus.slices))
        vram = min((gpu.free for gpu in gpus()), default=None) if device == "cuda" else None
        limit = ram if self.options.memory is None else self.options.memory
        machine = Machine(device, vram, limit, None, units)
        threads = self.config.record.threads
        return plan_profile(parameters, self.groups.tensors, model, data, machine, threads, self._wanted)

    def _job(self, device: Device) -> Job:
        calibration = self.run.calibration
        return Job(
            self.config.model.model_copy(update={"device": device}),
            self.groups,
            {parameter.name: calibration[parameter.name] for parameter in self.groups.tensors},
            {item["index"]: item["reason"] for item in self.run.set_aside},
            self.config.record.threads,
            self.options.prompt_tokens,
            self.options.excerpt,
        )

    def _held(self) -> str:
        """What is written, in words."""
        return f"{self.before + self.measured:,} of {self.dataset.manifest.samples:,} samples are written and stay"

    def _done(self, part: Part, found: PartProfile) -> None:
        self.check()
        self.dataset.write(part, found)
        self.measured += part.last - part.first
        LOG.debug("wrote %s/%d-%d: %d set aside", part.slice, part.first, part.last, len(found.set_aside))
        self.effort += self.efforts[part]
        self._seen({})

    def _seen(self, counts: Mapping[Part, int]) -> None:
        """Show what is done, with samples of the parts under way."""
        if not self.effort and not any(counts.values()):
            self.bar.begin()  # workers have loaded the model, and have measured nothing yet
        inside = [(part, count / (part.last - part.first)) for part, count in counts.items()]
        effort = self.effort + sum(self.efforts[part] * share for part, share in inside)
        self.bar.update(effort, self.before + self.measured + sum(counts.values()))

    def _report(self, profile: Profile, uses: list[WorkerUse]) -> ProfileReport:
        identity = profile.manifest.groups
        seconds = sum(use.recording for use in uses)
        core_share, effective = spread(profile)
        return ProfileReport(
            location=self.location,
            folder=str(self.dataset.folder),
            source=identity.kind,
            id=identity.id,
            experts=identity.experts,
            groups=identity.groups,
            samples=len(profile.samples),
            samples_measured=self.measured,
            set_aside=len(profile.set_aside),
            slices=dict(Counter(profile.slices)),
            loss=float(profile.losses.mean()) if len(profile.losses) else float("nan"),
            core_share=core_share,
            effective_experts=effective,
            bytes=sum(path.stat().st_size for path in self.dataset.folder.rglob("*.parquet")),
            workers=len(uses),
            seconds_measuring=round(seconds, 3),
            samples_per_second=round(len(uses) * self.measured / seconds, 3) if seconds else 0.0,
            peak_rss_bytes=total_peak(self.meter, ((use.host, use.pid, use.peak_rss) for use in uses)),
            peak_vram_bytes=max((use.peak_vram for use in uses), default=0),
            seconds=round(time.monotonic() - self.started, 3),
            planned_rss_bytes=self.planned,
        )


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
    """Parts in their order to whoever is idle, on the Ray cluster that this process is connected to."""

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
