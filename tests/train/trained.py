"""A tiny corpus, a tiny sparse model with a router, and its dense teacher, for whoever trains in tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.dense.architectures import make_model
from tests.model.assembled import assemble, dense_model, random_groups
from tests.train.defaults import loss_weights, optimizer_options, routing_options, stage_options, training
from tinyonn.corpus.file import Corpus, Header, write_corpus
from tinyonn.experts import TinyONNForCausalLM
from tinyonn.train.monitor import FILE, read_lines
from tinyonn.train.options import (
    ScheduleOptions,
    TrainOptions,
)

EXPERTS = 6
BRANCHES = [[0, 1, 2], [3, 4, 5]]
OPTIONS = training(
    steps=6,
    batch=4,
    micro_batch=2,
    prompt_tokens=4,
    precision="float32",
    checkpoint_every=2,
    warm_start=0,
    prompt_loss=False,
    schedule=ScheduleOptions(decay=0.2),
    optimizers=optimizer_options(router_lr=2e-3, experts="adamw", experts_lr=1e-4, norms_lr=0.0),
    weights=loss_weights(ce=0.5, balance=0.05),
    routing=routing_options(ks=(2, 4), noise=0.1, dropout=0.1, capacity=2.0, bias_rate=0.01),
    stages=stage_options(first=0.5, min_k=3, grow=0.5, integrity=True),
)


def make_corpus(path: Path, counts: dict[str, int] | None = None, chats: int = 2, seed: int = 0) -> Corpus:
    """Random tokens: texts, and in each slice some chats, whose first tokens have no label."""
    generator = np.random.default_rng(seed)
    slices = counts or {"code": 9, "prose": 7}
    rows, index = [], 0
    for count in slices.values():
        for number in range(count):
            ids = generator.integers(0, 250, int(generator.integers(8, 20))).astype(np.int32)
            labels = ids.copy()
            if number < chats:
                labels[:5] = -100
            rows.append((index * 3 + 1, ids, labels))
            index += 1
    tokens = sum(ids.size for _, ids, _ in rows)
    header = Header("key", f"corpus {seed} {sorted(slices.items())}", slices, [], 0, tokens, 20)
    return write_corpus(path, header, None, iter(rows))


def make_models(
    folder: Path, router: bool = True, name: str = "qwen2", **options: Any
) -> tuple[Any, TinyONNForCausalLM]:
    """The dense model and a sparse one of 60 % of its weights."""
    make_model(name, folder)
    return load_models(folder, router, **options)


def load_models(folder: Path, router: bool = True, **options: Any) -> tuple[Any, TinyONNForCausalLM]:
    """The same from a folder where the dense one lies."""
    base = dense_model(folder)
    student = assemble(base, random_groups(base, EXPERTS, 0.6), EXPERTS, **options)
    if router:
        student.set_router({"branches": BRANCHES, "width": 16, "top_k": 3, "prompt_tokens": 4})
    return base, student


def changed(**changes: Any) -> TrainOptions:
    """`OPTIONS` with changes; of nested ones by a dictionary."""
    known = {name: getattr(OPTIONS, name) for name in changes}
    return replace(
        OPTIONS,
        **{
            name: replace(known[name], **value) if isinstance(value, dict) else value
            for name, value in changes.items()
        },
    )


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Step and values of every line that a training wrote, without what depends on time or looks back on a window."""
    over_window = {"tokens_per_second", "load_cv", "load_dead", "load_entropy"}
    return [
        {"step": line["step"]} | {name: line["values"][name] for name in line["values"].keys() - over_window}
        for line in read_lines(folder / FILE)
    ]
