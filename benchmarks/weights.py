"""What the linear weights of a 4B model weigh, dense, in 4 bits and as ours: arithmetic from the shapes of Qwen1.5-4B.

    python benchmarks/weights.py [--config configs/qwen1.5-4b.yaml] [--budget 0.315] [--json]

Embeddings, head and norms are left out: they are the same in all. As saved, a kept weight is its value and its column,
beside them where the rows of every expert begin. Merged for a prompt, what is on has one value each and a bit for every
weight there is. NF4 has a float32 scale for 64 weights; Q4_K is that of llama.cpp.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from report import at_most, finish

from tinyonn.config import load_config
from tinyonn.plan.facts import describe_model

ACTIVE = 0.1  # of the linear weights, on for a prompt


def main() -> None:
    """Parse and carry out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/qwen1.5-4b.yaml"))
    parser.add_argument("--budget", type=float, default=0.315)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config = load_config(options.config)
    parameters = [one for one in describe_model(config.model)[0] if one.name.endswith("proj.weight")]
    weights = sum(parameter.size for parameter in parameters)
    starts = 4 * sum(parameter.shape[0] for parameter in parameters) * (config.cluster.cells + 1)
    kept = options.budget * weights
    sizes = {
        "BF16": 2 * weights,
        "NF4": weights / 2 + weights / 64 * 4,
        "Q4_K": weights * 4.5 / 8,
        f"ours, {options.budget:.1%} kept, as saved": kept * (2 + 2) + starts,
        "ours, merged, all experts on": kept * 2 + weights / 8,
        f"ours, merged, {ACTIVE:.0%} on": ACTIVE * weights * 2 + weights / 8,
    }
    rows = [[name, f"{size / 1e9:.2f}", f"{size / sizes['BF16']:.2f}"] for name, size in sizes.items()]
    saved = list(sizes.values())[3]
    goals = [at_most("as saved, to NF4", saved / sizes["NF4"], 1.0)]
    figures = {"weights": weights, "bytes": sizes}
    finish(
        "weights",
        (f"{weights / 1e9:.2f} billion linear weights", "GB", "x BF16"),
        rows,
        goals,
        options.json,
        figures,
    )


if __name__ == "__main__":
    main()
