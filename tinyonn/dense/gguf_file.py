"""What a GGUF file says of its model: configuration, tokenizer and tensors, as ``transformers`` would have them.

``transformers`` reads a GGUF whole, into float32, and passes over what it has no name for. Here its maps and its
undoing of llama.cpp's changes are used tensor by tensor, and every key of the model and every tensor has to have a
meaning: a file that says more than can be heard is refused, since the model would be another one.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyonn.dense.quiet import quiet
from tinyonn.errors import InputError

ANOTHER = "give the model that it was made from instead"
UNQUANTIZED = ("F32", "F16", "BF16", "F64")
ROPE_FACTORS = "rope_freqs.weight"
IGNORED = re.compile(r"attn_rot_embd|rope_freqs\.weight$")  # follow from the configuration
ATTRIBUTES = {  # what a key sets, by the names that configurations have for it
    "context_length": ("max_position_embeddings",),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}  # which no key says
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LARGEST_GEMMA = {
    "gemma2": 46,
    "gemma3": 62,
}  # layers of the size whose queries are scaled by width over heads


class GGUFFile:
    """A GGUF file, mapped into memory.

    Parameters
    ----------
    path : Path

    Raises
    ------
    InputError
        The ``gguf`` package is missing, or the file is damaged or no GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            from gguf import GGUFReader
        except ImportError:
            raise InputError(
                f"{path} is a GGUF, which the package gguf reads; pip install 'tiny-onn[gguf]', or give a folder with "
                "config.json and *.safetensors"
            ) from None
        try:
            self._reader = GGUFReader(path)
            self._fields: dict[str, Any] = dict(self._reader.fields)
            self.architecture = str(self._fields["general.architecture"].contents())
        except Exception as error:  # whatever a reader of damaged bytes may trip over
            raise InputError(
                f"{path}: not a readable GGUF ({type(error).__name__}: {error}); fetch it again"
            ) from None
        self.types: Counter[str] = Counter()
        self._weights: Counter[str] = Counter()
        kind = self._fields.get("general.type")
        if kind is not None and kind.contents() != "model":
            raise InputError(
                f"{path} is a GGUF of type {kind.contents()!r}, and no model; give the model's own file"
            )
        for tensor in self._reader.tensors:
            self.types[tensor.tensor_type.name] += 1
            self._weights[tensor.tensor_type.name] += int(tensor.n_elements)

    @property
    def licence(self) -> str | None:
        """As the file names it."""
        field = self._fields.get("general.license")
        return None if field is None else str(field.contents())

    def describe(self) -> str:
        """Tensors by their type, and what the values were rounded to before.

        Returns
        -------
        str
            Such as ``Q4_1 (210 tensors), F32 (61): the values come from 4-bit weights already``.
        """
        ordered = self.types.most_common()
        counts = ", ".join(
            f"{name} ({count}{' tensors' * (not at)})" for at, (name, count) in enumerate(ordered)
        )
        main = self._weights.most_common(1)[0][0]
        bits = re.search(r"\d+", main)
        if main in UNQUANTIZED or bits is None:
            return f"{counts}: not quantized"
        return f"{counts}: the values come from {bits[0]}-bit weights already"

    def config(self) -> Any:
        """The model's configuration.

        Returns
        -------
        transformers.PretrainedConfig

        Raises
        ------
        InputError
            ``transformers`` knows no such architecture, or the file says of its model what would not be heard.
        """
        from transformers import AutoConfig

        try:
            with quiet():
                config = AutoConfig.from_pretrained(
                    self.path.parent, gguf_file=self.path.name, local_files_only=True
                )
        except Exception as error:
            raise InputError(
                f"{self.path}: a GGUF of architecture {self.architecture!r}, which this version of transformers does "
                f"not read ({type(error).__name__}: {' '.join(str(error).split())[:200]}); {ANOTHER}"
            ) from None
        if hasattr(config, "_model_name_or_path"):
            del config._model_name_or_path
        self._complete(config)
        self._check_types()
        return config

    def tokenizer(self) -> Any:
        """The tokenizer, with the chat template if the file has one.

        Returns
        -------
        transformers.PreTrainedTokenizerBase

        Raises
        ------
        InputError
            The file has none, or one of a kind that is not known.
        """
        from transformers import AutoTokenizer

        try:
            with quiet():
                return AutoTokenizer.from_pretrained(
                    self.path.parent, gguf_file=self.path.name, local_files_only=True
                )
        except Exception as error:
            kind = self._fields.get("tokenizer.ggml.model")
            raise InputError(
                f"{self.path}: its tokenizer ({kind.contents() if kind else 'none'}) cannot be read "
                f"({type(error).__name__}: {error}); {ANOTHER}"
            ) from None

    def _complete(self, config: Any) -> None:
        """Set what ``transformers`` passed over; refuse what has no name in the configuration."""
        prefix = f"{self.architecture}."
        said = {
            key.removeprefix(prefix): field.contents()
            for key, field in self._fields.items()
            if key.startswith(prefix)
        }
        lost = []
        for key, value in sorted(said.items()):  # the width of a head before what is told by it
            if isinstance(value, list) and value and all(part == value[0] for part in value):
                value = value[0]
            if value not in (0, "none") and not self._set(config, key, value):
                lost.append(f"{prefix}{key} = {value}")
        if lost:
            raise InputError(
                f"{self.path} says {', '.join(lost)}, which transformers has no place for in a {config.model_type} "
                f"read from a GGUF: the model would be another one; {ANOTHER}"
            )
        names = {tensor.name for tensor in self._reader.tensors}
        for option, bias in BIASES.items():
            if bias in names and hasattr(config, option):
                setattr(config, option, True)
        self._scale_queries(config)
        self._scale_frequencies(config)

    def _set(self, config: Any, key: str, value: Any) -> bool:
        """Have the configuration say the same; whether it can."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        full, local = rope.get("full_attention", rope), rope.get("sliding_attention")
        if key in ("attention.key_length", "attention.value_length"):
            if hasattr(config, "head_dim") and key == "attention.key_length":
                config.head_dim = head = value
            return bool(head == value)
        if key == "rope.dimension_count":
            return bool(int(head * full.get("partial_rotary_factor", 1.0)) == value)
        if key in ("rope.freq_base", "rope.freq_base_swa"):
            part = full if key == "rope.freq_base" else local
            if part:
                part["rope_theta"] = float(value)
            return bool(part)
        scaling = self._fields.get(f"{self.architecture}.rope.scaling.type")
        if (
            key.startswith("rope.scaling.")
            and full
            and scaling is not None
            and scaling.contents() == "linear"
        ):
            full |= {"rope.scaling.factor": {"factor": value}, "rope.scaling.type": {"rope_type": value}}.get(
                key, {}
            )
            return key in ("rope.scaling.factor", "rope.scaling.type", "rope.scaling.finetuned")
        if key == "attention.head_count_kv" and not hasattr(config, "num_key_value_heads"):
            return bool(value == config.num_attention_heads)
        for name in ATTRIBUTES.get(key, ()):
            if hasattr(config, name):
                if key == "attention.sliding_window" and getattr(config, "layer_types", None):
                    return bool(getattr(config, name) == value)  # the layers were chosen by it
                setattr(config, name, value)
                return True
        return False

    def _scale_queries(self, config: Any) -> None:
        """Gemma's scale of the queries, which no key says: llama.cpp tells it from the number of layers."""
        if hasattr(config, "query_pre_attn_scalar"):
            largest = LARGEST_GEMMA.get(self.architecture) == config.num_hidden_layers
            width = config.hidden_size // config.num_attention_heads
            config.query_pre_attn_scalar = width if largest else config.head_dim

    def _scale_frequencies(self, config: Any) -> None:
        """Llama 3's factors of the rotary frequencies, which ``transformers`` would drop."""
        factors = next((tensor for tensor in self._reader.tensors if tensor.name == ROPE_FACTORS), None)
        if factors is None or np.all(factors.data == 1):
            return
        factor, rope = float(np.max(factors.data)), config.rope_parameters
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        expected = llama3_factors(rope["rope_theta"], head, factor)
        if factors.data.shape != expected.shape or not np.allclose(factors.data, expected, rtol=1e-4):
            raise InputError(f"{self.path}: its rotary factors ({ROPE_FACTORS}) are not Llama 3's; {ANOTHER}")
        rope |= LLAMA3 | {"rope_type": "llama3", "factor": factor}

    def _check_types(self) -> None:
        from gguf import GGML_QUANT_SIZES, dequantize

        for kind in {tensor.tensor_type for tensor in self._reader.tensors}:
            block = np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8)
            try:
                if kind.name not in UNQUANTIZED:
                    dequantize(block, kind)
            except Exception:
                raise InputError(
                    f"{self.path}: tensors of type {kind.name} cannot be read by this version of the package gguf; "
                    f"{ANOTHER}"
                ) from None

    def read(self, model: Any) -> GGUFTensors:
        """The tensors of a model that was built from `config`, on any device."""
        return GGUFTensors(self, model)


