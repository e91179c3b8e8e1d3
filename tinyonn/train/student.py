"""The model that learns: its gates for a batch, and the losses of a batch.

    prompts -> router -> Choice(gates [B, E]) -> the model with these gates -> hidden states, logits -> loss parts

A model without a router, sparse with a static rule or any other causal language model, goes the same way without the
first two steps: baselines are trained by the same code. Loss parts are sums over tokens; who calls divides by the
tokens of the whole batch, of all micro batches and workers, so that the gradient does not depend on how samples are
dealt.

Shape suffixes: B samples, T tokens, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tinyonn.corpus.tokens import UNLABELLED
from tinyonn.dense.head import head_of
from tinyonn.dense.passes import decoder_states
from tinyonn.errors import InputError
from tinyonn.train import losses
from tinyonn.train.data import Batch
from tinyonn.train.losses import Sum
from tinyonn.train.options import LossWeights
from tinyonn.train.teacher import TeacherOutput


@dataclass(frozen=True)
class Measured:
    """Losses of some samples.

    Attributes
    ----------
    parts : dict of str to Sum
        ``kl`` and ``ce`` over counted tokens, ``hidden`` over all of them; those of weight 0 carry no gradient, and
        those that the teacher has nothing for are not there.
    entropy : Sum
        Of the predicted distributions, nats, over counted tokens.
    """

    parts: dict[str, Sum]
    entropy: Sum


class Student(nn.Module):
    """A causal language model with the losses that it is trained on.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Sparse with or without a router, or any other.
    weights : LossWeights
    temperature : float
        Of the distillation.
    prompt_loss : bool
        Labelled tokens of the prompt count too.
    """

    def __init__(
        self, model: Any, weights: LossWeights, temperature: float = 1.0, prompt_loss: bool = False
    ) -> None:
        super().__init__()
        self.model, self.head = model, head_of(model)
        self.weights, self.temperature, self.prompt_loss = weights, temperature, prompt_loss

    @property
    def router(self) -> Any:
        """Of the model; None if it has none."""
        return getattr(self.model, "router", None)

    @property
    def experts(self) -> int:
        """Of the model; 0 if it is not sparse."""
        return int(getattr(self.model.config, "experts", 0)) if hasattr(self.model, "sparse_layers") else 0

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device: torch.device = self.head.weight.device
        return device

    def route(
        self,
        batch: Batch,
        ks: int | torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
        capacity: float | None = None,
    ) -> Any:
        """Choose experts from the prompts of a batch.

        Parameters
        ----------
        batch : Batch
        ks : int or int64 [B], optional
            Experts on for each sample; None is the router's own rule.
        noise : float32 [B, E], optional
            Added to the scores.
        dropped : bool [E], optional
            Experts that cannot be chosen.
        capacity : float, optional
            No expert for more samples than so many times the even load.

        Returns
        -------
        tinyonn.model.router_tinyonn.Choice
            With gradients.
        """
        ids_BP, mask_BP = batch.prompt()
        logits = self.router.logits(ids_BP.to(self.device), mask_BP.to(self.device))
        return self.router.choose(logits, ks, noise, dropped, capacity)

    def targets(self, batch: Batch) -> torch.Tensor:
        """The token that each place predicts, int64 [B, T - 1], -100 where it does not count."""
        return batch.targets(self.prompt_loss)

    def forward(
        self,
        batch: Batch,
        teacher: TeacherOutput | None = None,
        gates: torch.Tensor | None = None,
        value_gates: torch.Tensor | None = None,
    ) -> Measured:
        """Losses of a batch.

        Parameters
        ----------
        batch : Batch
            On the student's device.
        teacher : TeacherOutput, optional
        gates : float [B, E], optional
            None is the model's own rule.
        value_gates : float [E] or [B, E], optional
            Gates that the gradients of the experts' values are taken with, in the place of `gates`.

        Raises
        ------
        InputError
            The teacher has other layers or another vocabulary.
        """
        options: dict[str, Any] = {}
        if gates is not None:
            options["gates"] = gates
        if value_gates is not None:
            options["value_gates"] = value_gates
        wants_layers = self.weights.hidden > 0 and teacher is not None and bool(teacher.hidden)
        hidden = decoder_states(self.model, batch.ids_BT, wants_layers, **options)
        targets_BT = self.targets(batch)
        counted_BT = targets_BT != UNLABELLED
        logits_TV = self.head(hidden[-1][:, :-1][counted_BT])
        labels_T = targets_BT[counted_BT]
        parts = {"ce": self._weighed(self.weights.ce, losses.cross_entropy, logits_TV, labels_T)}
        if teacher is not None:
            parts |= self._distilled(teacher, logits_TV, counted_BT)
        if wants_layers and teacher is not None:
            check_layers(hidden, teacher.hidden)
            parts["hidden"] = losses.square_head(hidden, teacher.hidden, batch.mask_BT)
        entropy = losses.token_entropy(logits_TV)
        return Measured(parts, Sum(entropy.sum(), len(labels_T)))

    def _distilled(
        self, teacher: TeacherOutput, logits_TV: torch.Tensor, counted_BT: torch.Tensor
    ) -> dict[str, Sum]:
        if teacher.indices_BTK is not None and teacher.logprobs_BTK is not None:
            indices_TK, logprobs_TK = teacher.indices_BTK[counted_BT], teacher.logprobs_BTK[counted_BT]
            return {"kl": self._weighed(self.weights.kl, losses.topk_kl, logits_TV, indices_TK, logprobs_TK)}
        if self.weights.kl == 0:
            return {}
        assert teacher.head is not None
        with torch.no_grad():
            wanted_TH = teacher.hidden[-1][:, :-1][counted_BT.to(teacher.hidden[-1].device)]
            teacher_TV = teacher.head(wanted_TH).to(logits_TV.device)
        return {"kl": losses.logit_kl(logits_TV, teacher_TV, self.temperature)}

    @staticmethod
    def _weighed(weight: float, loss: Any, *inputs: Any) -> Sum:
        """A part of weight 0 is measured, and leaves no graph."""
        with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
            found: Sum = loss(*inputs)
        return found


def total(measured: Measured, weights: LossWeights, counts: Mapping[str, int]) -> torch.Tensor:
    """Weighted sum of the parts, each divided by the count of the whole batch.

    Parameters
    ----------
    measured : Measured
    weights : LossWeights
    counts : mapping of str to int
        Part to number of terms over all micro batches and workers.
    """
    parts = [
        getattr(weights, name) * part.total / max(counts[name], 1)
        for name, part in measured.parts.items()
        if getattr(weights, name) > 0
    ]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def check_layers(student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]) -> None:
    """Raise InputError if hidden states cannot be compared layer by layer."""
    ours, theirs = (len(student), student[-1].shape[-1]), (len(teacher), teacher[-1].shape[-1])
    if ours != theirs:
        raise InputError(
            f"the student has {ours[0]} layers of width {ours[1]} and the teacher {theirs[0]} of {theirs[1]}, so "
            "hidden states cannot be compared; set train.loss.hidden to 0"
        )


@torch.no_grad()
def cause_of(
    student: Student, teacher: TeacherOutput | None, batch: Batch, gates: torch.Tensor | None, precision: str
) -> str:
    """Say which part of a step brought in the first number that is not finite."""
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


def prepare_model(model: Any, precision: str, checkpointing: bool) -> None:
    """Bring a model into the state that it is trained in, in place; parameters stay the same objects.

    What is trained is held in float32, all of it with ``precision: float32``. The model is in evaluation mode, so that
    no dropout draws random numbers. Optimizers must have been built: they say what is trained. What norms and
    embeddings with float32 masters give is brought to the type of the rest under autocast, as in the model that is
    saved: else every linear layer behind a norm would make and keep a copy of its own.
    """
    model.eval()
    if hasattr(model, "forget"):
        model.forget()
    for parameter in model.parameters():
        if parameter.requires_grad or precision == "float32":
            parameter.data = parameter.data.float()
    if precision == "float32":
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.float()
    else:
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            learns = any(parameter.requires_grad for parameter in own) and "router" not in name.split(".")
            if learns and (isinstance(module, torch.nn.Embedding) or all(one.dim() < 2 for one in own)):
                module.register_forward_hook(_as_autocast)
    if checkpointing:
        _checkpoint_layers(model)


def _as_autocast(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor) and output.dtype == torch.float32:
        kind = output.device.type
        if torch.is_autocast_enabled(kind):
            return output.to(torch.get_autocast_dtype(kind))
    return output


def _checkpoint_layers(model: Any) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # layers checkpoint in training only; what is inside stays in evaluation
