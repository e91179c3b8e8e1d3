"""A clustered run of a small real model, for assembly."""

from __future__ import annotations

from pathlib import Path

from tests.dense.architectures import make_model
from tests.record.runs import config_of, serial_run
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import ClusterConfig, Config, ModelConfig, RouterConfig, RoutingConfig
from tinyonn.score.stage import score_run

CELLS = 6


def clustered_run(
    folder: Path, name: str = "qwen2", quantization: str = "nf4", dtype: str = "bfloat16", rows_each: int = 12
) -> Config:
    """Record, score and cluster a random model of an architecture into ``folder / "run"``; the configuration.

    So many rows of each of two slices.
    """
    rows = folder / "rows.jsonl"
    texts = [("code", "def f(x): return x + {}"), ("prose", "It rained for the {}th day.")]
    lines = [
        f'{{"text": "{text.format(n)}", "kind": "{kind}"}}' for n in range(rows_each) for kind, text in texts
    ]
    rows.write_text("\n".join(lines), "utf-8")
    config = config_of(make_model(name, folder / "model"), rows)
    model = ModelConfig(path=str(folder / "model"), quantization=quantization, dtype=dtype, device="cpu")
    train = config.train.model_copy(update={"routing": RoutingConfig(ks=(2, 4, 0))})
    few = {"cluster": ClusterConfig(cells=CELLS), "router": RouterConfig(top_k=2), "train": train}
    config = config.model_copy(update={"model": model, **few})
    serial_run(folder / "run", config)
    score_run(str(folder / "run"), config)
    cluster_run(str(folder / "run"), config)
    return config
