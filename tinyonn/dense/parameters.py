"""The list of every scalar parameter of a model, and of the places where each meets its input.

Whatever is recorded is one of these operations on a module's input:

=============  ===========================================================  ==========================
operation      modules                                                      weight's shape
=============  ===========================================================  ==========================
``linear``     ``nn.Linear``, ``Linear4bit`` of bitsandbytes, ``NF4Linear``  [out, in]
``conv1d``     ``transformers`` ``Conv1D`` (GPT-2), not quantized           [in, out]
``embedding``  ``nn.Embedding``; a subclass that scales its output, or      [vocabulary, width]
               reads other rows than its input says (positions of OPT)
``rms_norm``   ``*RMSNorm*``: ``x / rms(x)`` times ``w`` or ``1 + w``       [width]
``layer_norm`` ``nn.LayerNorm``, ``*LayerNorm*``: the same less the mean    [width]
``bias``       the bias of any of these; its input is the constant 1        [out]
=============  ===========================================================  ==========================

NF4 turns a ``Conv1D`` into a ``Linear4bit`` and transposes its weight on the way, so GPT-2's tensors are
listed as [in, out] without quantization and as [out, in] with it: as they are in the loaded model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from tinyonn.errors import InputError

if TYPE_CHECKING:  # readers of a store need `Parameter` alone and should not wait for Torch
    import torch

SUPPORTED = (
    "nn.Linear, Linear4bit, Conv1D, nn.Embedding (also with a scaled output or an offset), RMSNorm, LayerNorm "
    "and their biases"
)
KINDS = {
    "linear": "linear",
    "conv1d": "linear",
    "embedding": "embedding",
    "rms_norm": "norm",
    "layer_norm": "norm",
}


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor.

    Attributes
    ----------
    name : str
        Name in the model's ``named_parameters()``; a tied tensor goes by its first name.
    shape : tuple of int
        The tensor's own shape, before any packing by quantization.
    layer : int or None
        Index of the decoder layer; None outside the layers.
    kind : str
        How the tensor meets its input: ``linear``, ``embedding``, ``norm`` or ``bias``.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    kind: str

    @property
    def size(self) -> int:
        """Number of scalar weights."""
        return prod(self.shape)

    @property
    def role(self) -> str:
        """Name of the module that owns the tensor, without its path: ``q_proj``, ``embed_tokens``."""
        return self.name.split(".")[-2] if "." in self.name else self.name


def kind_of(parameter: Parameter) -> str:
    """Kind of module: ``embedding``, ``head``, ``norm``, ``bias``, or a linear layer's own name such as ``q_proj``."""
    if parameter.kind != "linear":
        return parameter.kind
    return "head" if parameter.layer is None else parameter.role


@dataclass(frozen=True)
class Use:
    """One place where a parameter meets an input. A tied tensor has several.

    Attributes
    ----------
    parameter_name : str
        The `Parameter`'s name; for a tied tensor its first name.
    module_name : str
        Path of the module in the model.
    module : torch.nn.Module
        The module itself, for hooks.
    operation : str
        ``linear``, ``conv1d``, ``embedding``, ``rms_norm``, ``layer_norm`` or ``bias``.
    scale : float
        Factor on an embedding's output (Gemma: root of the width): ``output = scale * weight[ids]``. Else 1.
    eps : float
        Added to a norm's mean square or variance. Else 0.
    """

    parameter_name: str
    module_name: str
    module: torch.nn.Module
    operation: str
    scale: float = 1.0
    eps: float = 0.0


def list_parameters(model: torch.nn.Module) -> list[Parameter]:
    """List every parameter tensor, in model order, tied tensors once.

    Parameters
    ----------
    model : torch.nn.Module
        Loaded, quantized or on the meta device.

    Raises
    ------
    InputError
        Names each module that is not supported.
    """
    uses = list_uses(model)
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, str] = {}
    for use in uses:
        shapes.setdefault(use.parameter_name, _shape(use))
        kinds.setdefault(use.parameter_name, KINDS.get(use.operation, use.operation))
    order = [name for name, _ in model.named_parameters()]
    return [Parameter(name, shapes[name], _layer(name), kinds[name]) for name in order]


