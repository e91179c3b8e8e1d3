"""Parts of `gpu.py`: models with random weights of real shapes, made on the device, and the shipped one in NF4."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Goal
from torch import nn

from tinyonn.corpus.file import Sample
from tinyonn.dense.load import DenseModel, prepare_model
from tinyonn.dense.nf4 import BLOCK, NF4Linear
from tinyonn.model import matrix_tinyonn
from tinyonn.record import device as record_device
from tinyonn.reference import model_path
from tinyonn.store.records import TensorCalibration

ROOT = Path(__file__).resolve().parents[1]
QWEN_4B: dict[str, Any] = {
    "hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 20, "num_key_value_heads": 20,
    "num_hidden_layers": 40, "vocab_size": 151_936, "tie_word_embeddings": False, "max_position_embeddings": 32_768,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_hidden_layers": 1, "vocab_size": 256, "tie_word_embeddings": False, "max_position_embeddings": 512,
}  # fmt: skip
# Sizes of levels decide no time: any calibration does where time is measured.
ANY_CALIBRATION = TensorCalibration(act_base=236, grad_base=220, freq_threshold=-40)


@dataclass(frozen=True)
class Setting:
    """Where and at which size a part runs."""

    device: torch.device
    tiny: bool
    rounds: int

    @property
    def on_gpu(self) -> bool:
        """Whether it is a real one."""
        return self.device.type == "cuda"

    def of(self, gpu: Any, cpu: Any, tiny: Any) -> Any:
        """A size by where it runs."""
        return tiny if self.tiny else gpu if self.on_gpu else cpu

    def layers(self, count: int, vocabulary: int = 4096) -> dict[str, Any]:
        """So many layers of the 4B model's shape, one without a GPU, or toy ones."""
        if self.tiny:
            return TINY
        return QWEN_4B | {"num_hidden_layers": count if self.on_gpu else 1, "vocab_size": vocabulary}

    def shipped(self, device: torch.device, dtype: torch.dtype, nf4: bool = True) -> DenseModel:
        """The shipped model, or a toy."""
        return random_model(TINY, device, dtype, nf4) if self.tiny else shipped_model(device, dtype, nf4)

    def texts(self, count: int, tokens: int) -> list[Sample]:
        """Samples for it."""
        return texts(count, tokens, TINY["vocab_size"] if self.tiny else None)

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.on_gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Result:
    """What a part found."""

    goals: Sequence[Goal]
    figures: dict[str, Any]


@contextmanager
def host_kernels() -> Iterator[None]:
    """The CPU's own kernels, also where Triton's interpreter plays the GPU."""
    before = record_device.INTERPRETED, matrix_tinyonn.INTERPRETED
    record_device.INTERPRETED = matrix_tinyonn.INTERPRETED = False
    try:
        yield
    finally:
        record_device.INTERPRETED, matrix_tinyonn.INTERPRETED = before


def random_model(
    shape: dict[str, Any], device: torch.device, dtype: torch.dtype, nf4: bool, checkpointing: bool = False
) -> DenseModel:
    """A Qwen2 of a shape, made where it runs, frozen; layers in NF4 never exist in another form."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, module in list(model.named_modules()):
        if nf4 and isinstance(module, nn.Linear) and "layers" in name:
            model.set_submodule(name, _random_nf4(module, device, dtype, generator))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                norm = parameter.dim() == 1 and name == "weight"
                values = values.fill_(1) if norm else values.normal_(0, 0.02, generator=generator)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return DenseModel(prepare_model(model, checkpointing), None, device)


def _random_nf4(
    layer: nn.Linear, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> NF4Linear:
    out, inputs = layer.out_features, layer.in_features
    packed = torch.randint(
        0, 256, (out * inputs // 2,), dtype=torch.uint8, device=device, generator=generator
    )
    absmax = torch.empty(out * inputs // BLOCK, device=device).uniform_(0.02, 0.06, generator=generator)
    bias = None if layer.bias is None else torch.zeros(out, dtype=dtype, device=device)
    return NF4Linear(out, inputs, packed, absmax, dtype, bias)


def shipped_model(
    device: torch.device, dtype: torch.dtype, nf4: bool = True, layers: int | None = None
) -> DenseModel:
    """The model that ships with the project, in NF4 by our own layers; the first layers alone if so many are given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype)
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    if nf4:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and "layers" in name:
                model.set_submodule(name, NF4Linear.of(module, dtype))
    return DenseModel(prepare_model(model.to(device), False), None, device)


def texts(count: int, tokens: int, vocabulary: int | None = None) -> list[Sample]:
    """Samples of real text: the project's own documents, by the shipped tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    files = sorted(
        [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "tinyonn" / "store").glob("*.py")]
    )
    ids = [token for file in files for token in tokenizer.encode(file.read_text("utf-8")).ids]
    rng = random.Random(0)
    samples = []
    for index in range(count):
        length = rng.randint(max(2, tokens // 4), tokens)
        first = rng.randrange(len(ids) - length)
        row = np.array(ids[first : first + length], np.int32) % (vocabulary or tokenizer.get_vocab_size())
        samples.append(Sample(index, "text", row, row))
    return samples


def random_samples(count: int, tokens: int, vocabulary: int) -> list[Sample]:
    """Samples of one length."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (count, tokens)).astype(np.int32)
    return [Sample(index, "random", row, row) for index, row in enumerate(ids)]


def by_turns(ways: dict[str, Callable[[], object]], setting: Setting) -> dict[str, list[float]]:
    """Seconds of every round of every way, which take turns; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(setting.rounds + 1):
        for way, run in ways.items():
            setting.wait()
            started = time.perf_counter()
            run()
            setting.wait()
            if turn:
                seconds[way].append(time.perf_counter() - started)
    return seconds


def device_seconds(run: Callable[[], object], setting: Setting) -> float:
    """What the device's kernels of a call take, without the gaps in which the host prepares the next."""
    if not setting.on_gpu:
        return 0.0
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        setting.wait()
    return float(sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6)


def ratio(seconds: dict[str, list[float]], way: str, to: str) -> float:
    """Median over rounds of the one to the other."""
    return statistics.median(a / b for a, b in zip(seconds[way], seconds[to], strict=True))
