"""A small assembled model, with a router or without, as another's program gets to see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.dense.architectures import make_model
from tests.model.assembled import assembled
from tests.model.routers import FOUR, decide
from tinyonn.experts import TinyONNForCausalLM
from tinyonn.experts.export import export_model
from tinyonn.model.router_tinyonn import PromptRouter

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 256, "eos_token_id": None}


def model_of(folder: Path, name: str = "qwen2", router: bool = False, **options: Any) -> TinyONNForCausalLM:
    """Four experts of 60 % of a random model's weights."""
    if not (folder / "config.json").is_file():
        make_model(name, folder)
    _, model = assembled(folder, kept=0.6, **options)
    if router:
        model.set_router(FOUR)
        decide(router_of(model))
    return model


def dense_of(model: TinyONNForCausalLM, folder: Path) -> Any:
    """Its dense export, in a new folder beside it, as the base's own class."""
    model.save_pretrained(folder / "sparse")
    export_model(folder / "sparse", folder / "dense", "dense")
    return AutoModelForCausalLM.from_pretrained(folder / "dense", trust_remote_code=False)


def router_of(model: Any) -> PromptRouter:
    assert isinstance(model.router, PromptRouter)
    return model.router


def tokens(batch: int = 1, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def prompts_that_differ(model: TinyONNForCausalLM, count: int = 3, length: int = 9) -> list[torch.Tensor]:
    """Prompts of one length, no two of which want the same experts."""
    found: dict[tuple[float, ...], torch.Tensor] = {}
    for seed in range(200):
        prompt = tokens(1, length, seed)
        found.setdefault(tuple(router_of(model)(prompt)[0].tolist()), prompt)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("the router tells nothing apart")
