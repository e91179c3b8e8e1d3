"""Checkpoints: all that a training needs to go on to the same bits, whole or not there.

    <train>/checkpoint-00000123/state.safetensors   trained weights, optimizers' state, running means
    <train>/checkpoint-00000123/state.json          step, what the training is of, sizes and checksums; written last

A checkpoint is written into a folder with another name, synced, and renamed; a kill leaves the older ones. Random
numbers are functions of seed and step, so none of their state is kept.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from tinyonn.dense.copies import copy_file, tokenizer_files
from tinyonn.errors import CapacityError, InputError, StoreDamagedError
from tinyonn.experts.folder import seal_model
from tinyonn.files import file_checksum, read_json, sync, write_json
from tinyonn.model.digests_tinyonn import seal_file
from tinyonn.score.source import digest
from tinyonn.store.faults import is_full
from tinyonn.train.optimizers import load_state_tensors, state_tensors
from tinyonn.train.stages import Rules

LOG = logging.getLogger(__name__)
FORMAT = 1
NAME = "checkpoint-{:08d}"
# Of options that were: the value at which a training did without, None being any. Older checkpoints are of such ones.
REMOVED: dict[str, Any] = {
    "router.max_k": None,
    "router.gate": "one",
    "weights.specificity": 0.0,
    "schedule.form": "linear",
}
TENSORS, ABOUT = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What is resumed.

    Attributes
    ----------
    step : int
        Steps done.
    tensors : dict of str to Tensor
    state : dict
        JSON.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training.

    Parameters
    ----------
    folder : path
        ``<train>``; made if it is not there.
    identity : mapping
        What the training is of, JSON, flat: assembly, corpus, options that decide the result. A checkpoint of another
        one is refused.
    keep : int
        How many of the latest stay.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and remove those that are too old."""
        target = self.folder / NAME.format(step)
        side = self.folder / f".{target.name}.part"
        shutil.rmtree(side, ignore_errors=True)
        try:
            side.mkdir()
            content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(content, side / TENSORS)
            sync(side / TENSORS)
            about = {
                "format": FORMAT,
                "step": step,
                "identity": self.identity,
                "state": dict(state),
                "bytes": (side / TENSORS).stat().st_size,
                "crc32": file_checksum(side / TENSORS),
            }
            write_json(side / ABOUT, about)
            shutil.rmtree(target, ignore_errors=True)
            side.rename(target)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(side, ignore_errors=True)
            if is_full(error):
                raise CapacityError(
                    f"{target}: no space left for the checkpoint; free some and run again, "
                    "training goes on from the checkpoint before"
                ) from None
            raise
        for path in self.paths()[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)
        return target

    def paths(self) -> list[Path]:
        """Folders of complete checkpoints, the oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if (path / ABOUT).is_file()]
        return sorted(found, key=lambda path: path.name)

    def latest(self) -> Checkpoint | None:
        """The newest that is whole; damaged ones are passed over with a warning."""
        for side in self.folder.glob(".checkpoint-*.part"):
            shutil.rmtree(side, ignore_errors=True)
        for path in reversed(self.paths()):
            try:
                about = read_json(path / ABOUT, "an older one is used")
                if about["format"] != FORMAT:
                    raise ValueError(f"format {about['format']}, this version reads {FORMAT}")
                self._compare(path, about["identity"])
                size = (path / TENSORS).stat().st_size
                if size != about["bytes"] or file_checksum(path / TENSORS) != about["crc32"]:
                    raise ValueError(f"{TENSORS} has other bytes than were written")
                return Checkpoint(about["step"], load_file(path / TENSORS), about["state"])
            except (OSError, ValueError, KeyError, TypeError, SafetensorError, StoreDamagedError) as error:
                LOG.warning("%s is damaged (%s) and is passed over", path, error)
        return None

    def _compare(self, path: Path, found: Mapping[str, Any]) -> None:
        found = without_removed(found)
        for name in [*self.identity, *found]:
            ours, theirs = self.identity.get(name), found.get(name)
            if ours != theirs:
                raise InputError(
                    f"{path} is of another training: {name} is {theirs!r} there and {ours!r} now; "
                    "use the same options, or start anew with --fresh"
                )

    def clear(self) -> None:
        """Remove all checkpoints."""
        for path in (*self.folder.glob("checkpoint-*"), *self.folder.glob(".checkpoint-*.part")):
            shutil.rmtree(path, ignore_errors=True)


def without_removed(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a training was of, without options that are no more and that it did without."""
    unused = {name for name, value in REMOVED.items() if value is None or identity.get(name) == value}
    return {name: value for name, value in identity.items() if name not in unused}


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters that learn, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def take(
    model: Any, optimizers: Sequence[Optimizer], rules: Rules
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON for `Checkpoints.save`."""
    state, settings = state_tensors(optimizers)
    tensors = {f"model/{name}": tensor for name, tensor in _changing(model).items()}
    tensors |= {f"optimizers/{name}": tensor for name, tensor in state.items()}
    tensors |= {f"rules/{name}": tensor for name, tensor in rules.state().items()}
    return tensors, {"optimizers": settings}


@torch.no_grad()
def put_back(found: Checkpoint, model: Any, optimizers: Sequence[Optimizer], rules: Rules) -> None:
    """Bring a training into the state that was taken, bit for bit."""
    load_state_tensors(optimizers, _below("optimizers/", found.tensors), found.state["optimizers"])
    own = _changing(model)
    for name, tensor in _below("model/", found.tensors).items():
        own[name].copy_(tensor)
    rules.load_state(_below("rules/", found.tensors))


def _changing(model: Any) -> dict[str, torch.Tensor]:
    """Trained parameters, and the router's bias, which has no gradient."""
    found: dict[str, torch.Tensor] = {name: parameter.detach() for name, parameter in trained(model)}
    router = getattr(model, "router", None)
    if router is not None:
        found |= {f"router.{name}": buffer for name, buffer in router.named_buffers()}
    return found


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def save_model(
    model: Any,
    folder: str | Path,
    training: Mapping[str, Any],
    source: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a model; the folder is whole or what it was before. The model in memory stays as it is."""
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
