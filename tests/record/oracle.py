"""A float64 oracle of one sample: autograd on the dequantized weights, everything held whole. Slow and plain."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from tinyonn.corpus.file import Sample
from tinyonn.dense.nf4 import dequantized, is_nf4
from tinyonn.dense.parameters import Use, list_uses, looked_up


def float64_copy(model: Any) -> Any:
    """The model with every parameter float64 and trainable, NF4 layers as plain linear ones."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if is_nf4(module):
            weight = dequantized(module)
            plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            plain.weight.data = weight
            if module.bias is not None:
                plain.bias.data = module.bias.data
            twin.set_submodule(name, plain)
    for module in twin.modules():
        module._forward_hooks.clear()
    return twin.double().requires_grad_(True)


def statistics(twin: Any, sample: Sample) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`act` and `grad` of every parameter on one sample, float64, in the parameter's own shape."""
    uses = list_uses(twin)
    inputs: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, options: Any) -> None:
            is_embedding = isinstance(module, torch.nn.Embedding)
            inputs[name] = looked_up(module, args, options) if is_embedding else args[0].detach()

        return hook

    hooks = [use.module.register_forward_pre_hook(watch(use.module_name), with_kwargs=True) for use in uses]
    twin.zero_grad()
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
    labels = torch.from_numpy(sample.labels.astype(np.int64))[None]
    twin(input_ids=ids, labels=labels).loss.backward()
    for hook in hooks:
        hook.remove()
    squares: dict[str, Any] = defaultdict(float)
    weights = dict(twin.named_parameters())
    for use in uses:
        squares[use.parameter_name] = squares[use.parameter_name] + _mean_square(use, inputs[use.module_name])
    return {
        name: (
            (weights[name].detach().abs() * torch.as_tensor(squares[name]).sqrt()).numpy(),
            weights[name].grad.abs().numpy(),
        )
        for name in squares
    }


def _mean_square(use: Use, X: torch.Tensor) -> torch.Tensor:
    """Mean square of what each weight multiplies, in a shape that broadcasts to the parameter's."""
    if use.operation == "embedding":
        vocabulary = use.module.get_parameter("weight").shape[0]
        shares = torch.bincount(X.reshape(-1), minlength=vocabulary).double() / X.numel()
        return (shares * use.scale**2)[:, None]
    if use.operation == "bias":
        return torch.ones((), dtype=torch.float64)
    X = X.reshape(-1, X.shape[-1])
    if use.operation == "linear":
        return X.square().mean(0)
    if use.operation == "conv1d":
        return X.square().mean(0)[:, None]
    if use.operation == "layer_norm":
        X = X - X.mean(-1, keepdim=True)
    return (X.square() / (X.square().mean(-1, keepdim=True) + use.eps)).mean(0)
