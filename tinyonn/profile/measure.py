"""What every group of weights did on a sample: one forward and one backward pass of the dense model.

The same passes as the recorder's (`tinyonn.record.recorder`): the head runs on the labelled tokens alone, a tap behind
every module that has groups meets its input X and the gradient G of its output, and the weight gradient is formed in
bands that are summed by group at once. A worker loads the model and the groups once, then measures parts; it is plain
Python without Ray, for the stage runs it as an actor or in its own process.
"""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tinyonn.corpus.file import Sample
from tinyonn.corpus.tokens import UNLABELLED, prompt_length
from tinyonn.dense.load import DenseModel, load_model
from tinyonn.dense.parameters import Use, list_parameters, list_uses
from tinyonn.dense.passes import Taps, checked_head, forward_backward
from tinyonn.errors import CapacityError, InputError, first_line
from tinyonn.plan.usage import process_meter
from tinyonn.profile.groups import WeightGroups
from tinyonn.profile.kernel import GroupSums, Totals
from tinyonn.record.gradients import product_bands
from tinyonn.record.levels import Checks, raise_top
from tinyonn.record.recorder import BadSampleError, finite_loss
from tinyonn.record.sums import mean_square, weight_of
from tinyonn.store.records import TensorCalibration
from tinyonn.workers.facts import WorkerFacts, WorkerUse

if TYPE_CHECKING:
    from tinyonn.config import ModelConfig

TOKENS_PER_CHARACTER = 4  # at most, of an excerpt
RESIDENT_SHARE = 0.5  # of the free GPU memory that groups may take; beyond that they are sent band by band


@dataclass(frozen=True)
class Measured:
    """A sample's profile.

    Attributes
    ----------
    loss : float
        Mean over the labelled tokens, in nats.
    totals : Totals
        By group.
    """

    loss: float
    totals: Totals


class Measurer:
    """Profiles samples on one device; its CPU threads decide how products are rounded: the same for a whole profile."""

    def __init__(
        self,
        dense: DenseModel,
        groups: WeightGroups,
        calibration: Mapping[str, TensorCalibration],
        threads: int = 1,
    ) -> None:
        torch.set_num_threads(threads)
        model: Any = dense.model
        self.decoder, self.head, self.device = model.base_model, checked_head(model), dense.device
        self.groups = groups.identity.groups
        self._calibration = calibration
        self._pool = ThreadPoolExecutor(1) if threads > 1 else None
        self._group: dict[str, torch.Tensor] = {}
        self._uses: dict[str, list[Use]] = defaultdict(list)
        self._checks = Checks(self.device)
        self._sums = GroupSums(self.groups, self.device)
        self._read(groups)
        self._find_uses(model)
        self._taps = Taps(self._uses, self.head.module, self._meet, lambda name: True, "profiled")

    def run(self, sample: Sample) -> Measured:
        """Profile a sample.

        Raises
        ------
        BadSampleError
            A loss, an input or a gradient was not finite.
        """
        self._taps.clear()
        self._checks.clear()
        self._sums = GroupSums(self.groups, self.device, self._pool)
        loss, hidden_TH = forward_backward(self.decoder, self.head, sample)
        self._finish(hidden_TH)
        return Measured(finite_loss(loss, self._checks), self._sums.totals())

    def _read(self, groups: WeightGroups) -> None:
        """Groups lie on the device if they take no more than half of what is free there."""
        total = sum(parameter.size for parameter in groups.tensors)
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        place = self.device if total < RESIDENT_SHARE * free else torch.device("cpu")
        for parameter in groups.tensors:
            self._group[parameter.name] = torch.from_numpy(groups.read(parameter.name)).to(place)

    def _find_uses(self, model: torch.nn.Module) -> None:
        for use in list_uses(model):
            if use.parameter_name in self._group:
                self._uses[use.parameter_name].append(use)
        if lost := self._group.keys() - self._uses.keys():
            raise InputError(
                f"the model has no tensor {min(lost)}, which has groups; give the recorded model"
            )
        assert all(use.operation in ("linear", "conv1d") for uses in self._uses.values() for use in uses)

    def _meet(self, use: Use, X: torch.Tensor, G_TO: torch.Tensor) -> None:
        self._add(use, X, G_TO, mean_square(X))

    def _finish(self, hidden_TH: torch.Tensor) -> None:
        """The head, whose tokens came in chunks, and tensors of several modules."""
        for parts in self._taps.late.values():
            # Every token is the head's input, labelled or not.
            inputs = {
                use.module_name: hidden_TH if use.module is self.head.module else X for use, X, _ in parts
            }
            square = torch.stack([mean_square(X) for X in inputs.values()]).sum(0)
            X, G = torch.cat([X for _, X, _ in parts]), torch.cat([G for _, _, G in parts])
            self._add(parts[0][0], X, G, square)
        self._taps.late.clear()

    def _add(self, use: Use, X_TI: torch.Tensor, G_TO: torch.Tensor, square_I: torch.Tensor) -> None:
        name, by_row = use.parameter_name, use.operation == "conv1d"
        calibration = self._calibration[name]
        bases = calibration.act_base, calibration.grad_base
        rms = square_I.sqrt()
        self._checks.add(f"input of {name}", torch.isfinite(rms).all())
        slot = self._checks.slot(f"gradient of {name}")
        A, B = (X_TI, G_TO) if by_row else (G_TO, X_TI)
        if A.dtype != B.dtype:
            A, B = A.float(), B.float()
        W, group = weight_of(use).detach(), self._group[name]
        for first, band in product_bands(A, B):
            rows = slice(first, first + band.shape[0])
            here = group[rows].to(self.device)
            top = self._sums.add(W[rows], band, here, rms[rows] if by_row else rms, by_row, bases)
            raise_top(slot, top)


@dataclass(frozen=True)
class SampleProfile:
    """One sample.

    Attributes
    ----------
    index, position : int
        Row of the source, place in the slice's stored order.
    loss : float
        Mean over the labelled tokens, nats.
    tokens, labelled, prompt : int
        All; those that the loss is taken on; those from which gates are chosen.
    excerpt : str
        Its first characters.
    totals : Totals
        By group.
    """

    index: int
    position: int
    loss: float
    tokens: int
    labelled: int
    prompt: int
    excerpt: str
    totals: Totals


@dataclass(frozen=True)
class PartProfile:
    """What was measured of a part; `set_aside` is reason by index."""

    samples: tuple[SampleProfile, ...]
    set_aside: dict[int, str]


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
                    f"out of GPU memory on {self._device} ({first_line(error)}); "
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