class GGUFTensors:
    """The tensors of a GGUF under the names that ``transformers`` has for them.

    Parameters
    ----------
    file : GGUFFile
    model : transformers.PreTrainedModel
        Of the same configuration; its names and shapes are used, on the meta device too.

    Raises
    ------
    InputError
        A tensor is missing, has another shape, or has no place in the model.
    """

    def __init__(self, file: GGUFFile, model: Any) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._file = file
        self._processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(
            config=model.config.to_dict()
        )
        self._names: dict[str, str] = get_gguf_hf_weights_map(model, self._processor)
        every = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
        self._check(every, {name for name, _ in model.named_parameters()})
        self.shapes = {name: every[name] for name in self._order}

    @cached_property
    def _order(self) -> dict[str, int]:
        """How many of the file's tensors make up each of the model's, in the order in which they are complete."""
        sources = Counter(name for tensor in self._tensors if (name := self._target(tensor)) is not None)
        last = {self._target(tensor): at for at, tensor in enumerate(self._tensors)}
        return {name: sources[name] for name in sorted(sources, key=last.__getitem__)}

    @cached_property
    def _tensors(self) -> list[str]:
        return [tensor.name for tensor in self._file._reader.tensors if not IGNORED.search(tensor.name)]

    def _target(self, name: str) -> str | None:
        return self._names.get(name) or self._names.get(
            name.removesuffix(".weight")
        )  # fused experts have no suffix

    def _check(self, shapes: dict[str, tuple[int, ...]], needed: set[str]) -> None:
        strange = [name for name in self._tensors if self._target(name) is None]
        missing = sorted(needed - self._order.keys())
        if strange or missing:
            what = (
                f"{strange[0]} has no place in the model"
                if strange
                else f"the model's {missing[0]} is not there"
            )
            raise InputError(
                f"{self._file.path}: {len(strange) + len(missing)} tensors do not fit a {self._file.architecture} of "
                f"its configuration, {what}; {ANOTHER}"
            )
        sizes: Counter[str] = Counter()
        for tensor in self._file._reader.tensors:
            if not IGNORED.search(tensor.name):
                sizes[str(self._target(tensor.name))] += int(tensor.n_elements)
        wrong = [name for name, size in sizes.items() if size != math.prod(shapes[name])]
        if wrong:
            raise InputError(
                f"{self._file.path}: {wrong[0]} has {sizes[wrong[0]]:,} weights and its configuration wants "
                f"{list(shapes[wrong[0]])}; {ANOTHER}"
            )

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values, float32, one at a time in the order of `shapes`; never two of them in memory."""
        from gguf import dequantize

        awaited = dict(self._order)
        parts: dict[str, torch.Tensor] = {}
        for tensor in self._file._reader.tensors:
            target = self._target(tensor.name)
            if target is None or IGNORED.search(tensor.name):
                continue
            result = self._processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=self._names,
                parsed_parameters={"tensors": parts},
            )
            if result.name is not None:
                parts[target] = torch.from_numpy(np.require(result.weights, requirements=["C", "W"]))
            awaited[target] -= 1
            if not awaited[target]:
                value = parts.pop(target)
                if tuple(value.shape) != self.shapes[target]:
                    raise InputError(
                        f"{self._file.path}: {tensor.name} is {list(value.shape)} and its configuration wants "
                        f"{list(self.shapes[target])}; {ANOTHER}"
                    )
                yield target, value


def llama3_factors(base: float, dim: int, factor: float) -> np.ndarray:
    """What Llama 3.1 and later divide the rotary frequencies by, float32 [dim / 2].

    As llama.cpp's converter writes it (``LlamaModel.generate_extra_tensors``), from a context of 8,192.
    """
    low, high, old = (
        LLAMA3["low_freq_factor"],
        LLAMA3["high_freq_factor"],
        LLAMA3["original_max_position_embeddings"],
    )
    turns = old * base ** (-np.arange(0, dim, 2) / dim) / (2 * math.pi)  # in the old context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
