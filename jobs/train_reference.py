"""Train the reference model: ``python jobs/train_reference.py OUT [--steps 2660] [--export FOLDER]``.

`OUT` receives `checkpoint.pt` (model, optimizer, step, random state), `log.jsonl` and, at the end,
`evaluation.json`. The same command goes on from the checkpoint, with the same batches as an undisturbed run;
until the decay begins, it may name another number of steps.
See `reference_data.py` and `reference_model.py` first.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import reference_data as data
import torch
from numpy.typing import NDArray
from reference_model import Loss, Recipe, build_model, build_optimizers, export, loss_of
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

REFERENCE = Path("tinyonn/reference")
CHECKPOINT_SECONDS = 180.0
PROBE_TOKENS = 8_192  # held-out tokens per slice that the curve is measured on

Slice = tuple[str, NDArray[np.int32], dict[str, float]]


@torch.no_grad()
def mean_loss(loss: nn.Module, rows: NDArray[np.int32], batch: int) -> float:
    """Mean loss over rows, `batch` at a time; an incomplete last batch is left out."""
    total, count = 0.0, 0
    for start in range(0, len(rows) - batch + 1, batch):
        total += loss_of(loss, rows[start : start + batch]).item()
        count += 1
    return total / count


@dataclass
class Training:
    """State of a run, all of which a checkpoint holds."""

    model: Qwen2ForCausalLM
    loss: nn.Module  # of the model, compiled or not
    optimizers: list[torch.optim.Optimizer]
    recipe: Recipe
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the checkpoint beside its final place and rename it there."""
        state = {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step, "seconds": self.seconds, "losses": self.losses, "rng": torch.get_rng_state(),
            "recipe": vars(self.recipe),
        }  # fmt: skip
        temporary = path.with_suffix(".partial")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same recipe."""
        state: dict[str, Any] = torch.load(path, weights_only=True)
        saved_recipe = Recipe(**state["recipe"])
        if saved_recipe != self.recipe and (
            replace(saved_recipe, steps=self.recipe.steps) != self.recipe
            or state["step"] > min(saved_recipe.stable, self.recipe.stable)
        ):
            raise SystemExit(
                f"{path} is at step {state['step']} of {saved_recipe}, not of {self.recipe}; give another OUT"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        torch.set_rng_state(state["rng"])

    def advance(self, rows: NDArray[np.int32]) -> None:
        """One optimizer step."""
        loss = loss_of(self.loss, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.recipe.rate(self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.step += 1


def heldout_rows(tokenizer: PreTrainedTokenizerFast, corpus: Path, length: int) -> Iterator[Slice]:
    """(slice, packed rows, figures that no model enters) of every slice of the held-out split."""
    rows = data.read_split(corpus, "heldout")
    for name in dict.fromkeys(row["slice"] for row in rows):
        members = [row for row in rows if row["slice"] == name]
        documents = data.token_documents(tokenizer, members)
        tokens = sum(map(len, documents))
        size = sum(len(data.render(tokenizer, row).encode()) for row in members)
        facts = {
            "documents": len(members),
            "tokens": tokens,
            "bytes": size,
            "unigram_entropy": data.unigram_entropy(documents),
        }
        yield name, data.pack(documents, np.arange(len(documents)), length), facts


def evaluate(loss: nn.Module, slices: list[Slice], batch: int) -> dict[str, dict[str, float]]:
    """Loss, perplexity and bits per byte on all held-out rows of every slice, beside its unigram figures."""
    result = {}
    for name, rows, facts in slices:
        nats = mean_loss(loss, rows, batch)
        result[name] = facts | {
            "unigram_perplexity": math.exp(facts["unigram_entropy"]), "loss": nats,
            "perplexity": math.exp(nats),
            "bits_per_byte": nats / math.log(2) * facts["tokens"] / facts["bytes"],
        }  # fmt: skip
    return result


def train(options: argparse.Namespace, recipe: Recipe) -> None:
    """Train to the end of the recipe, from the checkpoint if there is one; then evaluate and export."""
    tokenizer = data.load_tokenizer(options.tokenizer)
    model = build_model(len(tokenizer), recipe.seed)
    loss: Any = torch.compile(Loss(model), dynamic=False) if options.compile else Loss(model)
    state = Training(model, loss, build_optimizers(model, recipe), recipe)
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists():
        state.load(checkpoint)
        forget_after(state.step, options.out / "log.jsonl")
    documents = data.token_documents(tokenizer, data.read_split(options.corpus, "train"))
    batches = data.Batches(documents, recipe.length, recipe.batch, recipe.seed)
    slices = list(heldout_rows(tokenizer, options.corpus, recipe.length))
    start, saved = time.monotonic() - state.seconds, time.monotonic()
    while state.step < recipe.steps:
        state.advance(batches[state.step])
        state.seconds = time.monotonic() - start
        measure(state, slices, options.out / "log.jsonl")
        if time.monotonic() - saved > CHECKPOINT_SECONDS or state.step == recipe.steps:
            state.save(checkpoint)
            saved = time.monotonic()
            if options.export and not (options.export / "model.safetensors").exists():
                export(model, options.export)
    if options.export:
        export(model, options.export)
    figures = {"recipe": vars(recipe), "tokens": recipe.steps * recipe.batch * recipe.length,
               "seconds": state.seconds, "corpus_tokens": sum(map(len, documents)),
               "heldout": evaluate(loss, slices, recipe.batch)}  # fmt: skip
    (options.out / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")


def forget_after(step: int, log: Path) -> None:
    """Drop the log's lines that were written after the checkpoint."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def measure(state: Training, slices: list[Slice], log: Path) -> None:
    """Append a line to the log every 20 steps, with held-out losses every twentieth of the run."""
    recipe = state.recipe
    probe = state.step % (recipe.steps // 20) == 0 or state.step == recipe.steps
    if not probe and state.step % 20:
        return
    line: dict[str, Any] = {"step": state.step, "tokens": state.step * recipe.batch * recipe.length}
    line |= {"seconds": round(state.seconds, 1), "train": float(np.mean(state.losses[-20:]))}
    if probe:
        count = PROBE_TOKENS // recipe.length
        line["heldout"] = {
            name: mean_loss(state.loss, rows[:count], recipe.batch) for name, rows, _ in slices
        }
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", type=Path, default=REFERENCE / "corpus")
    parser.add_argument("--tokenizer", type=Path, default=REFERENCE / "model")
    parser.add_argument("--export", type=Path, help="folder that receives the model in BF16")
    parser.add_argument("--steps", type=int, default=2660)
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile; faster, not bit-equal to eager"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.tokenizer / "tokenizer.json").exists():
        data.train_tokenizer(data.read_split(options.corpus, "train"), options.tokenizer)
    names = ("steps", "batch", "length")
    train(options, Recipe(**{name: getattr(options, name) for name in names}))


if __name__ == "__main__":
    main()