def list_uses(model: torch.nn.Module) -> list[Use]:
    """List every place where a parameter meets an input, in module order, weight before bias.

    Each kind of norm and of embedding is tried on a small input, with random weights where the model has none yet,
    so that a class whose name fits and whose arithmetic does not is refused rather than recorded wrongly.

    Raises
    ------
    InputError
        Names each module that is not supported, its parameter and what is supported.
    """
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    uses: list[Use] = []
    refused: dict[str, str] = {}
    tried: set[tuple[type, int]] = set()
    for module_name, module in model.named_modules():
        for tensor_name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            operation = _operation(module)
            reason = _reason(module, operation, tensor_name, tensor)
            key = (type(module), tensor.shape[-1])
            if reason is None and tensor_name == "weight" and key not in tried:
                tried.add(key)
                if not _behaves(module, operation or ""):
                    reason = f"does not compute a plain {operation}"
            if reason is not None:
                path = f"{module_name}.{tensor_name}"
                kind = type(module).__name__
                refused.setdefault(kind, f"{path} {list(tensor.shape)} of {kind} ({reason})")
                continue
            name = names[id(tensor)]
            if tensor_name == "bias":
                uses.append(Use(name, module_name, module, "bias"))
            else:
                assert operation is not None
                uses.append(Use(name, module_name, module, operation, _scale(module), _eps(module)))
    if refused:
        what = "; ".join(list(refused.values())[:4])
        raise InputError(
            f"{type(model).__name__} has {len(refused)} kind(s) of modules that cannot be recorded: {what}. "
            f"Supported: {SUPPORTED}. Choose a dense model, such as Qwen2, Qwen3, Llama, Mistral or Gemma."
        )
    return uses


def _operation(module: torch.nn.Module) -> str | None:
    import torch
    from transformers.pytorch_utils import Conv1D

    kind = type(module)
    quantized = kind.__name__ in ("Linear4bit", "NF4Linear") and isinstance(module, torch.nn.Linear)
    if kind is torch.nn.Linear or quantized:
        return "linear"
    if kind is Conv1D:
        return "conv1d"
    if isinstance(module, torch.nn.Embedding) and module.max_norm is None:
        return "embedding"
    if hasattr(module, "variance_epsilon") or hasattr(module, "eps"):
        if "RMSNorm" in kind.__name__:
            return "rms_norm"
        if "LayerNorm" in kind.__name__:
            return "layer_norm"
    return None


def _reason(module: torch.nn.Module, operation: str | None, name: str, tensor: torch.Tensor) -> str | None:
    if tensor.ndim > 2:
        return f"a fused tensor of {tensor.ndim} dimensions, as of mixture-of-experts layers"
    if operation is None:
        return "an unknown kind of module"
    if name not in ("weight", "bias"):
        return f"a parameter named {name!r} beside weight and bias"
    wanted = 1 if name == "bias" or operation in ("rms_norm", "layer_norm") else 2
    if tensor.ndim != wanted:
        return f"{tensor.ndim} dimensions, {wanted} expected"
    return None


def _behaves(module: torch.nn.Module, operation: str) -> bool:
    import torch

    if operation not in ("embedding", "rms_norm", "layer_norm"):
        return True
    if type(module) in (torch.nn.Embedding, torch.nn.LayerNorm):
        return True
    trial = _trial(module)
    if trial is None:
        return True
    weight = trial.get_parameter("weight").detach()
    with torch.no_grad():
        try:
            if operation == "embedding":
                ids = torch.arange(4, device=weight.device)[None]
                got = type(module).forward(trial, ids)
                wanted = [_scale(module) * weight[looked_up(trial, (ids,), {})].float()]
            else:
                inputs, wanted = _normed(trial, operation)
                got = type(module).forward(trial, inputs)
        except Exception:  # of the class's own code: a gated norm wants a second input, for one
            return False
    if not isinstance(got, torch.Tensor):
        return False
    return any(torch.allclose(got.float(), option, rtol=0.03, atol=1e-3) for option in wanted)


