"""What ``config.json`` says, as ``transformers`` reads it; of a model with a text part, that part's.

A model that sees or hears too keeps its text model's settings in ``text_config`` (Gemma 3, Mistral 3, LLaVA). Where the
library has a causal language model of that part alone, it is what is recorded: the same weights under other names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from tinyonn.dense.source import read_model_config
from tinyonn.errors import InputError

# Names of the text model's tensors in the checkpoint of the whole -> in the text model's own, by pattern.
TEXT_NAMES = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
MOST_LAYERS = 10_000
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


def text_settings(folder: Path) -> tuple[Any, bool]:
    """A model's settings as ``transformers`` reads them, and whether they are the text part of something larger.

    Raises
    ------
    InputError
        It has a text part that the library cannot run alone.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tree = read_model_config(folder)
    try:
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        text = whole.get_text_config(decoder=True)
        if not isinstance(text, transformers.PretrainedConfig):
            raise TypeError(f"its text part is a {type(text).__name__}")
    except Exception as error:  # every architecture checks, or trips over, its own
        raise InputError(
            f"{folder / 'config.json'}: model_type {tree.get('model_type')!r} is not a causal language model that "
            f"transformers {transformers.__version__} can build from these settings ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); save the model again, or choose another"
        ) from None
    _check_layers(folder, text)
    if text is whole:
        return whole, False
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"{folder}: model_type {whole.model_type!r} is more than a language model, and transformers has no causal "
            f"language model of its text part {text.model_type!r} alone; give a text-only model of its family, or save "
            "its language model as one"
        )
    from tinyonn.dense.checkpoint import tensor_files

    stored = tensor_files(folder)  # settings of the whole and of its text part often differ in this
    apart = any(key.endswith("lm_head.weight") for key in stored)
    text.tie_word_embeddings = not apart if stored else bool(getattr(whole, "tie_word_embeddings", False))
    return text, True


def _check_layers(folder: Path, text: Any) -> None:
    """Refuse numbers of layers that cannot be meant: every one is built, if only to be listed."""
    layers = getattr(text, "num_hidden_layers", 0)
    if not isinstance(layers, int) or not 0 <= layers <= MOST_LAYERS:
        raise InputError(
            f"{folder / 'config.json'}: num_hidden_layers = {layers!r}; give the model's own, at most {MOST_LAYERS:,}"
        )


def context_length(folder: Path) -> int | None:
    """Longest sample the model was made for, in tokens; None if its configuration does not say."""
    return _number(folder, "max_position_embeddings", "n_positions")


def vocabulary_size(folder: Path) -> int | None:
    """Rows of the model's embeddings; None if its configuration does not say."""
    return _number(folder, "vocab_size")


def base_settings(folder: Path) -> dict[str, Any]:
    """The tree of ``config.json``, or of the text part's settings."""
    tree = read_model_config(folder)
    return tree if _is_flat(tree) else dict(text_settings(folder)[0].to_dict())


def _is_flat(tree: dict[str, Any]) -> bool:
    return not any(isinstance(tree.get(key), dict) for key in TEXT_PARTS)


def _number(folder: Path, *names: str) -> int | None:
    """An integer of the settings; what a text part leaves out is its class's default."""
    tree = read_model_config(folder)
    values = [tree.get(name) for name in names]
    if not _is_flat(tree):
        text, _ = text_settings(folder)
        values = [getattr(text, name, None) for name in names]
    return next((value for value in values if isinstance(value, int)), None)
