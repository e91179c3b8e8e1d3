"""Which files hold a model's weights, and its tensors in them: those that ``transformers`` would read, and no other.

In this order: ``model.safetensors``, the files that ``model.safetensors.index.json`` names, ``pytorch_model.bin``, the
files that ``pytorch_model.bin.index.json`` names. What lies beside them, such as a ``consolidated.safetensors``, is no
part of the model. A ``.bin`` is a pickle and is read as tensors alone (``torch.load(weights_only=True)``): whatever
else it would build or call is refused by the reader before it happens (docs/decisions/022-weights-only.md). From the
hub no more is fetched than is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyonn.errors import InputError
from tinyonn.show.progress import Bar, hub_bar

if TYPE_CHECKING:
    import torch

    from tinyonn.config import ModelConfig

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
BIN = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SCALED = ("F8", "F6", "F4", "FLOAT8", "FLOAT4")  # types that mean nothing without a scale
AGAIN = "fetch or save the model again"


def weight_files(folder: Path) -> list[Path]:
    """Files of the weights, sorted; empty if there are none.

    Raises
    ------
    InputError
        An index is damaged, names a file that is not there or one outside the folder.
    """
    first = _first(folder)
    if first is None or first.suffix != ".json":
        return [] if first is None else [first]
    files = [folder / name for name in named_files(first)]
    for path in files:
        if not path.is_file():
            raise InputError(f"{first} names {path.name}, which is not there; {AGAIN}")
    return files


def _first(folder: Path) -> Path | None:
    """The file or index that comes first in the order."""
    places = (folder / name for name in (*SAFETENSORS, *BIN))
    return next((place for place in places if place.is_file()), None)


def named_files(index: Path) -> list[str]:
    """Names that an index gives to the files beside it, sorted."""
    return sorted(set(_weight_map(index).values()))


def tensor_files(folder: Path, remedy: str = AGAIN) -> dict[str, Path]:
    """File of every tensor of a checkpoint; empty if it has none.

    Parameters
    ----------
    folder : Path
    remedy : str
        For a file that is damaged.

    Raises
    ------
    InputError
        A file cannot be read, or an index is wrong.
    """
    files, first = weight_files(folder), _first(folder)
    if first is not None and first.suffix == ".json":
        return {key: folder / file for key, file in _weight_map(first).items()}
    found: dict[str, Path] = {}
    for path in files:
        with open_tensors(path, remedy) as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


@contextlib.contextmanager
def open_tensors(path: Path, remedy: str = AGAIN) -> Iterator[Any]:
    """Open a file of tensors with the methods of ``safetensors.safe_open``: ``keys``, ``get_tensor``, ``get_slice``.

    Tensors are read when they are asked for, of a ``.bin`` too, unless it is older than Torch 1.6.

    Raises
    ------
    InputError
        It is damaged, or a pickle of more than tensors.
    """
    if path.suffix == ".bin":
        yield _unpickled(path, path.stat().st_mtime_ns, remedy)
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); {remedy}") from None


def check_tensors(files: list[Path]) -> None:
    """Refuse files that cannot be read as tensors, are not what this package wrote, or are scaled by others.

    Raises
    ------
    InputError
        Names the file, and the tensor.
    """
    from tinyonn.model.digests_tinyonn import check_files

    for path in files:
        with open_tensors(path) as file:
            if path.suffix != ".bin":
                _compare(check_files, path)
            for key in file.keys():  # noqa: SIM118
                if (kind := file.get_slice(key).get_dtype()).startswith(SCALED):
                    raise InputError(
                        f"{path}: {key} is {kind}, so the model is quantized already and its values are scaled by "
                        "others; give the original model, it is quantized here"
                    )


def _compare(check: Callable[[list[Path]], None], path: Path) -> None:
    try:
        check([path])
    except ValueError as error:
        raise InputError(str(error)) from None


@lru_cache(maxsize=1)  # a file of the old kind is in memory whole, and is asked for tensor after tensor
def _unpickled(path: Path, changed: int, remedy: str) -> _Unpickled:
    return _Unpickled(path, remedy)


class _Unpickled:
    """The tensors of a ``.bin``."""

    def __init__(self, path: Path, remedy: str) -> None:
        import torch

        try:
            mapped = zipfile.is_zipfile(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # pickle, zip and Torch each have their own
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise InputError(
                f"{path}: not readable as tensors alone, and nothing else of a pickle is read, since it can run code "
                f"({why}); {remedy}, or convert it where you trust it: "
                "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
            ) from None
        strange = "" if isinstance(found, dict) else type(found).__name__
        for key, value in found.items() if not strange else ():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                strange = f"{key!r}: {type(value).__name__}"
        if strange:
            raise InputError(
                f"{path}: not tensors by name ({strange}); save the model with save_pretrained() and give that folder"
            )
        self._tensors: dict[str, torch.Tensor] = found

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].contiguous().clone()

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._tensors[name])


class _Slice:
    """A tensor that is read where it is indexed."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return str(self._tensor.dtype).removeprefix("torch.").upper()

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self._tensor[key].clone()


def _weight_map(index: Path) -> dict[str, str]:
    try:
        tree = json.loads(index.read_text("utf-8"))
        names: dict[str, str] = dict(tree["weight_map"])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{index}: not a readable index ({type(error).__name__}: {error}); {AGAIN}"
        ) from None
    suffix = f".{index.name.split('.')[1]}"
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(suffix):
            raise InputError(
                f"{index} names {name!r}, which is not a *{suffix} file beside it; such a file is not opened. {AGAIN}"
            )
    return names


def fetch_weights(config: ModelConfig, folder: Path) -> None:
    """The files that an index names, or else the one file that takes its place; of the commit that was fetched."""
    config = config.model_copy(update={"revision": folder.name})
    for whole, index in (SAFETENSORS, BIN):
        if (folder / index).is_file():
            names = named_files(folder / index)
            if not all((folder / name).is_file() for name in names):
                fetch(config, tuple(names))
            return
        if (folder / whole).is_file() or (fetch(config, (whole,)) / whole).is_file():
            return


def fetch(config: ModelConfig, patterns: tuple[str, ...]) -> Path:
    """Fetch the files of a repository's top folder that match, unless they are in the cache; the folder they are in.

    Raises
    ------
    InputError
        No such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = config.path
    try:
        with Bar("fetching the model", unit="B") as bar:
            found = snapshot_download(
                name,
                revision=config.revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                tqdm_class=hub_bar(bar),
            )
            return Path(found)
    except GatedRepoError:
        raise InputError(
            f"model {name!r} wants its licence accepted on the hub and a login (hf auth login)"
        ) from None
    except RevisionNotFoundError:
        raise InputError(
            f"model.revision = {config.revision!r} is not a revision of {name!r} on the hub"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"model.path = {name!r} is neither a folder here nor a model on the hub; check the spelling, "
            "give a folder, or use 'reference'"
        ) from None
    except (
        Exception
    ) as error:  # httpx, offline mode, time-outs, cache misses: all mean that the hub is out of reach
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise InputError(
            f"model.path = {name!r} is not a folder here and the hub cannot be reached{offline}: "
            f"{type(error).__name__}; go online, give a folder with the model's files, or use 'reference'"
        ) from None
