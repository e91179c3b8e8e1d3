"""Memory as planned beside memory as measured, of every stage: python benchmarks/memory_plan.py [--model PATH] [--json]

A run of a few samples is made with the model, each stage in a process of its own, and what the stage said that it would
need (`planned_rss_bytes`) is compared with what all its processes held together at one time (`peak_rss_bytes`, see
`tinyonn.plan.usage`). All samples are cut to the same length, for which the plan is made. ``--random 1b`` (or ``135m``)
makes a model of that size of random weights, for figures that do not depend on what it has learned.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Goal, finish
from tinyonn.reference import model_path
from tinyonn.show.sizes import MiB

STAGES = (
    "record", "merge", "score", "cluster", "assemble", "profile", "train", "evaluate", "evaluate --trained",
    "export --format hub", "export --format dense", "export --format npz", "export --format parquet",
)  # fmt: skip
CLOSE = 1.15  # planned over measured, at most
KERNELS = 160 * MiB  # or this much above: kernels are compiled in the first run alone
SHAPES = {  # hidden, inner, layers, heads, heads of keys: SmolLM2-135M's and a Llama of a billion
    "135m": (576, 1536, 30, 9, 3, 49_152),
    "1b": (2048, 8192, 15, 32, 8, 49_152),
}
SPREAD = 0.02


@dataclass(frozen=True)
class Stage:
    """A stage's bytes, and its seconds; planned is 0 where it says nothing."""

    stage: str
    planned: int
    measured: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Planned over measured."""
        return self.planned / self.measured if self.measured else float("nan")

    @property
    def holds(self) -> bool:
        """Whether no more was taken than planned, and not much less."""
        return self.measured <= self.planned <= max(CLOSE * self.measured, self.measured + KERNELS)


def random_model(folder: Path, shape: str) -> Path:
    """A Llama of random weights with the shipped model's tokenizer, in shards."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, keys, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1)
            else:
                parameter.normal_(0, SPREAD, generator=generator)
    model.save_pretrained(folder, max_shard_size="400MB")
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)
    return folder


def configuration(model: str, samples: int, tokens: int, checkpointing: bool) -> dict[str, Any]:
    """Few samples of equal length."""
    tree: dict[str, Any] = {
        "model": {"path": model, "checkpointing": checkpointing},
        "data": {"samples": samples, "max_tokens": tokens},
        "record": {"workers": 1},
        "profile": {"samples": max(1, samples // 2)},
        "cluster": {"cells": 20},
        "router": {"top_k": 5},
        "train": {"steps": 2, "warm_start": 2, "batch": 4, "micro_batch": 4, "checkpoint_every": 1},
    }
    tree["train"]["routing"] = {"ks": [5, 0]}
    return tree


def measure(
    model: str,
    folder: Path,
    stages: Sequence[str],
    samples: int = 14,
    tokens: int = 128,
    checkpointing: bool = False,
) -> list[Stage]:
    """Carry out stages, each in a process of its own.

    Parameters
    ----------
    model : str
        As ``model.path``.
    folder : Path
        For the run and the configuration.
    stages : sequence of str
        Of `STAGES`, in their order; what they go on from must have been made in the folder.
    samples, tokens : int
        Recorded samples, and tokens that each is cut to.
    checkpointing : bool
    """
    config, run = folder / "plan.yaml", folder / "run"
    config.write_text(
        json.dumps(configuration(model, samples, tokens, checkpointing)), "utf-8"
    )  # YAML holds JSON
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    found = []
    for stage in stages:
        name, *options = stage.split()
        out = [str(folder / options[-1])] if name == "export" else []
        if name == "evaluate":
            options += ["--samples", str(samples), "--methods", "default,wanda", "--budgets", "0.315"]
        command = [
            sys.executable,
            "-m",
            "tinyonn",
            name,
            str(run),
            *out,
            *options,
            "--config",
            str(config),
            "--json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        figures = json.loads(done.stdout.splitlines()[-1])
        planned = int(figures.get("planned_rss_bytes") or 0)
        found.append(Stage(stage, planned, int(figures["peak_rss_bytes"]), float(figures["seconds"])))
        parts = ", ".join(f"{k} {v / MiB:,.0f}" for k, v in figures.get("peak_parts_bytes", {}).items())
        print(
            f"{stage}: planned {planned / MiB:,.0f} MiB, measured {found[-1].measured / MiB:,.0f} ({parts})",
            file=sys.stderr,
        )
    return found


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference", help="as model.path; the shipped model by default")
    parser.add_argument("--random", choices=SHAPES, help="a model of random weights in the place of --model")
    parser.add_argument("--stages", help=f"comma-separated, of {', '.join(STAGES)}; by default all")
    parser.add_argument("--samples", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the run is made and stays")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    stages = STAGES if options.stages is None else [part.strip() for part in options.stages.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = options.model
        if options.random:
            model = str(random_model(folder / "model", options.random))
        found = measure(model, folder, stages, options.samples, options.tokens, options.checkpointing)
    rows = [
        [
            line.stage,
            f"{line.planned / MiB:,.0f}",
            f"{line.measured / MiB:,.0f}",
            line.ratio,
            f"{line.seconds:,.0f}",
        ]
        for line in found
    ]
    goals = [
        Goal(f"{line.stage}: planned over measured", line.ratio, f"1 to {CLOSE}, or 160 MiB", line.holds)
        for line in found
        if line.planned
    ]
    figures = {"model": options.random or options.model, "stages": [asdict(line) for line in found]}
    finish(
        "memory_plan",
        ("stage", "planned MiB", "measured MiB", "ratio", "s"),
        rows,
        goals,
        options.json,
        figures,
    )


if __name__ == "__main__":
    main()
