"""What one profiling worker does: load the model and the groups once, then measure parts.

Plain Python without Ray: the stage runs it as an actor or in its own process.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tinyonn.config import ModelConfig
from tinyonn.corpus.file import Sample
from tinyonn.corpus.prompts import prompt_length
from tinyonn.corpus.tokens import UNLABELLED
from tinyonn.dense.load import DenseModel, load_model
from tinyonn.dense.parameters import list_parameters
from tinyonn.errors import CapacityError
from tinyonn.plan.usage import process_meter
from tinyonn.profile.groups import WeightGroups
from tinyonn.profile.measure import Measurer
from tinyonn.profile.tables import PartProfile, SampleProfile
from tinyonn.record.recorder import BadSampleError
from tinyonn.store.records import TensorCalibration
from tinyonn.workers.facts import WorkerFacts, WorkerUse

TOKENS_PER_CHARACTER = 4  # at most, of an excerpt


@dataclass(frozen=True)
class Job:
    """What all workers of a profile are told; picklable.

    Attributes
    ----------
    model : ModelConfig
    groups : WeightGroups
    calibration : dict
        Of every tensor that has groups.
    known_bad : dict
        Reason by index of samples that were set aside when they were recorded: they are not measured.
    threads, prompt_tokens, excerpt : int
        As of the `Manifest`.
    """

    model: ModelConfig
    groups: WeightGroups
    calibration: dict[str, TensorCalibration]
    known_bad: dict[int, str]
    threads: int
    prompt_tokens: int
    excerpt: int


class ProfileWorker:
    """One model on one device.

    Parameters
    ----------
    job : Job
    """

    def __init__(self, job: Job) -> None:
        process_meter()
        self._job = job
        self._done = 0
        self._seconds = 0.0

    def load(self) -> WorkerFacts:
        """Load the model and the groups; apart from the constructor, so that errors come out as they are."""
        return self.adopt(load_model(self._job.model))

    def adopt(self, dense: DenseModel) -> WorkerFacts:
        """Take a model that is loaded already."""
        job = self._job
        self._device, self._tokenizer = dense.device, dense.tokenizer
        self._measurer = Measurer(dense, job.groups, job.calibration, job.threads)
        cuda = dense.device.type == "cuda"
        device = torch.cuda.get_device_name(dense.device) if cuda else f"cpu x{job.threads}"
        return WorkerFacts(tuple(list_parameters(dense.model)), device, platform.node(), os.getpid())

    def measure(
        self, samples: Sequence[Sample], first: int, tick: Callable[[int], None] = lambda done: None
    ) -> PartProfile:
        """Measure a part.

        Parameters
        ----------
        samples : sequence of Sample
            At consecutive positions of a slice's stored order.
        first : int
            Position of the first.
        tick : callable
            Gets the number of samples that are done, after each.

        Raises
        ------
        CapacityError
            Out of GPU memory.
        """
        torch.set_num_threads(self._job.threads)  # a setting of the calling thread
        started = time.perf_counter()
        found: list[SampleProfile] = []
        aside: dict[int, str] = {}
        for position, sample in enumerate(samples, first):
            if (reason := self._job.known_bad.get(sample.index)) is not None:
                aside[sample.index] = reason
                continue
            try:
                found.append(self._profile(sample, position))
            except BadSampleError as error:
                aside[sample.index] = str(error)
            except torch.cuda.OutOfMemoryError as error:
                raise CapacityError(
                    f"out of GPU memory on {self._device} ({str(error).splitlines()[0]}); "
                    "use a smaller data.max_tokens or model.checkpointing: true"
                ) from None
            self._done += 1
            tick(position + 1 - first)
        self._seconds += time.perf_counter() - started
        return PartProfile(tuple(found), aside)

    def use(self) -> WorkerUse:
        """What has been used so far; may be called while `measure` runs."""
        vram = torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0
        return WorkerUse.now(self._done, self._seconds, 0.0, vram)

    def _profile(self, sample: Sample, position: int) -> SampleProfile:
        measured = self._measurer.run(sample)
        count = self._job.excerpt
        ids = sample.input_ids[: TOKENS_PER_CHARACTER * count + TOKENS_PER_CHARACTER].tolist()
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        return SampleProfile(
            index=sample.index,
            position=position,
            loss=measured.loss,
            tokens=len(sample.input_ids),
            labelled=int((sample.labels[1:] != UNLABELLED).sum()),
            prompt=prompt_length(sample.labels, self._job.prompt_tokens),
            excerpt=text[:count],
            totals=measured.totals,
        )
