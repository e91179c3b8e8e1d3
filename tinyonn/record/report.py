"""What the recording stage tells: live progress, by what a recording costs in seconds of the plan, and a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from tinyonn.corpus.file import Corpus
from tinyonn.dense.parameters import Parameter
from tinyonn.machine import Device
from tinyonn.plan.recording import commit_seconds, sample_seconds
from tinyonn.plan.usage import Meter, total_peak
from tinyonn.show.progress import Bar
from tinyonn.show.sheet import Sheet, pairs, whole
from tinyonn.show.sizes import format_seconds, format_size
from tinyonn.store.manifest import Segment
from tinyonn.store.repository import Store
from tinyonn.workers.facts import WorkerUse

LOG = logging.getLogger(__name__)
LOG_SECONDS = 15.0  # between lines about the workers in the log
RATE_SECONDS = 3.0  # over which a worker's speed is measured
WRITING = 0.5  # of a commit that is spent while it is being written, on average


class Progress:
    """What is recorded so far, shown while it grows.

    Attributes
    ----------
    total : int
        Samples of the corpus.
    done : int
        Samples committed, those set aside included.
    rates : dict
        Samples per second of each worker, over the last few looks.
    """

    def __init__(self, total: int, shown: bool) -> None:
        self.total, self.done = total, 0
        self.rates: dict[int, float] = {}
        self.uses: dict[int, WorkerUse] = {}
        self.shown = shown
        self._last: dict[int, tuple[float, int]] = {}
        self._told = 0.0
        self._bar: Bar | None = None

    def say(self, text: str) -> None:
        """One line."""
        if self.shown:
            LOG.info(text)

    def begin(self, effort: float, committed: int) -> None:
        """Start to record: what that costs in all, in any unit, and samples that were committed before."""
        self.done = committed
        self._bar = Bar("recording", effort, "samples", self.total, committed, self.shown).__enter__()

    def update(
        self, segments: Sequence[Segment], uses: dict[int, WorkerUse], effort: float, under_way: int
    ) -> None:
        """Look at what is committed and at what the workers have done.

        Parameters
        ----------
        segments : sequence of Segment
            Committed.
        uses : dict
            Of the workers that answered.
        effort : float
            Spent since the beginning, of what `begin` was told.
        under_way : int
            Samples that are recorded and not committed yet.
        """
        now = time.monotonic()
        for number, use in uses.items():
            before, count = self._last.setdefault(number, (now, use.samples))
            if now - before > RATE_SECONDS:
                rate = (use.samples - count) / (now - before)
                self.rates[number] = 0.5 * (self.rates.get(number, rate) + rate)
                self._last[number] = (now, use.samples)
        self.uses.update(uses)
        self.rates = {number: rate for number, rate in self.rates.items() if number in uses}
        aside = sum(len(segment.set_aside) for segment in segments)
        committed = sum(segment.last - segment.first for segment in segments)
        self.done = min(self.total, max(self.done, committed))
        if now - self._told > LOG_SECONDS:
            self._told = now
            rates = {number: round(rate, 2) for number, rate in self.rates.items()}
            LOG.debug("workers: %s samples/s, %d live segments", rates, len(segments))
        if self._bar is not None:
            note = f"{aside:,} set aside" if aside else ""
            self._bar.update(effort, min(self.total, self.done + under_way), note)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


@dataclass(frozen=True)
class RecordReport:
    """What a call of `record` did and what the run holds now.

    Attributes
    ----------
    run : str
    samples_recorded : int
        Committed by this call.
    samples, set_aside, truncated : int
        Of the whole run: recorded; set aside by the recorder or the corpus; cut to `data.max_tokens`.
    weights : int
    live_segments : int
    seconds_recording, seconds_writing : float
        Summed over the workers of this call.
    commit_share : float
        Writing over recording.
    samples_per_second : float
        Of this call, all workers together, start-up left out.
    peak_rss_bytes : int
        Of all processes together, Ray's own among them; see `tinyonn.plan.usage`.
    peak_vram_bytes : int
        Of the largest worker.
    planned_rss_bytes : int
        What the plan said of `peak_rss_bytes`; 0 where nothing was to do.
    """

    run: str
    samples_recorded: int
    samples: int
    set_aside: int
    truncated: int
    weights: int
    live_segments: int
    workers: int
    seconds_recording: float
    seconds_writing: float
    commit_share: float
    samples_per_second: float
    peak_rss_bytes: int
    peak_vram_bytes: int
    seconds: float
    planned_rss_bytes: int = 0

    @classmethod
    def of(
        cls,
        folder: Path,
        store: Store,
        corpus: Corpus,
        progress: Progress,
        recorded: int,
        seconds: float,
        meter: Meter,
        planned: int,
    ) -> RecordReport:
        """Gather the figures."""
        segments = store.segments()
        uses = list(progress.uses.values())
        recording, writing = sum(use.recording for use in uses), sum(use.writing for use in uses)
        return cls(
            run=str(folder),
            samples_recorded=recorded,
            samples=sum(segment.samples for segment in segments),
            set_aside=sum(len(segment.set_aside) for segment in segments) + len(corpus.set_aside),
            truncated=corpus.truncated,
            weights=sum(parameter.size for parameter in store.manifest.parameters),
            live_segments=len(segments),
            workers=len(uses),
            seconds_recording=round(recording, 3),
            seconds_writing=round(writing, 3),
            commit_share=round(writing / recording, 4) if recording else 0.0,
            samples_per_second=round(len(uses) * recorded / (recording + writing), 3) if recording else 0.0,
            peak_rss_bytes=total_peak(meter, ((use.host, use.pid, use.peak_rss) for use in uses)),
            peak_vram_bytes=max((use.peak_vram for use in uses), default=0),
            seconds=round(seconds, 3),
            planned_rss_bytes=planned,
        )

    def figures(self) -> dict[str, Any]:
        """All figures, as JSON values."""
        return asdict(self)

    def table(self) -> Sheet:
        """The same for people."""
        rows = {
            "samples": f"{self.samples:,} ({self.samples_recorded:,} in this call)",
            "set aside": f"{self.set_aside:,}",
            "cut to data.max_tokens": f"{self.truncated:,}",
            "weights": f"{self.weights:,}",
            "live segments": f"{self.live_segments:,}",
            "speed": f"{self.samples_per_second:,.2f} samples/s with {self.workers} workers",
            "writing / recording": f"{self.commit_share:.1%}",
            "peak memory": f"{format_size(self.peak_rss_bytes)} of RAM, {format_size(self.peak_vram_bytes)} of VRAM",
            "time": format_seconds(self.seconds),
        }
        return pairs(f"recorded {whole(self.run)}", rows)


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


class Efforts:
    """Of a run's segments.

    Parameters
    ----------
    corpus : Corpus
    parameters : sequence of Parameter
    device : str
    windows : int
    checkpointing : bool
    segment_size : int
    """

    def __init__(
        self,
        corpus: Corpus,
        parameters: Sequence[Parameter],
        device: Device,
        windows: int,
        checkpointing: bool,
        segment_size: int,
    ) -> None:
        self._corpus, self._windows, self._size = corpus, windows, segment_size
        weights = sum(parameter.size for parameter in parameters)
        one, two = (sample_seconds(weights, tokens, device, windows, checkpointing) for tokens in (1, 2))
        self._token, self._sample = two - one, 2 * one - two
        self._commit = commit_seconds(weights, len(parameters))
        self._done = 0.0

    def of_rest(self, segments: Iterable[Segment]) -> float:
        """All that is not committed."""
        committed = list(segments)
        effort = 0.0
        for name, total in self._corpus.slices.items():
            own = [segment for segment in committed if segment.slice == name]
            missing = total - sum(segment.last - segment.first for segment in own)
            effort += self._recording(name, 0, total) + self._commit * ceil(missing / self._size)
            effort -= sum(self._recording(name, segment.first, segment.last) for segment in own)
        return effort

    def commit(self, segment: Segment) -> None:
        """A segment is committed."""
        self._done += self._recording(segment.slice, segment.first, segment.last) + self._commit

    def spent(self, tasks: Iterable[Task], uses: Mapping[int, WorkerUse]) -> tuple[float, int]:
        """Since the beginning, with what is under way; and how many samples those are.

        Parameters
        ----------
        tasks : iterable of Task
            Under way. Those whose worker is seen for the first time remember its samples.
        uses : mapping
            Of the workers that answered.
        """
        effort, samples = self._done, 0
        for task in tasks:
            segment = task.segment
            count = segment.last - segment.first
            if task.writing:
                share = (task.window + 1) / self._windows
            else:
                share = (task.window + self._seen(task, uses) / max(1, count)) / self._windows
            effort += share * self._recording(segment.slice, segment.first, segment.last)
            effort += WRITING * self._commit / self._windows if task.writing else 0.0
            samples += int(share * count)
        return effort, samples

    def _seen(self, task: Task, uses: Mapping[int, WorkerUse]) -> int:
        """Samples of the window that is being recorded."""
        use = uses.get(task.worker)
        if use is not None:
            task.begun = use.samples if task.begun is None else task.begun
            task.seen = min(use.samples - task.begun, task.segment.last - task.segment.first)
        return task.seen

    def _recording(self, slice: str, first: int, last: int) -> float:
        return self._sample * (last - first) + self._token * self._corpus.tokens_of(slice, first, last)
