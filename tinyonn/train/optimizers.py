"""The optimizers of a model's parts, their learning rates, and their state as plain tensors.

| part | parameters | optimizer |
|---|---|---|
| router.matrices | the router's matrices | Muon |
| router.rest | its vectors and convolutions | AdamW, vectors without decay |
| experts | ``values`` of sparse layers | AdamW or Muon by group of weights, or frozen |
| trunk.matrices | embeddings, head, and all matrices of a model without experts | frozen, or AdamW |
| trunk.vectors | norms and biases | frozen, or AdamW without decay |

The factor of all rates at the step after ``s`` others, warmup-stable-decay (Hu et al. 2024, MiniCPM, section 4):

    factor(s) = (s + 1) / warmup                    s < warmup
              = 1                                   s < steps - decay
              = floor + (1 - floor) * (1 - p)       p = (s - (steps - decay)) / decay, in [0, 1)

`transformers.get_wsd_schedule` begins with a step of rate 0 and wraps one optimizer, and
`torch.nn.utils.clip_grad_norm_` adds squares in float32 and 1e-6 to the norm: other bits, so neither is used.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from tinyonn.errors import InputError
from tinyonn.train.expert_optimizers import SparseAdamW, SparseMuon, expert_layers
from tinyonn.train.options import OptimizerOptions


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
    """Set every learning rate to its peak times the schedule's factor, or to what is given for it."""
    found, known = {}, given or {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            name = group["name"]
            group["lr"] = found[name] = known.get(name.partition(".")[0], group["peak"] * factor)
    return found


def state_tensors(optimizers: Sequence[Optimizer]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What the optimizers know, for a checkpoint."""
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
    """Bring optimizers into the state that `state_tensors` took, bit for bit."""
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


@dataclass(frozen=True)
class Clipped:
    """What became of the gradients.

    Attributes
    ----------
    norm : float
        Before clipping; nan or inf if any gradient is.
    scale : float
        That all gradients were multiplied by, 1 if they were within the limit.
    """

    norm: float
    scale: float

    @property
    def finite(self) -> bool:
        """Whether every gradient is a number."""
        return self.norm < float("inf")


def clip_gradients(parameters: Iterable[torch.Tensor], limit: float | None) -> Clipped:
    """Scale gradients together, in place, so that their joint norm is at most `limit`.

    Pascanu et al. 2013, algorithm 1. The norm is summed in float64, in the order of the parameters, so that it neither
    overflows nor depends on their sizes.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return Clipped(0.0, 1.0)
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
    norm = float(torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms])))
    if limit is None or not limit < norm < float("inf"):
        return Clipped(norm, 1.0)
    scale = limit / norm
    for grad in grads:
        grad.mul_(scale)
    return Clipped(norm, scale)


def first_non_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first parameter whose gradient is not finite; None if there is none."""
    for name, parameter in named:
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return name
    return None


class SpikeWatch:
    """Tells norms (or losses) that stand out from the last ones.

    Parameters
    ----------
    factor : float
        A spike is above `factor` times the median of the window.
    window : int
        Values looked back on; while there are fewer than a quarter of it, nothing is a spike.
    """

    def __init__(self, factor: float = 10.0, window: int = 64) -> None:
        self.factor, self.window = factor, window
        self._last: deque[float] = deque(maxlen=window)

    def observe(self, value: float) -> bool:
        """Whether the value is a spike; it joins the window in any case, unless it is not finite (always a spike)."""
        if not abs(value) < float("inf"):
            return True
        ready = len(self._last) >= max(1, self.window // 4)
        spike = ready and value > self.factor * statistics.median(self._last)
        self._last.append(value)
        return spike

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {"last": torch.tensor(list(self._last), dtype=torch.float64)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint."""
        self._last = deque(state["last"].tolist(), maxlen=self.window)


@dataclass(frozen=True)
class Schedule:
    """Warmup-stable-decay, a pure function of the step.

    Attributes
    ----------
    steps : int
        Of the whole training.
    warmup, decay : int
        Steps at its beginning and end.
    floor : float
        Factor at the end of the decay, 0..1.

    Raises
    ------
    InputError
        Phases that do not fit into the steps, or a floor out of range.
    """

    steps: int
    warmup: int = 0
    decay: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if min(self.steps, self.warmup, self.decay) < 0 or self.warmup + self.decay > self.steps:
            raise InputError(
                f"{self.warmup} steps of warmup and {self.decay} of decay do not fit into {self.steps} steps; "
                "shorten them, or train longer"
            )
        if not 0 <= self.floor <= 1:
            raise InputError(f"the floor of the learning rate is {self.floor}; give a factor from 0 to 1")

    @classmethod
    def of_shares(
        cls,
        steps: int,
        warmup: float = 0.05,
        decay: float = 0.2,
        floor: float = 0.0,
    ) -> Schedule:
        """A schedule whose phases are given as shares of the steps."""
        first = round(steps * warmup)
        return cls(steps, first, min(round(steps * decay), max(steps - first, 0)), floor)

    def factor(self, step: int) -> float:
        """Of the peak learning rate at a step, which counts from 0; above 0 before `steps`, `floor` from there on."""
        if step < 0:
            raise InputError(f"step {step} is before the first, 0")
        if step < self.warmup:
            return (step + 1) / self.warmup
        start = self.steps - self.decay
        if step < start:
            return 1.0
        if step >= self.steps:
            return self.floor if self.decay else 1.0
        passed = (step - start) / self.decay
        return self.floor + (1 - self.floor) * (1 - passed)
