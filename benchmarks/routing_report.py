"""What `routing` prints: tables of all models, means and spreads over the seeds, and the goals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.report import Goal, at_least, at_most, finish, show

ALL = "all"
RATIOS = {ALL: 1.05, "half": 1.12, "tenth": 1.25}  # of perplexity to the dense model's


@dataclass(frozen=True)
class Line:
    """One model with so many experts on: share of the linear weights that works, and losses in nats.

    `loss` is of the kinds of text that were recorded, `unseen` of those that were left out.
    """

    arm: str
    k: str
    active: float
    loss: float
    unseen: float | None = None


def report(lines: dict[int, list[Line]], options: Any) -> None:
    """Means and spreads over the seeds, and the goals."""
    losses: dict[tuple[str, str], list[float]] = defaultdict(list)
    unseen: dict[tuple[str, str], list[float]] = defaultdict(list)
    active: dict[tuple[str, str], list[float]] = defaultdict(list)
    for its in lines.values():
        for line in its:
            losses[line.arm, line.k].append(line.loss)
            if line.unseen is not None:
                unseen[line.arm, line.k].append(line.unseen)
            active[line.arm, line.k].append(line.active)
    dense = np.mean(losses["dense", "as it is"]) if "dense" in options.arms else np.nan
    rows = [
        [arm, k, f"{np.mean(active[arm, k]):.1%}", spread(its), f"{np.exp(np.mean(its) - dense):.3f}"]
        for (arm, k), its in losses.items()
    ]
    goals = [goal for k in map(str, options.ks) for goal in worth(losses, k)]
    if "dense" in options.arms:
        goals += ratios(losses, active, "as it is") + ratios(losses, active, "trained")
    figures = {
        "lines": [
            {
                "arm": arm,
                "k": k,
                "active": active[arm, k],
                "losses": its,
                **({"unseen": unseen[arm, k]} if unseen else {}),
            }
            for (arm, k), its in losses.items()
        ],
        "seeds": list(lines),
        "steps": options.steps,
    }
    columns = ("model", "experts on", "active", "nats", "x dense")
    if unseen:
        of_dense = np.mean(unseen["dense", "as it is"]) if "dense" in options.arms else np.nan
        new = [
            [arm, k, f"{np.mean(active[arm, k]):.1%}", spread(its), f"{np.exp(np.mean(its) - of_dense):.3f}"]
            for (arm, k), its in unseen.items()
        ]
        show(
            f"text of kinds that were neither recorded nor trained on: {', '.join(options.leave_out)}",
            columns,
            new,
        )
    finish("routing", columns, rows, goals, options.json, figures)


def worth(losses: dict[tuple[str, str], list[float]], k: str) -> list[Goal]:
    """How far the routed model is below the best of the others, and that this is more than the seeds differ by."""
    others = {arm: its for (arm, its_k), its in losses.items() if its_k == k and arm != "routed"}
    if not others:
        return []
    best = min(others, key=lambda arm: float(np.mean(others[arm])))
    routed = losses["routed", k]
    margin = float(np.mean(others[best]) - np.mean(routed))
    noise = max(np.std(its, ddof=1) if len(its) > 1 else 0.0 for its in (others[best], routed))
    return [
        at_least(f"nats that routing is below the best other, {best}, {k} on", margin, float(noise)),
    ]


def ratios(
    losses: dict[tuple[str, str], list[float]], active: dict[tuple[str, str], list[float]], which: str
) -> list[Goal]:
    """Perplexity to a dense model's with all experts on, half of the kept weights and a tenth of the linear ones."""
    dense = float(np.mean(losses["dense", which]))
    found = []
    for k, limit in RATIOS.items():
        ratio = float(np.exp(np.mean(losses["routed", k]) - dense))
        share = float(np.mean(active["routed", k]))
        found.append(at_most(f"perplexity to dense ({which}), {share:.1%} active", ratio, limit))
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, the standard deviation."""
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.4f}"
