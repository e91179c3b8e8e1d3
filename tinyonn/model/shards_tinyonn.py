"""Files of weights: whole, complete and of one assembly, or refused by name; saved beside exported models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .digests_tinyonn import AGAIN, METADATA, check_files, read_header

ASSEMBLY = "assembly"
SHARD = re.compile(r"model[\w.-]*\.safetensors")


def check_shards(
    files: Iterable[str | Path],
    shapes: Mapping[str, Sequence[int]],
    assembly: str | None,
    tied: Mapping[str, str],
    optional: str | None = None,
) -> None:
    """Compare the headers of all shards with what the model needs, and the tensors' bytes with their digests.

    Parameters
    ----------
    files : paths of safetensors files
    shapes : dict
        Every tensor of the model and its shape.
    assembly : str, optional
        Must stand in every shard's metadata under ``assembly``; None checks shapes alone.
    tied : dict
        Pairs of tensors that are one; either may be absent.
    optional : str, optional
        Tensors whose names begin so may all be absent.

    Raises
    ------
    ValueError
        A shard is missing, damaged or of another assembly; a tensor is missing or has another shape.
    """
    found: set[str] = set()
    places = [Path(path) for path in files]
    for path in places:
        if not path.is_file():
            raise ValueError(f"{path} is missing; fetch the model again, all shards of its index are needed")
        header, _ = read_header(path)
        metadata = header.pop(METADATA, {})
        if assembly is not None and metadata.get(ASSEMBLY) != assembly:
            raise ValueError(
                f"{path} belongs to assembly {metadata.get(ASSEMBLY, 'unknown')} but config.json to {assembly}; "
                "put all files of one assembly into the folder"
            )
        sizes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        for name, size in sizes.items():
            if name in shapes and size != tuple(shapes[name]):
                raise ValueError(
                    f"{path}: {name} has shape {list(size)} but config.json asks for {list(shapes[name])}; "
                    "config.json and shards belong to different assemblies"
                )
        found |= sizes.keys()
    for one, other in tied.items():
        if one in found or other in found:
            found |= {one, other}
    if optional is not None and not any(name.startswith(optional) for name in found):
        found |= {name for name in shapes if name.startswith(optional)}
    lost = sorted(shapes.keys() - found)
    if lost:
        raise ValueError(
            f"{len(lost)} tensors are in none of the shards, {lost[0]} first; "
            "fetch or assemble the model again, with all its shards"
        )
    check_files(places)


def check_index(folder: str | Path, variant: str | None = None) -> None:
    """Compare the index of a folder's shards, if there is one, with the shards' own headers.

    Raises
    ------
    ValueError
        It is truncated or damaged, or names other tensors than its shards hold; names the file.
    """
    of = "" if variant is None else f".{variant}"
    path = Path(folder) / f"model.safetensors.index{of}.json"
    if not path.is_file() or (Path(folder) / f"model{of}.safetensors").is_file():
        return
    try:
        places = json.loads(path.read_text("utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        if strange := [name for name in files if not SHARD.fullmatch(name)]:
            raise ValueError(f"it names {strange[0]!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); {AGAIN}") from None
    if lost := [name for name in files if not (Path(folder) / name).is_file()]:
        raise ValueError(
            f"{path.parent / lost[0]} is missing, which {path.name} names; {AGAIN}, with all its shards"
        )
    if places != index_of(Path(folder) / name for name in files):
        raise ValueError(f"{path} is damaged (it names other tensors than its shards hold); {AGAIN}")


def index_of(files: Iterable[Path]) -> dict[str, str]:
    """File's name of every tensor, from the headers of the files.

    Raises
    ------
    ValueError
        One is truncated or damaged; names it.
    """
    return {name: path.name for path in files for name in read_header(path)[0] if name != METADATA}


def check_finite(model: Any, place: str) -> None:
    """Raise ValueError, naming the tensor, if a loaded model's weights are not finite."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta and tensor.itemsize > 1:
            low, high = tensor.detach().aminmax()
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(
                    f"{place}: {name} has values that are not finite; its file is damaged, {AGAIN}"
                )
