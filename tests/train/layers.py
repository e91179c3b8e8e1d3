"""A small model of sparse layers with a router and a trunk, and gradients for it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import nn

from tests.model.assembled import DROPPED, compress
from tinyonn.experts import TinyONNConfig
from tinyonn.model.gates_tinyonn import Switch
from tinyonn.model.linear_tinyonn import ExpertLinear

EXPERTS = 5
GROUPS = EXPERTS + 1


def sparse_layer(
    out: int, inputs: int, kept: float = 0.6, seed: int = 0, groups: int = GROUPS, empty: int | None = None
) -> ExpertLinear:
    """Random weights in random groups; the group `empty` has none."""
    generator = np.random.default_rng(seed)
    group_OI = generator.integers(0, groups, (out, inputs)).astype(np.uint8)
    group_OI[generator.random(group_OI.shape) >= kept] = DROPPED
    if empty is not None:
        group_OI[group_OI == empty] = DROPPED
    W_OI = torch.from_numpy(generator.normal(size=(out, inputs)).astype(np.float32))
    parts = compress(W_OI, group_OI, groups)
    layer = ExpertLinear(
        out, inputs, parts["values"].numel(), groups, Switch(TinyONNConfig(experts=groups - 1))
    )
    layer.load_state_dict(parts)
    return layer


class Model(nn.Module):
    """Two sparse layers, a router with a matrix, a vector and a convolution, a norm and a head."""

    def __init__(self, seed: int = 0, kept: float = 0.6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = sparse_layer(24, 16, kept, seed, empty=3)
        self.down = sparse_layer(16, 24, kept, seed + 1)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11, bias=False)
        self.router = nn.ModuleDict({"main": nn.Linear(16, 4), "conv": nn.Conv1d(16, 16, 3, groups=16)})

    def give_gradients(self, seed: int) -> None:
        """Random ones for all that requires them, small integers so that any order of sums is exact."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.requires_grad:
                drawn = torch.randint(1, 9, parameter.shape, generator=generator)
                sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.grad = (drawn * sign).to(parameter.dtype)


def group_slices(layer: ExpertLinear) -> list[slice]:
    """Where every group's values lie, read row by row."""
    bounds = layer.row_pointer[:: layer.out_features].tolist()
    return [slice(first, last) for first, last in pairwise(bounds)]


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
