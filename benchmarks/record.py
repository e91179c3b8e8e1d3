"""Speed of recording beside its limit and beside what others do, on one thread, in one run.

    python benchmarks/record.py [--rounds 5] [--threads 1] [--json]

(a) forward and backward to the inputs alone, (b) the same with every weight gradient formed whole, always in the same
memory, and dropped: the limit, (c) ours, (d) float32 sums of the same three statistics per weight in plain Torch, with
the size of every weight kept in float32 so that none is decoded twice. They take turns on the same samples.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Goal, finish

from tinyonn.config import ModelConfig
from tinyonn.corpus.file import Sample
from tinyonn.dense.load import DenseModel, load_model
from tinyonn.dense.parameters import Use, list_uses
from tinyonn.dense.passes import attach
from tinyonn.record.levels import SUM_SAMPLES
from tinyonn.record.recorder import Recorder
from tinyonn.record.sums import embedding_gradient, mean_square, normalised, token_share, weight_of
from tinyonn.record.worker import calibrate
from tinyonn.reference import model_path

QWEN_LAYER = {
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=SUM_SAMPLES, help="per round; 17 make one spill")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("reference", "layer"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[list[str]] = []
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in (("reference", model_path()), ("layer", qwen_layer(Path(scratch)))):
            if options.only in (None, name):
                count = options.samples if name == "reference" else min(options.samples, 4)
                compare(name, folder, options, count, rows, goals)
    finish("record", ["model", "way", "ms per sample", "to (b)", "bytes a weight"], rows, goals, options.json)


def qwen_layer(folder: Path) -> Path:
    """One decoder layer of Qwen1.5-4B's shape with the reference model's tokenizer; random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_path(), **QWEN_LAYER, num_hidden_layers=1)
    config.layer_types = ["full_attention"]
    target = folder / "layer"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(target)
    for file in model_path().iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, target)
    return target


def compare(
    name: str, folder: Path, options: Any, count: int, rows: list[list[str]], goals: list[Goal]
) -> None:
    """Time the four ways on one model."""
    config = ModelConfig(path=str(folder), quantization="nf4", dtype="bfloat16", device="cpu")
    samples = random_samples(count, options.tokens)
    ways: dict[str, Callable[[], None]] = {}
    load = partial(load_model, config)
    ways["a: forward, backward"] = partial(run_all, Recorder(load(), options.threads), samples)
    ways["b: and gradients formed"] = partial(
        run_all, tapped(load(), options.threads, Formed().drop), samples
    )
    recorder, sizes = ours(load(), options.threads, samples)
    ways["c: ours"] = partial(record_all, recorder, samples)
    sums = Float32Sums()
    ways["d: float32 sums"] = partial(run_all, tapped(load(), options.threads, sums.add), samples)
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(options.rounds + 1):
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            if turn:  # the first is a warm-up
                times[way].append((time.perf_counter() - started) / count)
    median = {way: statistics.median(values) for way, values in times.items()}
    limit = median["b: and gradients formed"]
    bytes_d = sums.bytes / sizes["weights"]
    held = {"c: ours": sizes["beside"], "d: float32 sums": bytes_d}
    for way, value in median.items():
        rows.append(
            [
                name,
                way,
                f"{value * 1e3:.1f}",
                f"{value / limit:.3f}",
                f"{held[way]:.2f}" if way in held else "",
            ]
        )
    ratios = [c / b for b, c in zip(times["b: and gradients formed"], times["c: ours"], strict=True)]
    goals += [
        Goal(f"{name}: ours / limit", statistics.median(ratios), "<= 1.15", statistics.median(ratios) <= 1.15),
        Goal(f"{name}: ours / float32 sums", median["c: ours"] / median["d: float32 sums"], "< 1",
             median["c: ours"] < median["d: float32 sums"]),
        Goal(f"{name}: accumulator bytes per weight", sizes["beside"], "<= 1.3", sizes["beside"] <= 1.3),
    ]  # fmt: skip
    rows.append([name, "   ours with the uint16 sums in RAM", "", "", f"{sizes['all']:.2f}"])
    ways.clear()
    gc.collect()


def random_samples(count: int, tokens: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4096, (count, tokens)).astype(np.int32)
    return [Sample(index, "x", row, row) for index, row in enumerate(ids)]