def _trial(module: torch.nn.Module) -> torch.nn.Module | None:
    """The module, or of one on the meta device a copy with few random weights; None where that cannot be made."""
    import torch

    if not module.get_parameter("weight").is_meta:
        return module
    generator = torch.Generator().manual_seed(0)
    trial: Any = copy.copy(module)
    trial.padding_idx = None  # it may lie behind these few rows
    trial._parameters = {
        name: None if tensor is None else torch.nn.Parameter(
            0.5 + torch.randn(min(64, tensor.shape[0]) if tensor.ndim > 1 else tensor.shape[0], *tensor.shape[1:],
                              generator=generator), requires_grad=False)
        for name, tensor in module._parameters.items()
    }  # fmt: skip
    known = {"embed_scale": getattr(module, "scalar_embed_scale", None)}
    trial._buffers = {
        name: torch.tensor(known[name]) if known.get(name) is not None else tensor
        for name, tensor in module._buffers.items()
    }
    return None if any(tensor is not None and tensor.is_meta for tensor in trial._buffers.values()) else trial


def _normed(module: torch.nn.Module, operation: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """An input, and what a norm may make of it. Its mean is not 0, which tells the two kinds from one another."""
    import torch

    weight = module.get_parameter("weight").detach()
    generator = torch.Generator().manual_seed(0)
    noise = 0.5 + torch.randn(1, 4, weight.shape[0], generator=generator)
    inputs = noise.to(weight.device, weight.dtype)
    wide = inputs.float()
    if operation == "layer_norm":
        wide = wide - wide.mean(-1, keepdim=True)
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _eps(module))
    bias = getattr(module, "bias", None)
    shift = bias.float() if isinstance(bias, torch.Tensor) else 0.0
    return inputs, [unit * weight.float() + shift, unit * (1 + weight.float()) + shift]


def looked_up(module: torch.nn.Module, inputs: Sequence[Any], options: Mapping[str, Any]) -> torch.Tensor:
    """Rows of its table that a call of an embedding reads, int64, of any subclass that only looks up and scales.

    Parameters
    ----------
    module : torch.nn.Embedding
    inputs, options : sequence, mapping
        Of the call: token ids, or what a subclass makes its rows from (OPT's positions come from the attention mask).
    """
    import torch

    if type(module).forward is torch.nn.Embedding.forward and inputs:
        ids: torch.Tensor = inputs[0]
        return ids
    weight = module._parameters["weight"]
    assert weight is not None
    numbers = torch.arange(weight.shape[0], dtype=torch.float32, device=weight.device)[:, None]
    module._parameters["weight"] = numbers  # type: ignore[assignment]
    try:
        with torch.no_grad():
            found: torch.Tensor = type(module).forward(module, *inputs, **options)
    finally:
        module._parameters["weight"] = weight
    return (found[..., 0] / _scale(module)).round().long()


def _scale(module: torch.nn.Module) -> float:
    import torch

    if not isinstance(module, torch.nn.Embedding) or type(module) is torch.nn.Embedding:
        return 1.0
    scale: Any = getattr(module, "embed_scale", 1.0)
    if isinstance(scale, torch.Tensor):
        scale = module.scalar_embed_scale if scale.is_meta else scale.item()
        return float(torch.tensor(scale).to(module.weight.dtype))
    return float(scale if isinstance(scale, (int, float)) else 1.0)


def _eps(module: torch.nn.Module) -> float:
    import torch

    if _operation(module) not in ("rms_norm", "layer_norm"):
        return 0.0
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(torch.finfo(torch.float32).eps if eps is None else eps)


def _shape(use: Use) -> tuple[int, ...]:
    import torch

    if use.operation == "bias":
        return tuple(use.module.get_parameter("bias").shape)
    if use.operation == "linear":
        assert isinstance(use.module, torch.nn.Linear)
        return (
            use.module.out_features,
            use.module.in_features,
        )  # a packed NF4 tensor's own shape is not this
    return tuple(use.module.get_parameter("weight").shape)


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
