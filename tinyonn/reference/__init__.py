"""The model and the corpus that ship with the project: small, real, and enough for every stage to run on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_HERE = Path(__file__).parent


def model_path() -> Path:
    """Folder of the reference model.

    Returns
    -------
    Path
        A `transformers` checkpoint (Qwen2, BF16 safetensors, tokenizer, chat template) with its model card.
    """
    return _HERE / "model"


def corpus_path(split: Literal["train", "heldout"] = "train") -> Path:
    """Parquet file of one split of the reference corpus.

    Parameters
    ----------
    split
        ``"train"``, which the reference model and its tokenizer were trained on, or ``"heldout"``, cut from
        files that the train split has nothing of.

    Returns
    -------
    Path
        Parquet with the columns `slice` (string), `messages` (list of {role, content}, or null), `text`
        (string, or null) and `source` (string); every row has either `messages` or `text`.

    Raises
    ------
    ValueError
        If `split` is neither of the two.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"the reference corpus has no split {split!r}; it has 'train' and 'heldout'")
    return _HERE / "corpus" / f"{split}.parquet"
