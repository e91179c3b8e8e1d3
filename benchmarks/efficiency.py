"""What a trained model costs beside the dense one: tokens a second, memory, operations.

    python benchmarks/efficiency.py storage/demo-full
    python benchmarks/efficiency.py storage/demo-full --json

Every model is loaded by a process of its own and continues the same held-out prompts greedily, one at a time, a token
at a time, with a cache. Speeds are medians over the prompts, the prompt itself not counted; memory is what the process
grew by from before it loaded the model to its peak. FLOPs a token are two for every linear weight that works and every
one of the head, and four times context times width for the attention of each layer. At the shipped model's size the
time goes into calls and not into weights; the ratios of larger ones are those of `decode.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.report import at_most, finish
from tinyonn.cli import CONFIGS
from tinyonn.config import load_config
from tinyonn.corpus.tokens import PROMPT_TOKENS
from tinyonn.machine import peak_rss

DENSE, NF4 = "dense BF16", "dense NF4"


def main() -> None:
    """Parse and carry out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=Path("storage/demo-full"))
    parser.add_argument("--config", type=Path, default=CONFIGS / "demo-full.yaml")
    parser.add_argument("--prompts", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="new ones for each prompt")
    parser.add_argument("--ks", type=int, nargs="+", default=[10, 25, 50], help="experts on, and all of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help="measure one model and print it as JSON")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    names = [DENSE, NF4, "all", *map(str, sorted(options.ks, reverse=True))]
    found = {name: _in_a_process(name, options) for name in names}
    base = found[DENSE]
    rows = [
        [
            name if name in (DENSE, NF4) else f"trained, {name} experts on",
            f"{its['speed']:.1f}",
            f"{its['speed'] / base['speed']:.2f}",
            f"{its['weight_bytes'] / 1e6:.1f}",
            f"{its['grown_bytes'] / 1e6:.0f}",
            f"{its['flops'] / 1e6:.2f}",
            f"{its['flops'] / base['flops']:.2f}",
        ]
        for name, its in found.items()
    ]
    columns = ("model", "tokens/s", "x BF16", "MB of weights", "MB grown", "MFLOP/token", "x BF16")
    least = str(min(options.ks))
    goals = [
        at_most(f"FLOPs of {least} experts on to dense BF16", found[least]["flops"] / base["flops"], 0.5),
        at_most("MB of weights to dense BF16", found["all"]["weight_bytes"] / base["weight_bytes"], 1.0),
    ]
    finish("efficiency", columns, rows, goals, options.json, found)


def _in_a_process(name: str, options: Any) -> dict[str, float]:
    flags = [
        "--config",
        str(options.config),
        "--prompts",
        str(options.prompts),
        "--tokens",
        str(options.tokens),
    ]
    command = [
        sys.executable,
        __file__,
        str(options.run),
        "--one",
        name,
        "--threads",
        str(options.threads),
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, options: Any) -> dict[str, float]:
    """One model: median tokens a second, bytes, FLOPs a token.

    Parameters
    ----------
    name : str
        `DENSE`, `NF4`, ``all`` or a number of experts.
    options : namespace
        As parsed.
    """
    import torch

    from tinyonn.dense.load import load_model, load_shape
    from tinyonn.evaluate.stage import EvaluateOptions, held_out_corpus, samples_of
    from tinyonn.evaluate.trained import active_weights
    from tinyonn.experts.folder import open_assembled
    from tinyonn.train.data import collate, held_out_batches

    torch.set_num_threads(options.threads)
    config = load_config(options.config)
    corpus = held_out_corpus(config, EvaluateOptions(samples=config.evaluate.samples), options.run)
    samples = samples_of(corpus)
    batches = held_out_batches(samples, prompt_tokens=PROMPT_TOKENS)
    dense: Any = load_shape(config.model).config
    before = peak_rss()
    if name in (DENSE, NF4):
        kind = "none" if name == DENSE else "nf4"
        model: Any = load_model(config.model.model_copy(update={"quantization": kind})).model.eval()
        active: float | None = None
    else:
        model = open_assembled(options.run / "model").eval()
        experts = int(model.config.experts)
        k = experts if name == "all" else int(name)
        model.router.top_k = min(k, experts - len(model.router.options.shared))
        _, active = active_weights(model, batches, min(k, experts), 0)
    speeds, contexts = [], []
    step = max(1, len(samples) // options.prompts)
    for sample in samples[::step][: options.prompts]:
        batch = collate([sample], PROMPT_TOKENS)
        ids = batch.prompt()[0]
        for new in (1, options.tokens):
            started = time.perf_counter()
            with torch.no_grad():
                model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            seconds = time.perf_counter() - started
            speeds.append(seconds)
        contexts.append(ids.shape[1] + options.tokens / 2)
    times = [late - early for early, late in zip(speeds[::2], speeds[1::2], strict=True)]
    linear = _linear_weights(config) if active is None else active
    head = dense.vocab_size * dense.hidden_size
    width = dense.num_attention_heads * (
        getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    )
    attention = 4 * statistics.mean(contexts) * width * dense.num_hidden_layers
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return {
        "speed": (options.tokens - 1) / statistics.median(times),
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "grown_bytes": max(0, peak_rss() - before),
        "flops": 2 * (linear + head) + attention,
    }


def _linear_weights(config: Any) -> int:
    from tinyonn.evaluate.dense import DenseWeights

    return sum(parameter.size for parameter in DenseWeights(config.model).parameters)


if __name__ == "__main__":
    main()
