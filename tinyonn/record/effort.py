"""What a recording costs and how much of it is spent, in seconds of `tinyonn.plan.recording`: progress counts by it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from tinyonn.corpus.file import Corpus
from tinyonn.dense.parameters import Parameter
from tinyonn.machine import Device
from tinyonn.plan.recording import commit_seconds, sample_seconds
from tinyonn.store.manifest import Segment
from tinyonn.workers.facts import WorkerUse

WRITING = 0.5  # of a commit that is spent while it is being written, on average


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
