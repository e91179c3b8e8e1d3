"""Small models as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from tests.dense.architectures import CHAT_TEMPLATE, SPECIAL, make_model

MERGES = ("h e", "l l", "he ll", "hell o")
TOKENS = [
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *SPECIAL,
    *(pair.replace(" ", "") for pair in MERGES),
    "<unused>",
]
TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # of GPT-2
Values = np.ndarray[Any, Any]


def write_gguf(
    path: Path,
    name: str,
    kind: str = "F32",
    say: Callable[[gguf.GGUFWriter], None] | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    drop: str = "",
    **changes: Any,
) -> Path:
    """Write a random model of an architecture as a GGUF file, and the same model, as quantized, as a folder beside it.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        A key of `tests.dense.architectures.ARCHITECTURES`.
    kind : str
        ``F32`` or the name of a quantized type: of matrices.
    say : callable, optional
        Writes more keys and tensors.
    tokenizer : callable, optional
        Writes it; by default `say_tokenizer`.
    drop : str
        A tensor that is left out.
    **changes
        Of the configuration.

    Returns
    -------
    Path
        The folder.
    """
    folder = make_model(name, path.with_suffix(""), **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    architecture = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    say_configuration(writer, config)
    (tokenizer or say_tokenizer)(writer)
    if say is not None:
        say(writer)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for key, parameter in model.named_parameters():
        place = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert place is not None
        if place == drop:
            continue
        values = changed(place, parameter.detach().numpy(), config)
        if kind == "F32" or values.ndim == 1:
            writer.add_tensor(place, values)
            continue
        quantized = gguf.GGMLQuantizationType[kind]
        packed = gguf.quantize(values, quantized)
        writer.add_tensor(place, packed, raw_dtype=quantized)
        with torch.no_grad():
            parameter.copy_(
                torch.from_numpy(changed(place, gguf.dequantize(packed, quantized), config, back=True))
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_pretrained(folder)
    return folder


def say_configuration(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_epsilon)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)


def say_tokenizer(writer: gguf.GGUFWriter) -> None:
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in TOKENS]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types(kinds)
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(TOKENS.index(SPECIAL[0]))
    writer.add_eos_token_id(TOKENS.index(SPECIAL[2]))
    writer.add_pad_token_id(TOKENS.index(SPECIAL[0]))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def say_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """Of Llama 2's kind: scores for merges, bytes for what has no token."""
    special = ["<unk>", "<s>", "</s>"]
    letters = ["\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello", "\u2581h"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(at) for at in range(len(letters))])
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * len(letters)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def changed(place: str, values: Values, config: Any, back: bool = False) -> Values:
    """What llama.cpp's converter does to a tensor, or undoes."""
    kind = config.model_type
    if kind == "llama" and (
        "attn_q." in place or "attn_k." in place
    ):  # rotary pairs side by side, not in halves
        heads = config.num_attention_heads if "attn_q." in place else config.num_key_value_heads
        half = len(values) // heads // 2
        order = (heads, half, 2) if back else (heads, 2, half)
        return values.reshape(*order, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if kind == "gpt2" and place.endswith(TRANSPOSED):
        return np.ascontiguousarray(values.T)
    if kind.startswith("gemma") and place.endswith("norm.weight"):
        return values - 1 if back else values + 1
    return values
