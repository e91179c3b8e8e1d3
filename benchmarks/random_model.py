"""A model of any shape with random weights, made on the CPU: in NF4 in memory, or as a checkpoint of BF16 shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

from tinyonn.config import ModelConfig
from tinyonn.dense.load import DenseModel, load_shape, prepare_model
from tinyonn.dense.parameters import Parameter
from tinyonn.experts.shards import plan_shards, write_tensors

BLOCK = 64  # weights that share a scale in NF4
POOL_BLOCKS = 1 << 17
SPREAD = 0.02  # standard deviation: what models of this kind are initialised with


class Weights:
    """Random tensors, bfloat16 or NF4, put together from a pool of blocks of 64 normal numbers.

    NF4 quantizes block by block, so a tensor of random quantized blocks is a random tensor quantized; only the
    pool goes through the quantization.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        pool = torch.empty(POOL_BLOCKS, BLOCK).normal_(0, SPREAD, generator=self._generator)
        self._plain = pool.to(torch.bfloat16)
        parts = [
            quantize_4bit(part, quant_type="nf4", compress_statistics=False)
            for part in self._plain.split(1 << 14)
        ]
        self._packed = torch.cat([packed for packed, _ in parts]).reshape(POOL_BLOCKS, BLOCK // 2)
        self._absmax = torch.cat([state.absmax for _, state in parts])
        self._code = parts[0][1].code

    def plain(self, shape: torch.Size) -> torch.Tensor:
        """A bfloat16 tensor."""
        out = torch.empty(-(-shape.numel() // BLOCK), BLOCK, dtype=torch.bfloat16)
        torch.index_select(self._plain, 0, self._blocks(out.shape[0]), out=out)
        return out.reshape(-1)[: shape.numel()].reshape(shape)

    def nf4(self, module: Linear4bit) -> Params4bit:
        """The quantized weight of a linear layer."""
        shape = torch.Size((module.out_features, module.in_features))
        assert shape.numel() % BLOCK == 0, f"{list(shape)} is not whole blocks of {BLOCK}"
        blocks = self._blocks(shape.numel() // BLOCK)
        state = QuantState(
            absmax=self._absmax[blocks],
            shape=shape,
            code=self._code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
        return Params4bit(
            self._packed[blocks].reshape(-1, 1),
            requires_grad=False,
            quant_state=state,
            blocksize=BLOCK,
            compress_statistics=False,
            quant_type="nf4",
            bnb_quantized=True,
            module=module,
        )

    def _blocks(self, count: int) -> torch.Tensor:
        return torch.randint(POOL_BLOCKS, (count,), generator=self._generator)


def random_nf4(folder: Path, seed: int = 0) -> DenseModel:
    """Build a model as `load_model` would give it, from its ``config.json`` and random numbers.

    Parameters
    ----------
    folder : Path
        Holds ``config.json``.
    seed : int
    """
    config = ModelConfig(path=str(folder), quantization="nf4", dtype="bfloat16", device="cpu")
    model: Any = load_shape(config)
    weights = Weights(seed)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary frequencies
            model.set_submodule(name, type(module)(config=model.config))
            continue
        for part, tensor in list(module.named_parameters(recurse=False)):
            if part == "weight" and isinstance(module, Linear4bit):
                module.weight = weights.nf4(module)
                module.quant_state = module.weight.quant_state
            else:
                value = weights.plain(tensor.shape)
                if name.endswith("norm"):
                    value += 1
                setattr(module, part, torch.nn.Parameter(value, requires_grad=False))
    return DenseModel(prepare_model(model, config.checkpointing), None, torch.device("cpu"))


def write_checkpoint(shape: Path, folder: Path, parameters: Sequence[Parameter]) -> None:
    """A checkpoint of random weights, a shard for each layer; left as it is if it is there.

    Parameters
    ----------
    shape : Path
        Folder of a ``config.json``.
    folder : Path
    parameters : sequence of Parameter
        All of that shape.
    """
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    files = {}
    for shard in plan_shards(folder, parameters, [], []):
        tensors = {
            name: torch.randn(size, generator=generator).mul_(SPREAD).bfloat16()
            for name, size in ((p.name, p.shape) for p in parameters if p.name in shard.whole)
        }
        write_tensors(shard.path, tensors, {"format": "pt"})
        files.update(dict.fromkeys(tensors, shard.path.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    shutil.copyfile(shape / "config.json", folder / "config.json")
