"""A trained model as a folder like the assembled one, for ``AutoModelForCausalLM`` and everything that reads it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tinyonn.dense.copies import copy_file, tokenizer_files
from tinyonn.errors import CapacityError
from tinyonn.experts.folder import seal_model
from tinyonn.experts.source import digest
from tinyonn.model.digests_tinyonn import seal_file
from tinyonn.store.faults import is_full


def save_model(
    model: Any,
    folder: str | Path,
    training: Mapping[str, Any],
    source: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a model; the folder is whole or what it was before. The model in memory stays as it is.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Trained; sparse or not.
    folder : path
        Replaced if it is there.
    training : mapping
        Steps, options, losses: what a reader of ``config.json`` should know, JSON. A sparse model has it in
        ``config.assembly["training"]`` and gets a new ``id`` from it, so that its shards are not mixed up with those of
        the assembled model, whose id is kept as ``assembled``; another model has it in ``config.training``.
    source : path, optional
        Folder whose tokenizer is copied.
    dtype : torch.dtype
        Of all weights but the router's, which stay in float32.

    Raises
    ------
    CapacityError
        The disk is full.
    """
    target = Path(folder)
    side, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old")
    shutil.rmtree(side, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _marked(model, dict(training)), _cast(model, dtype):
            model.save_pretrained(side)
    except Exception as error:
        shutil.rmtree(side, ignore_errors=True)
        if is_full(error):
            raise CapacityError(
                f"{target}: no space left for the trained model; free some and run again"
            ) from None
        raise
    if not hasattr(model, "sparse_layers"):
        for path in side.glob("model*.safetensors"):
            seal_file(path)
    for path in tokenizer_files(Path(source)) if source is not None else ():
        copy_file(path, side)
    seal_model(side)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    side.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


@contextmanager
def _marked(model: Any, training: dict[str, Any]) -> Iterator[None]:
    config = model.config
    if not hasattr(model, "sparse_layers"):
        config.training = training
        yield
        return
    before = config.assembly
    known = before.get("assembled", before.get("id"))
    config.assembly = {
        **before,
        "id": digest([known, training]),
        "assembled": known,
        "training": training,
    }
    try:
        yield
    finally:
        config.assembly = before


@contextmanager
def _cast(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Weights in another dtype while inside."""
    masters: dict[str, torch.Tensor] = {}
    named = dict(model.named_parameters())
    before = model.config.dtype
    try:
        for name, parameter in named.items():
            if "router" not in name.split(".") and parameter.dtype != dtype:
                masters[name] = parameter.data
                parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for name, master in masters.items():
            named[name].data = master
        model.config.dtype = before
