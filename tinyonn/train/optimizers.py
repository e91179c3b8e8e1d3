"""The optimizers of a model's parts, their learning rates, and their state as plain tensors.

| part | parameters | optimizer |
|---|---|---|
| router.matrices | the router's matrices | Muon |
| router.rest | its vectors and convolutions | AdamW, vectors without decay |
| experts | ``values`` of sparse layers | AdamW or Muon by group of weights, or frozen |
| trunk.matrices | embeddings, head, and all matrices of a model without experts | frozen, or AdamW |
| trunk.vectors | norms and biases | frozen, or AdamW without decay |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from tinyonn.errors import InputError
from tinyonn.train.clipping import Clipped, SpikeWatch, clip_gradients, first_non_finite
from tinyonn.train.expert_optimizers import SparseAdamW, SparseMuon, expert_layers

__all__ = [
    "Clipped",
    "OptimizerOptions",
    "SpikeWatch",
    "build_optimizers",
    "clip_gradients",
    "first_non_finite",
    "load_state_tensors",
    "set_rates",
    "state_tensors",
]

Rule = Literal["adamw", "muon", "frozen"]


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """What is trained by which rule.

    Attributes
    ----------
    router : {"muon", "adamw", "frozen"}
        Rule of the router's matrices; the rest of it goes by AdamW, or is frozen too.
    router_lr : float
        Peak learning rate of the whole router after the warm start; 0 holds it as that left it. Muon's updates have
        AdamW's size (Liu et al. 2025), so one rate does.
    router_decay : float
        Weight decay of matrices and convolutions.
    experts : {"adamw", "muon", "frozen"}
    experts_lr, experts_decay : float
    trunk_lr, trunk_decay : float
        Of the trunk's matrices, which are embeddings and head, by AdamW; a rate of 0 freezes them.
    norms_lr : float
        Of norms and biases by AdamW; 0 freezes them.
    betas : (float, float)
        AdamW's.
    momentum : float
        Muon's.
    """

    router: Rule = "muon"
    router_lr: float = 0.0
    router_decay: float = 0.01
    experts: Rule = "muon"
    experts_lr: float
    experts_decay: float = 0.0
    trunk_lr: float
    trunk_decay: float = 0.0
    norms_lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95

    def __post_init__(self) -> None:
        rates = ("router_lr", "experts_lr", "trunk_lr", "norms_lr")
        for name in (*rates, "router_decay", "experts_decay", "trunk_decay"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} is {value}; give a number from 0 on")
        for name in ("router", "experts"):
            if getattr(self, name) not in ("adamw", "muon", "frozen"):
                raise InputError(f"{name} is {getattr(self, name)!r}; use adamw, muon or frozen")
        for name, value in (
            ("betas[0]", self.betas[0]),
            ("betas[1]", self.betas[1]),
            ("momentum", self.momentum),
        ):
            if not 0 <= value < 1:
                raise InputError(f"{name} is {value}; it lies from 0 to below 1")


def build_optimizers(model: nn.Module, options: OptimizerOptions) -> list[Optimizer]:
    """Optimizers of what is trained; freezes the rest.

    Parameters
    ----------
    model : module
        On its device, with float32 parameters where they are trained. ``requires_grad`` of every parameter is set.
    options : OptimizerOptions

    Returns
    -------
    list of Optimizer
        Every param group has a ``name`` (see the module's table), ``param_names`` and its ``peak`` learning rate.

    Raises
    ------
    InputError
        Nothing would be trained, or this Torch has no Muon.
    """
    layers = list(expert_layers(model))
    values = {id(layer.values) for _, layer in layers}
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {
        "router.matrices": [], "router.rest": [], "router.vectors": [], "trunk.matrices": [], "trunk.vectors": [],
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if id(parameter) in values:
            parameter.requires_grad_(options.experts != "frozen")
            continue
        of_router = "router" in name.split(".")
        kind = "vectors" if parameter.dim() < 2 else "matrices"
        trunk_lr = options.norms_lr if kind == "vectors" else options.trunk_lr
        parameter.requires_grad_(options.router != "frozen" if of_router else trunk_lr > 0)
        if not parameter.requires_grad:
            continue
        if of_router and kind == "matrices" and (parameter.dim() > 2 or options.router == "adamw"):
            kind = "rest"
        parts[f"{'router' if of_router else 'trunk'}.{kind}"].append((name, parameter))

    optimizers: list[Optimizer] = []
    if parts["router.matrices"]:
        optimizers.append(_muon(parts["router.matrices"], options))
    decays = {
        "router.rest": (options.router_lr, options.router_decay),
        "router.vectors": (options.router_lr, 0.0),
        "trunk.matrices": (options.trunk_lr, options.trunk_decay),
        "trunk.vectors": (options.norms_lr, 0.0),
    }
    plain = [
        {"params": parts[name], "name": name, "lr": lr, "weight_decay": decay}
        for name, (lr, decay) in decays.items()
        if parts[name]
    ]
    if plain:
        optimizers.append(AdamW(plain, betas=options.betas))
    if layers and options.experts != "frozen":
        optimizers.append(_of_experts(layers, options))
    if not optimizers:
        raise InputError(
            "nothing would be trained: router, experts and trunk are all frozen or not there; "
            "set a rule for experts, trunk_lr or norms_lr"
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = float(group["lr"])
    return optimizers


def _muon(named: list[tuple[str, nn.Parameter]], options: OptimizerOptions) -> Optimizer:
    rule = getattr(torch.optim, "Muon", None)
    if rule is None:
        raise InputError(
            f"torch {torch.__version__} has no Muon; install torch 2.9 or newer, or set the router's rule to adamw"
        )
    made: Optimizer = rule(
        [{"params": named, "name": "router.matrices"}],
        lr=options.router_lr,
        weight_decay=options.router_decay,
        momentum=options.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return made


def _of_experts(layers: list[Any], options: OptimizerOptions) -> Optimizer:
    made: Optimizer
    if options.experts == "muon":
        made = SparseMuon(layers, options.experts_lr, options.momentum, weight_decay=options.experts_decay)
    else:
        made = SparseAdamW(layers, options.experts_lr, options.betas, weight_decay=options.experts_decay)
    made.param_groups[0]["name"] = "experts"
    return made


def set_rates(
    optimizers: Sequence[Optimizer], factor: float, given: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Set every learning rate to its peak times the schedule's factor, or to what is given for it.

    Parameters
    ----------
    optimizers : sequence of Optimizer
    factor : float
    given : mapping, optional
        Rates by the first part of the param group's name: ``{"router": 3e-3}``.

    Returns
    -------
    dict
        Name of the param group -> learning rate.
    """
    found, known = {}, given or {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            name = group["name"]
            group["lr"] = found[name] = known.get(name.partition(".")[0], group["peak"] * factor)
    return found


def state_tensors(optimizers: Sequence[Optimizer]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What the optimizers know, for a checkpoint.

    Returns
    -------
    tensors : dict
        ``<param group>/<parameter>/<field>`` -> tensor, on the CPU, a copy.
    settings : dict
        Param group -> its hyperparameters and names of parameters, for JSON.
    """
    tensors: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            settings[group["name"]] = {key: value for key, value in group.items() if key != "params"}
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                for field, value in optimizer.state.get(parameter, {}).items():
                    copy = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
                    tensors[f"{group['name']}/{name}/{field}"] = copy
    return tensors, settings


def load_state_tensors(
    optimizers: Sequence[Optimizer], tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> None:
    """Bring optimizers into the state that `state_tensors` took, bit for bit.

    Parameters
    ----------
    optimizers : sequence of Optimizer
        Built for the same model by the same options.
    tensors, settings : mapping

    Raises
    ------
    InputError
        Other parts, other parameters or other shapes; nothing has been changed then.
    """
    built = {group["name"]: group for optimizer in optimizers for group in optimizer.param_groups}
    if built.keys() != settings.keys():
        raise InputError(
            f"the checkpoint trains {', '.join(sorted(settings))} but this run {', '.join(sorted(built))}; "
            "resume with the options that it was started with"
        )
    for name, group in built.items():
        if list(settings[name]["param_names"]) != list(group["param_names"]):
            raise InputError(
                f"the checkpoint's parameters of {name} are others than this model's; "
                "resume with the assembly that it was started with"
            )
    found = _sorted_out(built, tensors)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key, value in settings[group["name"]].items():
                if key != "param_names":
                    group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                optimizer.state.pop(parameter, None)
                if fields := found.get((group["name"], name)):
                    optimizer.state[parameter] = fields


def _sorted_out(
    built: Mapping[str, dict[str, Any]], tensors: Mapping[str, torch.Tensor]
) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """State of every parameter, on its device."""
    known = {
        (part, name): parameter
        for part, group in built.items()
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        part, name, field = key.split("/")
        parameter = known.get((part, name))
        if parameter is None:
            raise InputError(f"the checkpoint holds {key}, of which this run has no parameter")
        if field != "step" and value.shape != parameter.shape:
            raise InputError(
                f"the checkpoint's {key} is {list(value.shape)} but the parameter is {list(parameter.shape)}; "
                "resume with the assembly that it was started with"
            )
        device = "cpu" if field == "step" else parameter.device
        found.setdefault((part, name), {})[field] = value.to(device, copy=True)
    return found
