"""Digests of all that two small runs come to: what stays the same when code is only moved.

    python -m tests.same_bits [--write]

The runs are of the shipped model, in NF4, and of a random Qwen2, each a few samples through every stage, without Ray.
Bits depend on the processor and on Torch, so the file beside this one, ``same_bits.json``, names both; on another
machine write it anew at the commit before, then compare at the commit after. Exits with 1 where something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.hardening import lives
from tests.hardening.lives import Bits, World
from tests.record.runs import record_in_order
from tests.train.trained import read_curve
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import Config, parse_config
from tinyonn.evaluate.stage import evaluate_options, evaluate_run
from tinyonn.experts.assemble import assemble_run
from tinyonn.experts.export import export_model
from tinyonn.profile.stage import ProfileOptions, profile_run
from tinyonn.score.stage import score_run
from tinyonn.store.merge import merge_ready
from tinyonn.store.repository import Store
from tinyonn.train.plan import TrainStageOptions, train_stage_options
from tinyonn.train.spec import RouterShape
from tinyonn.train.stage import train_run

FILE = Path(__file__).with_suffix(".json")
SHIPPED: dict[str, Any] = {
    "model": {"path": "reference", "device": "cpu", "quantization": "nf4"},
    "data": {"path": "reference", "max_tokens": 64, "samples": 28},
    "record": {"segment": 2, "calibration": 7, "workers": 1},
    "cluster": {"cells": 12},
    "profile": {"samples": 14},
    "router": {"top_k": 4},
    "train": {"steps": 4, "batch": 4, "micro_batch": 2, "warm_start": 3, "routing": {"ks": [2, 4, 0]}},
    "evaluate": {"samples": 14, "methods": ["default", "wanda"], "budgets": [0.315]},
}
RANDOM: dict[str, Any] = {  # beside the configuration of `tests.hardening.lives`
    "record": {"calibration": 8},
    "evaluate": {
        "samples": 16,
        "methods": ["default", "wanda", "magnitude"],
        "budgets": [0.6],
    },
}


Shape = Callable[[TrainStageOptions], TrainStageOptions]


def _small(options: TrainStageOptions) -> TrainStageOptions:
    router = RouterShape(branches=2, width=16, top_k=2)
    return replace(options, router=router, train=replace(options.train, precision="float32"))


def _of_three_branches(options: TrainStageOptions) -> TrainStageOptions:
    return replace(options, router=RouterShape(branches=3, top_k=4))


def _merged(tree: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return {**tree, **{name: {**tree.get(name, {}), **section} for name, section in more.items()}}


def digests(run: Path, config: Config, shape: Shape) -> dict[str, str]:
    """Of every stage's results, in the order of the stages, which are carried out as they are needed."""
    place, found = str(run), {}
    record_in_order(run, config)
    found["segments"] = _digest(lives.records(run))
    merge_ready(Store.open(run / "store", read_only=False))
    found["merged records"] = _digest(lives.records(run))
    score_run(place, config)
    found["rows"] = _digest(lives.rows(run))
    cluster_run(place, config)
    found["labels"] = _digest(lives.labels(run))
    assemble_run(place, config.model, config.experts)
    found["assembled tensors"] = _digest(tensors(run / "experts"))
    profile_run(place, config, ProfileOptions(samples=config.profile.samples, workers=1))
    found["profile"] = _digest(lives.files(run / "profile", ".parquet", ".arrow"))
    train_run(place, config, shape(train_stage_options(config)))
    found["training"] = _digest({"curve": curve(run), **tensors(run / "model")})
    evaluate_run(place, config, evaluate_options(place, config, split="all"))
    found["losses"] = _digest(lives.losses(run))
    export_model(run / "experts", run / "dense", "dense")
    found["dense tensors"] = _digest(tensors(run / "dense"))
    return found


def tensors(folder: Path) -> Bits:
    """Of all files of tensors in a folder, without what they say of themselves."""
    found: Bits = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name)
                found[name] = [
                    str(tensor.dtype),
                    list(tensor.shape),
                    tensor.contiguous().view(torch.uint8).numpy(),
                ]
    return found


def curve(run: Path) -> list[Any]:
    """Losses of the steps."""
    return [line["loss"] for line in read_curve(run / "train")]


def _digest(bits: Bits) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, (bytes, memoryview)) or hasattr(value, "tobytes"):
            digest.update(bytes(value) if isinstance(value, bytes) else value.tobytes())
        elif isinstance(value, dict):
            for key in sorted(value):
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        else:
            digest.update(repr(value).encode())

    assert bits, "nothing was made"
    add(bits)
    return digest.hexdigest()[:32]


def made() -> dict[str, Any]:
    """Where digests are of, and the digests of both runs."""
    torch.set_num_threads(1)
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        world = World(folder / "world")
        tree = _merged(json.loads(world.config.read_text("utf-8")), RANDOM)
        runs = {
            "random": digests(folder / "random", parse_config(tree, whole=True), _small),
            "shipped": digests(folder / "shipped", parse_config(SHIPPED, whole=True), _of_three_branches),
        }
    return {"processor": processor, "torch": torch.__version__, "runs": runs}


def main() -> int:
    """Make both runs, and compare them with the file or write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="the file anew")
    wanted = parser.parse_args()
    found = made()
    if wanted.write:
        FILE.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        return 0
    known = json.loads(FILE.read_text("utf-8"))
    if others := [name for name in ("processor", "torch") if known[name] != found[name]]:
        print(f"the file is of another {' and '.join(others)}: {[known[name] for name in others]}")
    different = [
        f"{run}: {name}"
        for run, its in found["runs"].items()
        for name, digest in its.items()
        if known["runs"][run].get(name) != digest
    ]
    print("\n".join(different) or f"all {sum(map(len, found['runs'].values()))} digests are the same")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
