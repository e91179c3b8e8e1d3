"""Cuts any base model into experts by given or random groups, in memory or into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tinyonn.experts import TinyONNConfig, TinyONNForCausalLM

Groups = dict[str, np.ndarray[Any, np.dtype[np.uint8]]]
DROPPED = 255
UP = "model.layers.0.mlp.up_proj"


def dense_model(folder: Path, **options: Any) -> Any:
    """The base model, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def linear_layers(base: Any) -> dict[str, torch.Tensor]:
    """Weights [out, in] of every linear layer but the head."""
    head = base.get_output_embeddings()
    found = {}
    for name, module in base.named_modules():
        if isinstance(module, Conv1D):
            found[name] = module.weight.detach().T
        elif isinstance(module, torch.nn.Linear) and module is not head:
            found[name] = module.weight.detach()
    return found


def random_groups(base: Any, experts: int, kept: float = 1.0, seed: int = 0) -> Groups:
    """A group for every weight, 0..experts, the last one the core; 255 where it is dropped."""
    generator = np.random.default_rng(seed)
    groups = {}
    for name, W_OI in linear_layers(base).items():
        group = generator.integers(0, experts + 1, W_OI.shape).astype(np.uint8)
        group[generator.random(W_OI.shape) >= kept] = DROPPED
        groups[name] = group
    return groups


def compress(W_OI: torch.Tensor, group_OI: np.ndarray[Any, Any], groups: int) -> dict[str, torch.Tensor]:
    """Values, columns and row pointer of a layer."""
    out, inputs = W_OI.shape
    rows, columns = np.nonzero(group_OI != DROPPED)
    group = group_OI[rows, columns].astype(np.int64)
    order = np.lexsort((columns, rows, group))
    counts = np.bincount(group * out + rows, minlength=groups * out)
    number = np.uint16 if inputs <= 65536 else np.int32
    return {
        "values": W_OI[torch.from_numpy(rows[order]), torch.from_numpy(columns[order])].clone(),
        "columns": torch.from_numpy(columns[order].astype(number)),
        "row_pointer": torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32)),
    }


def assemble(base: Any, groups: Groups, experts: int, **options: Any) -> TinyONNForCausalLM:
    """A model of the base's weights in memory, dtype of the base; `options` are the configuration's."""
    weights = linear_layers(base)
    parts = {name: compress(weights[name], group, experts + 1) for name, group in groups.items()}
    sizes = [int(sum((group == number).sum() for group in groups.values())) for number in range(experts + 1)]
    config = TinyONNConfig(
        base_config=base.config.to_dict(),
        experts=experts,
        sparse_layers={
            name: {"out": W.shape[0], "in": W.shape[1], "entries": parts[name]["values"].numel()}
            for name, W in weights.items()
            if name in groups
        },
        expert_sizes=sizes,
        **{"assembly": {"id": "test"}, **options},
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(base.dtype)
    try:
        model = TinyONNForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    state = {f"base.{name}": tensor for name, tensor in base.state_dict().items()}
    for name, part in parts.items():
        del state[f"base.{name}.weight"]
        state |= {f"base.{name}.{field}": tensor for field, tensor in part.items()}
    model.load_state_dict(state)
    model.generation_config = base.generation_config
    model.eval()
    return model


def assembled(
    folder: Path, experts: int = 4, kept: float = 1.0, seed: int = 0, **options: Any
) -> tuple[Any, TinyONNForCausalLM]:
    """The base in a folder, and the model of its weights in random groups."""
    base = dense_model(folder)
    return base, assemble(base, random_groups(base, experts, kept, seed), experts, **options)


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def saved(model: TinyONNForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder
