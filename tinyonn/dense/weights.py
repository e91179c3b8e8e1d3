"""The dense model's tensors one at a time, as the loaded model would have them; never the whole model.

Names are those of the loaded model. A linear layer's weight is [out, in] here whatever the checkpoint stores (a
``Conv1D`` of GPT-2 stores [in, out]), and after quantization to NF4 and back where the run has NF4.

A family's files may have other names than its modules (GPT-NeoX stores its head as ``embed_out``), or leave out the
prefix of the base model; a text part lies below ``language_model``. The library's own rules are asked, so that what it
loads is what is found here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinyonn.dense.checkpoint import open_tensors, tensor_files
from tinyonn.dense.load import DTYPES, PLAIN, load_shape
from tinyonn.dense.nf4 import BLOCK, round_to_nf4
from tinyonn.dense.settings import TEXT_NAMES, text_settings
from tinyonn.dense.source import model_folder
from tinyonn.errors import InputError

if TYPE_CHECKING:
    from tinyonn.config import ModelConfig


class BaseWeights:
    """A checkpoint's tensors by name.

    Parameters
    ----------
    config : ModelConfig

    Raises
    ------
    InputError
        No such model, or no weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.folder = model_folder(config)
        self.dtype = DTYPES[config.dtype]

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Weights that the checkpoint stores as [in, out]."""
        from transformers.pytorch_utils import Conv1D

        return frozenset(
            f"{name}.weight" for name, module in self._shape.named_modules() if type(module) is Conv1D
        )

    def matrix(self, name: str) -> torch.Tensor:
        """A linear layer's weight, dequantized: [out, in] in the model's dtype.

        Raises
        ------
        InputError
            The checkpoint has no such tensor.
        """
        weight = self.tensor(name)
        if name in self.transposed:
            weight = weight.T.contiguous()
        return round_to_nf4(weight) if self.config.quantization == "nf4" else weight

    def recorded_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) as recorded, float32: those of a ``Conv1D`` that was not quantized are its inputs."""
        if name in self.recorded_across:
            return self.tensor(name)[first:last].float().numpy()
        return self.rows(name, first, last).float().numpy()

    @property
    def recorded_across(self) -> frozenset[str]:
        """Weights that were recorded as [in, out]."""
        return frozenset() if self.config.quantization == "nf4" else self.transposed

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of `matrix`, without reading the rest."""
        path, key = self._find(name)
        with open_tensors(path) as file:
            part = file.get_slice(key)
            across = name in self.transposed
            extent, width = part.get_shape()[::-1] if across else part.get_shape()
            step = BLOCK // gcd(BLOCK, width) if self.config.quantization == "nf4" else 1  # blocks stay whole
            begin, end = first // step * step, min(-(-last // step) * step, extent)
            weight: torch.Tensor = part[:, begin:end].T.contiguous() if across else part[begin:end]
        weight = weight.to(self.dtype)
        if self.config.quantization == "nf4":
            weight = round_to_nf4(weight)
        return weight[first - begin : last - begin]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as the checkpoint has it, in the model's dtype if it is floating."""
        path, key = self._find(name)
        with open_tensors(path) as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def has(self, name: str) -> bool:
        """Whether the checkpoint has the tensor; a tied one it may leave out."""
        return name in self._names

    def check(self, names: Iterable[str]) -> None:
        """Look for tensors without reading them.

        Raises
        ------
        InputError
            The checkpoint has not one of them.
        """
        for name in names:
            self._find(name)

    def _find(self, name: str) -> tuple[Path, str]:
        key = self._names.get(name)
        if key is None:
            raise InputError(
                f"{self.config.path}: no tensor {name} in {self.folder}, which has {len(self._files)}; "
                "save a complete checkpoint that fits its config.json"
            )
        return self._files[key], key

    @cached_property
    def _names(self) -> dict[str, str]:
        mapping = TEXT_NAMES if text_settings(self.folder)[1] else {}
        return checkpoint_names(self._shape, self._files, mapping)

    @cached_property
    def _shape(self) -> torch.nn.Module:
        return load_shape(self.config.model_copy(update=PLAIN))

    @cached_property
    def _files(self) -> dict[str, Path]:
        return tensor_files(self.folder)


def checkpoint_names(model: Any, keys: Iterable[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Map the model's tensors to a checkpoint's, those left out that are made of several stored ones."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model, key_mapping=dict(mapping))
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if not isinstance(one, WeightRenaming)]
    known = model.state_dict()
    found: dict[str, str] = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name in known and (converted is None or key == name):
            found.setdefault(name, key)
    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        for name, twin in ((one, other), (other, one)):
            if name not in found and twin in found:
                found[name] = found[twin]
    return found
