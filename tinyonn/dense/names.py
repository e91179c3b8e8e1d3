"""Under which names a checkpoint stores a model's tensors, as ``transformers`` maps them when it loads.

A family's files may have other names than its modules (GPT-NeoX stores its head as ``embed_out``), or leave out the
prefix of the base model; a text part lies below ``language_model``. The library's own rules are asked, so that what it
loads is what is found here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def checkpoint_names(model: Any, keys: Iterable[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Map the model's tensors to a checkpoint's, those left out that are made of several stored ones.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On the meta device, not quantized.
    keys : iterable of str
        Of the checkpoint.
    mapping : mapping of str to str
        Patterns of further names.

    Returns
    -------
    dict of str to str
        A name in the model's ``state_dict()`` -> in the checkpoint. Tied tensors go by any of their names.
    """
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
