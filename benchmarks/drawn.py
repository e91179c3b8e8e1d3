"""Sparse experts with random groups: a dense model's weights cut by chance, for benchmarks of speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tinyonn.experts import TinyONNConfig, TinyONNForCausalLM
from tinyonn.model.sparse_tinyonn import ExpertMatrix

KEPT, CORE = 0.315, 0.5


def random_matrix(shape: tuple[int, int], share: float, device: torch.device | None = None) -> ExpertMatrix:
    """One group of entries drawn evenly."""
    out, inputs = shape
    keep = torch.rand(shape, device=device) < share
    values = torch.randn(int(keep.sum()), device=device).bfloat16()
    columns = torch.arange(inputs, device=device).to(torch.int16).expand(shape)[keep].view(torch.uint16)
    pointer = functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    return ExpertMatrix(values, columns, pointer, out, inputs)


def drawn(dense: Any, experts: int) -> TinyONNForCausalLM:
    """The dense model's weights, of which some are dropped and each other one is in a random group."""
    head = dense.get_output_embeddings()
    weights = {
        name: module.weight.detach()
        for name, module in dense.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    parts = {name: compress(W_OI, experts) for name, W_OI in weights.items()}
    config = TinyONNConfig(
        base_config=dense.config.to_dict(),
        experts=experts,
        sparse_layers={
            name: {"out": W_OI.shape[0], "in": W_OI.shape[1], "entries": parts[name]["values"].numel()}
            for name, W_OI in weights.items()
        },
    )
    with _dtype(dense.dtype), torch.device(head.weight.device):
        model = TinyONNForCausalLM(config)
    state = {f"base.{name}": tensor for name, tensor in dense.state_dict().items()}
    for name, part in parts.items():
        del state[f"base.{name}.weight"]
        state |= {f"base.{name}.{field}": tensor for field, tensor in part.items()}
    model.load_state_dict(state)
    return model


@contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compress(W_OI: torch.Tensor, experts: int) -> dict[str, torch.Tensor]:
    """Values, columns and row pointer of a weight in random groups."""
    out, inputs = W_OI.shape
    group_OI = torch.randint(0, experts, W_OI.shape, device=W_OI.device)
    group_OI[torch.rand(W_OI.shape, device=W_OI.device) < CORE] = experts
    places = (torch.rand(W_OI.shape, device=W_OI.device) < KEPT).flatten().nonzero()[:, 0]
    keys = group_OI.flatten()[places] * out + places // inputs
    order = keys.argsort(stable=True)
    counts = keys.bincount(minlength=(experts + 1) * out)
    return {
        "values": W_OI.flatten()[places[order]],
        "columns": (places[order] % inputs).to(torch.uint16),
        "row_pointer": functional.pad(counts.cumsum(0), (1, 0)).int(),
    }
