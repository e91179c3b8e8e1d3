"""The list of every scalar parameter of a model, and of the places where each meets its input.

Whatever is recorded is one of these operations on a module's input:

=============  ===========================================================  ==========================
operation      modules                                                      weight's shape
=============  ===========================================================  ==========================
``linear``     ``nn.Linear``, ``Linear4bit`` of bitsandbytes, ``NF4Linear``  [out, in]
``conv1d``     ``transformers`` ``Conv1D`` (GPT-2), not quantized           [in, out]
``embedding``  ``nn.Embedding``, and those that scale their output          [vocabulary, width]
``rms_norm``   ``*RMSNorm``: ``x / rms(x)`` times ``w`` or ``1 + w``        [width]
``layer_norm`` ``nn.LayerNorm``                                             [width]
``bias``       the bias of any of these; its input is the constant 1        [out]
=============  ===========================================================  ==========================

NF4 turns a ``Conv1D`` into a ``Linear4bit`` and transposes its weight on the way, so GPT-2's tensors are
listed as [in, out] without quantization and as [out, in] with it: as they are in the loaded model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from tinyonn.errors import InputError

if TYPE_CHECKING:  # readers of a store need `Parameter` alone and should not wait for Torch
    import torch

SUPPORTED = (
    "nn.Linear, Linear4bit, Conv1D, nn.Embedding (also with a scaled output), RMSNorm, nn.LayerNorm "
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

    On a loaded model each kind of norm and of scaled embedding is tried on a small input, so that a class
    whose name fits and whose arithmetic does not is refused rather than recorded wrongly.

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
            if reason is None and operation in ("rms_norm", "embedding"):
                key = (type(module), tensor.shape[-1])
                if key not in tried and not _behaves(module, operation or ""):
                    reason = f"does not compute a plain {operation}"
                tried.add(key)
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
    if kind is torch.nn.Embedding and module.max_norm is None:
        return "embedding"
    if isinstance(module, torch.nn.Embedding) and hasattr(module, "embed_scale") and module.max_norm is None:
        return "embedding"
    if kind is torch.nn.LayerNorm:
        return "layer_norm"
    if kind.__name__.endswith("RMSNorm") and (hasattr(module, "variance_epsilon") or hasattr(module, "eps")):
        return "rms_norm"
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

    weight = module.get_parameter("weight").detach()
    if weight.is_meta:
        return True
    # Offset inputs tell an RMS norm from one that subtracts the mean.
    with torch.no_grad():
        if operation == "embedding":
            ids = torch.arange(min(4, weight.shape[0]), device=weight.device)
            got, wanted = type(module).forward(module, ids), [_scale(module) * weight[ids].float()]
        else:
            generator = torch.Generator().manual_seed(0)
            noise = 0.5 + torch.randn(1, 4, weight.shape[0], generator=generator)
            inputs = noise.to(weight.device, weight.dtype)
            wide = inputs.float()
            unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _eps(module))
            wanted = [unit * weight.float(), unit * (1 + weight.float())]
            try:
                got = type(module).forward(module, inputs)
            except TypeError:  # a gated norm wants a second input
                return False
    if not isinstance(got, torch.Tensor):
        return False
    return any(torch.allclose(got.float(), option, rtol=0.03, atol=1e-3) for option in wanted)


def _scale(module: torch.nn.Module) -> float:
    import torch

    if not isinstance(module, torch.nn.Embedding) or type(module) is torch.nn.Embedding:
        return 1.0
    scale: Any = module.embed_scale
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
