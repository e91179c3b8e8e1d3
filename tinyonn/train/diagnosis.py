"""What was not a number first, when a loss is not."""

from __future__ import annotations

from typing import Any

import torch

from tinyonn.dense.passes import decoder_states
from tinyonn.train.data import Batch
from tinyonn.train.student import Student
from tinyonn.train.teacher import TeacherOutput


@torch.no_grad()
def cause_of(
    student: Student, teacher: TeacherOutput | None, batch: Batch, gates: torch.Tensor | None, precision: str
) -> str:
    """Say which part of a step brought in the first number that is not finite.

    Parameters
    ----------
    student : Student
    teacher : TeacherOutput, optional
        Of the batch.
    batch : Batch
        On the student's device.
    gates : float [B, E], optional
    precision : str
        As of `TrainOptions`.

    Returns
    -------
    str
        Such as ``layer 3 of the student is not finite (samples 17, 21)``.
    """
    where = f"(samples {', '.join(str(index) for index in batch.indexes)})"
    if teacher is not None:
        for number, hidden in enumerate(teacher.hidden):
            if not _finite(hidden, batch):
                return f"layer {number} of the teacher is not finite {where}"
    if gates is not None and not bool(gates.isfinite().all()):
        return f"the router's gates are not finite {where}"
    if lost := weight_not_finite(student.model):
        return lost
    options: dict[str, Any] = {} if gates is None else {"gates": gates}
    with torch.autocast(batch.ids_BT.device.type, torch.bfloat16, precision == "bfloat16"):
        for number, hidden in enumerate(decoder_states(student.model, batch.ids_BT, **options)):
            if not _finite(hidden, batch):
                return f"layer {number} of the student is not finite {where}"
    return f"the student's logits or loss are not finite {where}"


def weight_not_finite(model: torch.nn.Module) -> str | None:
    """Say which weight is not finite; None if all are."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the weight {name} is not finite"
    return None


def _finite(hidden: torch.Tensor, batch: Batch) -> bool:
    own = batch.mask_BT.to(hidden.device)
    return bool(hidden[own].isfinite().all())