def run_all(recorder: Recorder, samples: Sequence[Sample]) -> None:
    for sample in samples:
        recorder.run(sample)


def record_all(recorder: Recorder, samples: Sequence[Sample]) -> None:
    if recorder.record(samples):
        raise RuntimeError("a sample was set aside")


def ours(dense: DenseModel, threads: int, samples: Sequence[Sample]) -> tuple[Recorder, dict[str, float]]:
    """A calibrated recorder with its sums open, and the bytes a weight that they take."""
    recorder = Recorder(dense, threads)
    calibration = calibrate(recorder, samples[:4], [list(recorder.sites)])
    recorder.open(calibration, spills=True)
    weights = sum(parameter.size for parameter in recorder.parameters)
    beside = spilled = 0
    for site in recorder.sites.values():
        beside += sum(part.numel() for part in (site.grad, site.act, site.freq) if part is not None)
        beside += 0 if site.dense else SUM_SAMPLES * site.inputs
        totals = (site.grad_total, site.act_total, site.freq_total, site.histograms)
        spilled += sum(part.nbytes for part in totals if part is not None)
    return recorder, {"weights": weights, "beside": beside / weights, "all": (beside + spilled) / weights}


OnUse = Callable[[Use, torch.Tensor, torch.Tensor], None]


def tapped(dense: DenseModel, threads: int, on_use: OnUse) -> Recorder:
    """A recorder that records nothing itself, with other taps behind the modules."""
    recorder = Recorder(dense, threads)
    modules: dict[str, list[Use]] = defaultdict(list)
    for use in list_uses(dense.model):
        modules[use.module_name].append(use)
    for uses in modules.values():

        def meet(X: torch.Tensor, G: torch.Tensor, uses: list[Use] = uses) -> None:
            for use in uses:
                on_use(use, X, G.reshape(-1, G.shape[-1]))

        attach(uses[0].module, meet, lambda: True)
    return recorder


class Formed:
    """Forms weight gradients, each in the same memory as the one before."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def form(self, use: Use, X: torch.Tensor, G_TO: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The whole weight gradient, good until the next one, and, for an embedding, the rows that have one."""
        if use.operation == "embedding":
            return embedding_gradient(X, G_TO, use.scale)
        if use.operation == "bias":
            return slice(None), G_TO.sum(0)
        if use.operation == "linear":
            return slice(None), torch.mm(G_TO.T, X, out=self._room(G_TO.shape[1], X.shape[1], X.dtype))
        return slice(None), (normalised(X.reshape(G_TO.shape), use) * G_TO).sum(0)

    def drop(self, use: Use, X: torch.Tensor, G_TO: torch.Tensor) -> None:
        """Form it."""
        self.form(use, X, G_TO)

    def _room(self, outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
        size = outputs * inputs
        if self._memory.dtype != dtype or self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=dtype)
        return self._memory[:size].view(outputs, inputs)


class Float32Sums:
    """`act`, `grad` and `freq` of every weight, summed up in float32."""

    def __init__(self) -> None:
        self._formed = Formed()
        self._sums: dict[str, tuple[torch.Tensor, ...]] = {}
        self._sizes: dict[str, torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        """Of the sums and of the weights' sizes beside them."""
        kept = [*self._sizes.values(), *(part for parts in self._sums.values() for part in parts)]
        return sum(part.nbytes for part in kept)

    def add(self, use: Use, X: torch.Tensor, G_TO: torch.Tensor) -> None:
        """Add what one use of a tensor met in one sample."""
        name = use.parameter_name
        if name not in self._sums:
            self._sizes[name] = weight_of(use).abs().float()
            self._sums[name] = tuple(torch.zeros(self._sizes[name].shape) for _ in range(3))
        size = self._sizes[name]
        act, grad, freq = self._sums[name]
        rows, gradient = self._formed.form(use, X, G_TO)
        grad[rows] += gradient.abs_()
        if use.operation == "embedding":
            rms = token_share(X, size.shape[0], use.scale).sqrt()[:, None]
        elif use.operation == "linear":
            rms = mean_square(X).sqrt()
        elif use.operation == "bias":
            rms = torch.ones(1)
        else:
            rms = mean_square(normalised(X.reshape(G_TO.shape), use)).sqrt()
        values = size * rms
        act += values
        freq += values > 0.01


if __name__ == "__main__":
    main()
