"""Small random models of every supported architecture, saved with a tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 264  # 256 bytes and a few special tokens, rounded up
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", COMMON),
    "qwen2_tied": ("qwen2", {**COMMON, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**COMMON, "head_dim": 16}),
    "llama": ("llama", COMMON),
    "mistral": ("mistral", {**COMMON, "head_dim": 16}),
    "gemma": ("gemma", {**COMMON, "head_dim": 16, "tie_word_embeddings": True, "pad_token_id": 256}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB,
            "n_positions": 128,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.1,
            "bos_token_id": 256,
            "eos_token_id": 256,
        },
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": (
        "qwen2_moe",
        {
            **COMMON,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
}


def make_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Save a byte-level tokenizer of 256 bytes and three special tokens: every text is one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[0], chat_template=chat_template
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(name: str, folder: str | Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of an architecture, float32 safetensors, and its tokenizer.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES` or `REFUSED`.
    folder : path
        Made if it does not exist.
    seed : int
        Of the weights. Norms and biases, which start as ones and zeros, are random too.
    **changes
        Of the configuration.

    Returns
    -------
    Path
        The folder, for ``ModelConfig(path=str(folder))``.
    """
    kind, options = {**ARCHITECTURES, **REFUSED}[name]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options | changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    make_tokenizer(Path(folder))
    return Path(folder)
