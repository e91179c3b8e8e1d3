"""All that a training changes, as plain tensors: taken for a checkpoint, put back to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from tinyonn.train.checkpoint import Checkpoint
from tinyonn.train.optimizers import load_state_tensors, state_tensors
from tinyonn.train.rules import Rules


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters that learn, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def take(
    model: Any, optimizers: Sequence[Optimizer], rules: Rules
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON for `Checkpoints.save`."""
    state, settings = state_tensors(optimizers)
    tensors = {f"model/{name}": tensor for name, tensor in _changing(model).items()}
    tensors |= {f"optimizers/{name}": tensor for name, tensor in state.items()}
    tensors |= {f"rules/{name}": tensor for name, tensor in rules.state().items()}
    return tensors, {"optimizers": settings}


@torch.no_grad()
def put_back(found: Checkpoint, model: Any, optimizers: Sequence[Optimizer], rules: Rules) -> None:
    """Bring a training into the state that was taken, bit for bit.

    Raises
    ------
    InputError
        Of other parameters.
    """
    load_state_tensors(optimizers, _below("optimizers/", found.tensors), found.state["optimizers"])
    own = _changing(model)
    for name, tensor in _below("model/", found.tensors).items():
        own[name].copy_(tensor)
    rules.load_state(_below("rules/", found.tensors))


def _changing(model: Any) -> dict[str, torch.Tensor]:
    """Trained parameters, and the router's bias, which has no gradient."""
    found: dict[str, torch.Tensor] = {name: parameter.detach() for name, parameter in trained(model)}
    router = getattr(model, "router", None)
    if router is not None:
        found |= {f"router.{name}": buffer for name, buffer in router.named_buffers()}
    return found


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
