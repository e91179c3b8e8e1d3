"""Small random models of every supported architecture, saved with a tokenizer and a chat template.

`ARCHITECTURES` differ in what the recorder sees of them; `FAMILIES` are further ones, each with something of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

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
GEMMA: dict[str, Any] = {
    **ARCHITECTURES["gemma"][1],
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_biases": ("llama", {**COMMON, "attention_bias": True, "mlp_bias": True}),
    "mistral_window": ("mistral", {**COMMON, "head_dim": 16, "sliding_window": 8}),
    "qwen3_wide": ("qwen3", {**COMMON, "head_dim": 24}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3_vision": (
        "gemma3",
        {
            "text_config": {**GEMMA, "model_type": "gemma3_text"},
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3_vision": (
        "mistral3",
        {
            "text_config": {**COMMON, "head_dim": 16, "model_type": "mistral"},
            "vision_config": {**VISION, "model_type": "pixtral"},
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("phi3", COMMON),
    "olmo2": ("olmo2", COMMON),
    "granite": (
        "granite",
        {
            **COMMON,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.6,
            "logits_scaling": 6.0,
        },
    ),
    "cohere": ("cohere", {**COMMON, "logit_scale": 0.3, "tie_word_embeddings": True}),
    "starcoder2": ("starcoder2", {**COMMON, "tie_word_embeddings": True, "sliding_window": 8}),
    "minicpm3": (
        "minicpm3",
        {
            **COMMON,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "scale_emb": 2,
            "dim_model_base": 16,
        },
    ),
    "smollm3": ("smollm3", {**COMMON, "no_rope_layers": [1, 0]}),
    "gpt_neox": ("gpt_neox", {**COMMON, "rotary_pct": 0.25}),
    "gpt2_narrow": ("gpt2", {**ARCHITECTURES["gpt2"][1], "n_embd": 48}),
    "opt": (
        "opt",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 64,
            "init_std": 0.1,
            "pad_token_id": 1,
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
    "mixtral": ("mixtral", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
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
        A key of `ARCHITECTURES`, `FAMILIES` or `REFUSED`.
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
    kind, options = {**ARCHITECTURES, **FAMILIES, **REFUSED}[name]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**options | changes)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    maker = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model = maker.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    make_tokenizer(Path(folder))
    return Path(folder)
