"""What `docs/families.md` says of each family, and the settings of models that are refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.dense.architectures import ARCHITECTURES, COMMON, FAMILIES, REFUSED

# Family -> its name, and what is particular.
FAMILY_NOTES: dict[str, tuple[str, str]] = {
    "qwen2": ("Qwen 2, Qwen 2.5", "biases on query, key and value"),
    "qwen2_tied": ("Qwen 2, tied", "embeddings and head are one tensor, recorded once"),
    "qwen3": ("Qwen 3", "norms of query and key"),
    "qwen3_wide": ("Qwen 3, heads of 24", "a head width of its own; rows that are no whole NF4 blocks"),
    "llama": ("Llama 2, 3", ""),
    "llama_biases": ("Llama with biases", "on attention and MLP"),
    "mistral": ("Mistral", ""),
    "mistral_window": ("Mistral, window", "sliding window shorter than the text"),
    "mistral3_vision": ("Mistral 3", "the text part of a vision model"),
    "gemma": ("Gemma", "scaled embeddings, norms of 1 + w"),
    "gemma2": ("Gemma 2", "soft caps on attention and on the logits; eager attention; local layers"),
    "gemma3": ("Gemma 3, text", "local layers, norms of query and key"),
    "gemma3_vision": ("Gemma 3, vision", "the text part of a vision model"),
    "gpt2": ("GPT-2", "Conv1D, learned positions"),
    "gpt2_narrow": ("GPT-2, width 48", "rows that are no whole NF4 blocks"),
    "gpt_neox": ("GPT-NeoX, Pythia", "its files name the head embed_out"),
    "opt": ("OPT", "learned positions with an offset"),
    "phi3": ("Phi-3", "fused qkv and gate_up"),
    "olmo2": ("OLMo 2", "norms behind the layers"),
    "granite": ("Granite 3", "multipliers; logits divided by a scale"),
    "cohere": ("Cohere Command R", "LayerNorm without bias; logits times a scale"),
    "starcoder2": ("StarCoder 2", "biases, LayerNorm, sliding window"),
    "minicpm3": ("MiniCPM 3", "latent attention; what the head reads is scaled"),
    "smollm3": ("SmolLM 3", "layers without positions"),
}


@dataclass(frozen=True)
class Refusal:
    """A kind that is refused: its settings, why, and what the message says of it (a pattern)."""

    family: str
    kind: str
    options: dict[str, Any]
    why: str
    message: str


MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
FEW = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 264}
REFUSALS: dict[str, Refusal] = {
    "qwen2_moe": Refusal(
        "Qwen 2 MoE", *REFUSED["qwen2_moe"], "experts fused into tensors of 3 dimensions",
        r"mlp\.experts\.gate_up_proj .* of Qwen2MoeExperts \(a fused tensor of 3 dimensions",
    ),
    "mixtral": Refusal(
        "Mixtral", *REFUSED["mixtral"], "experts fused into tensors of 3 dimensions",
        r"mlp\.experts\.gate_up_proj .* of MixtralExperts \(a fused tensor of 3 dimensions",
    ),
    "qwen2_5_vl": Refusal(
        "Qwen 2.5-VL, Qwen 3-VL", "qwen2_5_vl",
        {"text_config": {**COMMON, "model_type": "qwen2_5_vl_text", "rope_parameters": MROPE}, "vision_config": {}},
        "transformers has no causal language model of the text part alone",
        r"no causal language model of its text part 'qwen2_5_vl_text' alone; give a text-only model",
    ),
    "mamba": Refusal(
        "Mamba, Jamba, Bamba, Zamba, Falcon-H1", "mamba", FEW, "state spaces: parameters outside of linear layers",
        r"A_log .* of MambaMixer",
    ),
    "bert": Refusal(
        "BERT and its kin as decoders", "bert", {**FEW, "num_attention_heads": 2, "is_decoder": True},
        "the head is more than a product", r"cls\.predictions\.bias .* of BertLMPredictionHead",
    ),
    "modernbert": Refusal(
        "ModernBERT decoder", "modernbert-decoder",
        {**FEW, "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
         "sep_token_id": 2},
        "the head is more than a product", r"does more between its decoder and its head than a product",
    ),
    "bart": Refusal(
        "BART, mBART, Whisper as decoders", "bart",
        {"d_model": 64, "vocab_size": 264, "decoder_layers": 2, "decoder_attention_heads": 2},
        "cross-attention that a text alone never runs", r"encoder_attn\.k_proj is called 0 times",
    ),
    "gemma3n": Refusal(
        "Gemma 3n", "gemma3n_text", {**FEW, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2},
        "parameters outside of linear layers", r"altup\.correct_output_scale .* of Gemma3nTextAltUp",
    ),
    "falcon": Refusal(
        "Falcon", "falcon", {**FEW, "num_attention_heads": 2}, "a linear layer of its own class",
        r"query_key_value\.weight .* of FalconLinear",
    ),
}  # fmt: skip


def write_settings(name: str, folder: Path) -> Path:
    """A folder with the ``config.json`` of a model that is refused, and no more; the folder."""
    from transformers import CONFIG_MAPPING

    refusal = REFUSALS[name]
    folder.mkdir(parents=True, exist_ok=True)
    tree = CONFIG_MAPPING[refusal.kind](**refusal.options).to_dict()
    (folder / "config.json").write_text(json.dumps(tree), "utf-8")
    return folder


def families_table() -> str:
    """Markdown, as the docs have it."""
    lines = ["| family | `model_type` | what is particular | NF4 | none |", "|---|---|---|---|---|"]
    for name, (family, note) in FAMILY_NOTES.items():
        kind, _ = {**ARCHITECTURES, **FAMILIES}[name]
        lines.append(f"| {family} | `{kind}` | {note} | equal | equal |")
    return "\n".join(lines)


def refusals_table() -> str:
    """Markdown, as the docs have it."""
    lines = ["| family | `model_type` | why |", "|---|---|---|"]
    lines += [f"| {one.family} | `{one.kind}` | {one.why} |" for one in REFUSALS.values()]
    return "\n".join(lines)
