"""Forward and backward of a step's samples, some at a time, every worker its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tinyonn.corpus.tokens import UNLABELLED
from tinyonn.train.data import Batch, share
from tinyonn.train.diagnosis import cause_of
from tinyonn.train.options import TrainOptions
from tinyonn.train.routing import Routed
from tinyonn.train.student import Measured, Student, total
from tinyonn.train.teacher import Teacher, TeacherOutput
from tinyonn.train.workers import Workers

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
    """Run this worker's samples and leave their gradients, those of the router's own losses too, in ``grad``.

    Parameters
    ----------
    student : Student
    teacher : Teacher, optional
    batch : Batch
        The whole one.
    routed : Routed, optional
        For the whole batch.
    options : TrainOptions
    workers : Workers
    value_gates : float [E], optional
        As of `Student.forward`.

    Returns
    -------
    Sums
        If anything is not finite, gradients are of no use.
    """
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
