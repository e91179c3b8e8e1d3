"""A GGUF as an ordinary folder of ``transformers``, made once in a cache of this machine.

The cache is the library's place for such things, ``<HF_HOME>/assets/tinyonn/gguf`` (``HF_ASSETS_CACHE`` moves it). A
folder is named by content: of the file's head (configuration and tokenizer alone, made in seconds) or of all of it and
the type of the weights. It is written beside its place and renamed, one process at a time; one that was killed leaves
nothing that is taken for a model, and what it left is removed by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tinyonn.dense.gguf_file import GGUFFile, GGUFTensors
from tinyonn.dense.quiet import quiet
from tinyonn.errors import CapacityError, InputError
from tinyonn.files import SEALS, folder_fault, seal_folder
from tinyonn.machine import free_disk
from tinyonn.show.sizes import format_size

HEAD = 64 << 20  # bytes, more than any configuration and vocabulary take
SHARD = 1 << 30  # bytes of a file of weights: what is held in memory beside the tensor that is read
FACTS = "gguf.json"
_WHOLE: set[Path] = set()  # folders that this process has made or compared
LICENCE = "---\nlicense: {}\n---\n"

logger = logging.getLogger(__name__)


def gguf_shell(path: Path) -> Path:
    """Folder with the configuration and the tokenizer of a GGUF, without weights.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    Path

    Raises
    ------
    InputError
        It cannot be read, its architecture is not known, or the ``gguf`` package is missing.
    CapacityError
        The disk of the cache is full.
    """
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(HEAD))
    return _made(digest.hexdigest(), lambda folder: _write_shell(GGUFFile(path), folder))


def gguf_weights(path: Path, dtype: str, digest: Callable[[Path], str]) -> Path:
    """Folder with the configuration, the tokenizer and the weights of a GGUF as safetensors.

    Reads one tensor at a time; holds `SHARD` bytes and that tensor in float32.

    Parameters
    ----------
    path : Path
        The file.
    dtype : str
        Of the weights, ``bfloat16`` or ``float32``; rounded once from float32 as ``from_pretrained``
        rounds a ``gguf_file``.
    digest : callable
        Gives the SHA-256 of a file's content.

    Returns
    -------
    Path

    Raises
    ------
    InputError
        As `gguf_shell`, or its tensors do not fit its configuration.
    CapacityError
        The disk of the cache is too small.
    """
    shell = gguf_shell(path)
    kind = getattr(torch, dtype)
    return _made(
        f"{digest(path)}-{dtype}", lambda folder: _write_weights(GGUFFile(path), shell, folder, kind)
    )


def describe_gguf(path: Path) -> str:
    """One line: the file's name, its tensors by type, and what the values were rounded to before."""
    facts = json.loads((gguf_shell(path) / FACTS).read_text("utf-8"))
    return f"{path.name}: {facts['described']}"


def cache_folder() -> Path:
    """Where converted files lie on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE).expanduser() / "tinyonn" / "gguf"


def _made(name: str, write: Callable[[Path], None]) -> Path:
    """The cache's folder of a name; written where it is not there, by one process while others wait."""
    place = cache_folder() / name
    if _is_whole(place):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(place.with_name(f"{name}.lock")):
            if _is_whole(place):
                return place
            shutil.rmtree(place, ignore_errors=True)
            for left in place.parent.glob(f"{name}.*.part"):
                shutil.rmtree(left, ignore_errors=True)
            side = place.with_name(f"{name}.{os.getpid()}.part")
            side.mkdir()
            try:
                write(side)
                seal_folder(side, side.iterdir())
                with contextlib.suppress(OSError):  # where locks do not hold, another was first with the same
                    side.rename(place)
            finally:
                shutil.rmtree(side, ignore_errors=True)
    except OSError as error:
        raise CapacityError(
            f"{place.parent}: a GGUF cannot be converted there ({error}); "
            "set HF_HOME or HF_ASSETS_CACHE to a disk with room"
        ) from None
    assert place.is_dir()
    _WHOLE.add(place)
    return place


def _is_whole(place: Path) -> bool:
    """Whether a folder of the cache is there and as it was written; read once by a process."""
    if place in _WHOLE and place.is_dir():
        return True
    if not place.is_dir():
        return False
    if fault := folder_fault(place):
        logger.warning("%s; it is made again", fault)
        return False
    _WHOLE.add(place)
    return True


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        with contextlib.suppress(OSError):  # a disk without locks: whoever is first wins
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _write_shell(file: GGUFFile, folder: Path) -> None:
    from transformers import GenerationConfig

    logger.info("%s: reading its configuration and tokenizer, once", file.path.name)
    config = file.config()
    model = _empty(file.path, config)
    file.read(model)  # refused here, before a corpus is read
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    file.tokenizer().save_pretrained(folder)
    if file.licence is not None:
        (folder / "README.md").write_text(LICENCE.format(json.dumps(file.licence)), "utf-8")
    (folder / FACTS).write_text(json.dumps({"described": file.describe()}), "utf-8")


def _write_weights(file: GGUFFile, shell: Path, folder: Path, dtype: torch.dtype) -> None:
    from transformers import AutoConfig

    tensors = file.read(_empty(file.path, AutoConfig.from_pretrained(shell, local_files_only=True)))
    shards = _shards(tensors, dtype)
    needed, free = sum(size for _, size in shards), free_disk(folder)
    if needed > free:
        raise CapacityError(
            f"{file.path}: its weights as {dtype} need {format_size(needed)} in {folder.parent}, where "
            f"{format_size(free)} are free; set HF_HOME or HF_ASSETS_CACHE to a disk with room"
        )
    logger.info(
        "%s: converting it to %s of %s in %s, once", file.path.name, format_size(needed), dtype, folder.parent
    )
    shutil.copytree(shell, folder, ignore=shutil.ignore_patterns(SEALS), dirs_exist_ok=True)
    tree = json.loads((folder / "config.json").read_text("utf-8"))
    tree["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n", "utf-8")
    _write_shards(tensors, [names for names, _ in shards], folder, dtype)


def _write_shards(tensors: GGUFTensors, shards: list[list[str]], folder: Path, dtype: torch.dtype) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    files = [f"model-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)]
    stream = iter(tensors)
    total = 0
    for names, file in zip(shards, files, strict=True):
        held = {name: value.to(dtype) for name, value in (next(stream) for _ in names)}
        assert list(held) == names
        total += sum(value.nbytes for value in held.values())
        try:
            save_file(held, folder / file, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for names, file in zip(shards, files, strict=True) for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")


def _shards(tensors: GGUFTensors, dtype: torch.dtype) -> list[tuple[list[str], int]]:
    """Names of the tensors of each file, and its bytes."""
    shards: list[tuple[list[str], int]] = [([], 0)]
    for name, shape in tensors.shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        names, held = shards[-1]
        if names and held + size > SHARD:
            shards.append(([name], size))
        else:
            shards[-1] = ([*names, name], held + size)
    return shards


def _empty(path: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{path}: {config.model_type!r} is not a causal language model that transformers can build "
            f"({type(error).__name__}: {error}); choose another model"
        ) from None
    model.tie_weights()
    return model
