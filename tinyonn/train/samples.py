"""Forward and backward of a step's samples, some at a time, every worker its own; and what the step says of itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed

from tinyonn.corpus.tokens import UNLABELLED
from tinyonn.train.data import Batch, share
from tinyonn.train.options import LossWeights, TrainOptions
from tinyonn.train.routing import Routed
from tinyonn.train.student import Measured, Student, cause_of, total
from tinyonn.train.teacher import Teacher, TeacherOutput

PARTS = ("kl", "ce", "hidden", "entropy")


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of a batch, of all workers.

    Attributes
    ----------
    totals : dict of str to float
        By `PARTS`.
    counts : dict of str to int
        What each is to be divided by; parts that were not measured are left out.
    bad : str or None
        What was not finite first on this worker.
    """

    totals: dict[str, float]
    counts: dict[str, int]
    bad: str | None

    def mean(self, name: str) -> float:
        """Per token."""
        return self.totals[name] / max(self.counts[name], 1)


def run_samples(
    student: Student,
    teacher: Teacher | None,
    batch: Batch,
    routed: Routed | None,
    options: TrainOptions,
    workers: Workers,
    value_gates: torch.Tensor | None = None,
) -> Sums:
    """Run this worker's samples and leave their gradients, those of the router's own losses too, in ``grad``."""
    counts = _counts(student, batch)
    leaf_BE = None
    if routed is not None:
        leaf_BE = routed.gates_BE.detach().requires_grad_(routed.gates_BE.requires_grad)
    sums = torch.zeros(len(PARTS), dtype=torch.float64)
    found: set[str] = set()
    bad: str | None = None
    for rows in _micro_batches(batch, options.micro_batch, workers):
        micro = batch.rows(rows).to(student.device)
        gates_BE = None if leaf_BE is None else leaf_BE[rows]
        said, measured = _measure(student, teacher, micro, gates_BE, value_gates, options.precision)
        loss = total(measured, options.weights, counts)
        found |= measured.parts.keys() | {"entropy"}
        sums += _totals(measured)
        if not bool(loss.detach().isfinite()):
            bad = bad or cause_of(student, said, micro, gates_BE, options.precision)
        elif loss.requires_grad and bad is None:
            loss.backward()
    if routed is not None and leaf_BE is not None and leaf_BE.requires_grad and bad is None:
        grad_BE = torch.zeros_like(leaf_BE) if leaf_BE.grad is None else leaf_BE.grad
        own = torch.full_like(routed.loss, 1 / workers.world)  # every worker has this loss of the whole batch
        torch.autograd.backward([routed.gates_BE, routed.loss], [grad_BE, own])
    sums = sums.to(student.device)
    workers.add([sums])
    totals = dict(zip(PARTS, sums.tolist(), strict=True))
    return Sums(totals, {name: counts[name] for name in PARTS if name in found}, bad)


def _counts(student: Student, batch: Batch) -> dict[str, int]:
    """Terms of each part in the whole batch."""
    counted = int((student.targets(batch) != UNLABELLED).sum())
    return {"kl": counted, "ce": counted, "entropy": counted, "hidden": int(batch.lengths_B.sum())}


def _micro_batches(batch: Batch, size: int, workers: Workers) -> Iterator[list[int]]:
    rows = share(batch, workers.rank, workers.world)
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _measure(
    student: Student,
    teacher: Teacher | None,
    micro: Batch,
    gates_BE: torch.Tensor | None,
    value_gates: torch.Tensor | None,
    precision: str,
) -> tuple[TeacherOutput | None, Measured]:
    with torch.autocast(student.device.type, torch.bfloat16, precision == "bfloat16"):
        said = None if teacher is None else teacher(micro)
        return said, student(micro, said, gates_BE, value_gates)


def _totals(measured: Measured) -> torch.Tensor:
    """By `PARTS`, float64; 0 of a part that was not measured."""
    parts = {**measured.parts, "entropy": measured.entropy}
    values = [float(parts[name].total.detach()) if name in parts else 0.0 for name in PARTS]
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Workers:
    """The process group that this process belongs to.

    Attributes
    ----------
    rank, world : int
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def found(cls) -> Workers:
        """The initialised process group, or this process alone."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum each tensor over all workers, in place."""
        if self.world > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def agree(self, value: int, device: torch.device) -> bool:
        """Whether all have the same number."""
        if self.world == 1:
            return True
        ends = torch.tensor([value, -value], device=device)
        distributed.all_reduce(ends, distributed.ReduceOp.MAX)
        return int(ends[0]) == -int(ends[1])

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            distributed.barrier()


TRAINED = ("kl", "ce", "hidden")


def loss_of(sums: Sums, routed: Routed | None, weights: LossWeights) -> float:
    """The whole loss: all parts by their weights, the router's own among them."""
    parts = [getattr(weights, name) * sums.mean(name) for name in TRAINED if name in sums.counts]
    return math.fsum(parts) + (0.0 if routed is None else float(routed.loss.detach()))


def load_of(routed: Routed | None) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Samples that chose each expert, int64 [E]; None without a router, or while all experts are on."""
    if routed is None or bool(routed.active_BE.all()):
        return None
    load: np.ndarray[Any, np.dtype[np.int64]] = routed.load_E.cpu().numpy()
    return load


def active_experts(routed: Routed | None, config: Any) -> torch.Tensor:
    """Experts that were on for any sample, bool [E]; without a router those of the stated rule."""
    if routed is not None:
        return routed.active_BE.any(0).cpu()
    active_E = torch.zeros(config.experts, dtype=torch.bool)
    active_E[config.chosen_experts] = True
    return active_E


def sparsity(routed: Routed, sizes: list[int]) -> dict[str, float]:
    """Experts and expert weights that a token runs through, mean over samples; the core counted among the weights."""
    sizes_G = torch.tensor(sizes, dtype=torch.float64)
    active_BE = routed.active_BE.cpu().double()
    weights = float((active_BE @ sizes_G[:-1]).mean() + sizes_G[-1])
    return {"active_experts": float(active_BE.sum(1).mean()), "active_weights": weights}
