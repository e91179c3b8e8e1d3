"""Families of models, small and random: what is recorded, and what is refused and why."""

from __future__ import annotations

from typing import Any

from tests.base.architectures import ARCHITECTURES, COMMON

GEMMA = {**COMMON, "head_dim": 16, "tie_word_embeddings": True, "pad_token_id": 256}
LOCAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

# Family -> model_type and configuration; `ARCHITECTURES` are the plain ones.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **ARCHITECTURES,
    "gpt2_ragged": ("gpt2", {**ARCHITECTURES["gpt2"][1], "n_embd": 48}),
    "llama_biases": ("llama", {**COMMON, "attention_bias": True, "mlp_bias": True}),
    "mistral_window": ("mistral", {**COMMON, "head_dim": 16, "sliding_window": 8}),
    "qwen3_head_width": ("qwen3", {**COMMON, "head_dim": 24}),
    "gemma2": (
        "gemma2",
        {**GEMMA, **LOCAL, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3_text": ("gemma3_text", {**GEMMA, **LOCAL, "query_pre_attn_scalar": 16}),
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
            "attention_bias": True,
        },
    ),
    "cohere": ("cohere", {**COMMON, "logit_scale": 0.3, "tie_word_embeddings": True, "use_qk_norm": False}),
    "starcoder2": ("starcoder2", {**COMMON, "use_bias": True, "tie_word_embeddings": True, "sliding_window": 8}),
    "smollm3": ("smollm3", {**COMMON, "no_rope_layers": [1, 0]}),
    "gpt_neox": ("gpt_neox", {**COMMON, "rotary_pct": 0.25, "use_parallel_residual": True}),
    "opt": (
        "opt",
        {
            "vocab_size": COMMON["vocab_size"],
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
