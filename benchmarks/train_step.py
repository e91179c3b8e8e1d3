"""A training step in which every sample has gates of its own, beside the dense model and a call for each sample.

    python benchmarks/train_step.py [--rounds 7] [--batch 8] [--tokens 256] [--threads 1] [--json]

The reference model in 100 experts of which each sample runs ten, and a core of half the weights that are kept; every
weight's expert is drawn, or an assembled model is given. A step is forward and backward with gradients of all linear
weights (ours: and of the gates), embeddings, norms and head frozen. The ways take turns and the fastest step counts:
with one thread its CPU time, from which a busy machine takes little, else wall time. BF16: all is bfloat16; masters:
linear weights in float32 under autocast. The peer calls `gated_linear` once per sample and layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from drawn import drawn
from report import Goal, at_least, at_most, finish
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tinyonn.experts import TinyONNForCausalLM
from tinyonn.experts.folder import open_assembled
from tinyonn.model.linear_tinyonn import ExpertLinear
from tinyonn.model.sparse_tinyonn import gated_linear
from tinyonn.reference import model_path

EXPERTS, ACTIVE = 100, 10
WAYS = ("dense", "one pattern", "a pattern a sample", "peer")
LIMIT = 1.5  # of the dense step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="folder of an assembled reference model, instead of a drawn one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[list[object]] = []
    goals: list[Goal] = []
    figures: dict[str, Any] = {"batch": options.batch, "tokens": options.tokens, "seconds": {}}
    for kind in ("BF16", "masters"):
        seconds = compare(options, kind == "masters")
        figures["seconds"][kind] = seconds
        rows += [[f"{kind}, {way}", seconds[way], seconds[way] / seconds["dense"]] for way in WAYS]
        ours = seconds["a pattern a sample"]
        goals.append(at_most(f"{kind}: ours to dense", ours / seconds["dense"], LIMIT))
        goals.append(at_least(f"{kind}: peer to ours", seconds["peer"] / ours, 1))
    finish("train_step", ["step", "seconds", "to dense"], rows, goals, options.json, figures)


def compare(options: Any, masters: bool) -> dict[str, float]:
    """Seconds of the fastest step of every way, by turns."""
    dense = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.bfloat16)
    model = open_assembled(options.model) if options.model else drawn(dense, EXPERTS)
    linear = [m.weight for m in dense.model.modules() if isinstance(m, nn.Linear)]
    values = [layer.values for layer in model.sparse_layers.values()]
    for one, parameters in ((dense, linear), (model, values)):
        one.train().requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float() if masters else parameter.data
    ids = torch.randint(0, model.config.vocab_size, (options.batch, options.tokens))
    gates_BE = torch.zeros(options.batch, EXPERTS)
    gates_BE.scatter_(1, torch.rand(options.batch, EXPERTS).topk(ACTIVE).indices, 1).requires_grad_()
    peer = one_by_one(model, gates_BE)

    def run(forward: Callable[..., Any], **given: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=masters):
            loss = forward(input_ids=ids, labels=ids, **given).loss
        loss.backward()
        for parameter in (*linear, *values, gates_BE):
            parameter.grad = None

    def run_peer() -> None:
        swap(model, peer)
        run(model.base)
        swap(model, layers)

    layers = dict(model.sparse_layers)
    one_pattern = gates_BE[0].detach().requires_grad_()
    steps: tuple[Callable[[], None], ...] = (
        partial(run, dense),
        partial(run, model, gates=one_pattern),
        partial(run, model, gates=gates_BE),
        run_peer,
    )
    clock = time.process_time if options.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(options.rounds + 1):
        for way, step in zip(WAYS, steps, strict=True):
            started = clock()
            step()
            if turn:  # the first is a warm-up
                seconds[way].append(clock() - started)
    return {way: min(found) for way, found in seconds.items()}


class OneByOne(nn.Module):
    """A layer that calls `gated_linear` for each sample."""

    def __init__(self, layer: ExpertLinear, gates_BE: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.gates_BE = layer, gates_BE

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        gates_BG = functional.pad(self.gates_BE, (0, 1), value=1.0)
        layer = self.layer
        return torch.stack(
            [
                gated_linear(x, layer.matrix, gates_G, layer.bias)
                for x, gates_G in zip(X, gates_BG, strict=True)
            ]
        )


def one_by_one(model: TinyONNForCausalLM, gates_BE: torch.Tensor) -> dict[str, nn.Module]:
    return {name: OneByOne(layer, gates_BE) for name, layer in model.sparse_layers.items()}


def swap(model: TinyONNForCausalLM, layers: dict[str, Any]) -> None:
    for name, layer in layers.items():
        model.base.set_submodule(name, layer)


if __name__ == "__main__":
    main()
