"""What must hold before the first step: model, teacher and options fit, and what is trained is held in float32."""

from __future__ import annotations

from typing import Any

import torch

from tinyonn.errors import InputError
from tinyonn.train.options import TrainOptions
from tinyonn.train.routing import ProfileTargets
from tinyonn.train.student import Student
from tinyonn.train.teacher import Cached, Teacher


def check_fit(
    student: Student, teacher: Teacher | None, targets: ProfileTargets | None, options: TrainOptions
) -> None:
    """Refuse what cannot be trained.

    Raises
    ------
    InputError
        A loss without what it needs, another vocabulary, more experts than there are, routing without a router.
    """
    weights = options.weights
    if teacher is None and (weights.kl > 0 or weights.hidden > 0):
        raise InputError(
            "train.loss.kl and hidden need a teacher and there is none; give one, or set both to 0"
        )
    if isinstance(teacher, Cached):
        if weights.hidden > 0:
            raise InputError(
                "train.loss.hidden needs the teacher's hidden states, which a cache does not hold; set it to 0"
            )
        if options.temperature != 1:
            raise InputError(
                f"train.temperature = {options.temperature} needs all of the teacher's logits, of which a cache "
                "holds a few; set it to 1"
            )
    vocabulary = int(student.model.get_output_embeddings().weight.shape[0])
    if teacher is not None and teacher.vocabulary < vocabulary:
        raise InputError(
            f"the teacher's head has {teacher.vocabulary} tokens and the student's {vocabulary}; "
            "train with the dense model that the student was made from"
        )
    if student.router is None:
        if options.warm_start or options.routing.ks or weights.profile > 0:
            raise InputError(
                "train.warm_start, routing.ks and loss.profile need a router and the model has none; leave them out"
            )
        return
    if (options.warm_start or weights.profile > 0) and targets is None:
        raise InputError(
            "train.warm_start and loss.profile need the profile's targets; run `tinyonn profile` first"
        )
    if targets is not None and targets.experts != student.experts:
        raise InputError(
            f"the profile is of {targets.experts} experts but the model has {student.experts}; profile this assembly"
        )
    if wrong := [k for k in options.routing.ks if not 0 <= k <= student.experts]:
        raise InputError(
            f"train.routing.ks has {wrong[0]} but there are {student.experts} experts; 0 is all of them"
        )
    top_k = student.router.top_k
    if top_k is not None and top_k > student.experts:
        raise InputError(f"top_k = {top_k} but there are {student.experts} experts; give at most as many")


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


def trained_weights(model: torch.nn.Module) -> int:
    """Scalars that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
