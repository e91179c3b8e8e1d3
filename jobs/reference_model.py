"""The reference model: its recipe, its loss, its optimizers and its export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM


@dataclass(frozen=True)
class Recipe:
    """What the weights are a function of, beside the corpus."""

    steps: int
    batch: int = 8
    length: int = 512
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    warmup: int = 100
    decay_share: float = 0.45
    tail: int = 260
    weight_decay: float = 0.1
    seed: int = 7

    @property
    def stable(self) -> int:
        """Step at which the decay begins; up to here a run is the same whatever its number of steps."""
        return round((self.steps - self.tail) * (1 - self.decay_share))

    def rate(self, step: int) -> float:
        """Factor on the learning rates: warm-up, a plateau, half a cosine down to zero, and a tail at 0.01."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if step < self.stable:
            return 1.0
        if step >= self.steps - self.tail:
            return 0.01
        return 0.5 * (1 + math.cos(math.pi * (step - self.stable) / (self.steps - self.tail - self.stable)))


def build_model(vocabulary: int, seed: int) -> Qwen2ForCausalLM:
    """The untrained model."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=704, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
        initializer_range=0.02, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    # At 512 tokens on a CPU the fused kernel's backward pass is slower than compiled matrix products.
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="eager")
    # What is added to the residual stream starts smaller, by the number of additions.
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    return model


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for embedding, head and vectors, of which it decays none.

    Each parameter group keeps its full learning rate as `peak`.
    """
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    matrices = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(inner, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(outer, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


class Loss(nn.Module):
    """Mean cross entropy in nats of token rows ``[batch, length + 1]``; a module, to compile as a whole."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTC = self.model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
        logits_NV = self.model.lm_head(hidden_BTC).flatten(0, 1)
        return functional.cross_entropy(logits_NV.float(), ids_BT[:, 1:].flatten())


def loss_of(loss: nn.Module, rows: NDArray[np.int32]) -> torch.Tensor:
    """Loss of rows under BF16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        result: torch.Tensor = loss(torch.from_numpy(rows.astype(np.int64)))
    return result


def export(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Write the weights in BF16 as a `transformers` checkpoint."""
    copy = Qwen2ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(eos_token_id=[0, 2], pad_token_id=0, max_new_tokens=256)
    copy.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone
