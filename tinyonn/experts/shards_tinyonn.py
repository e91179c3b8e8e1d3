"""Files of weights: whole, complete and of one assembly, or refused by name; saved beside exported models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

ASSEMBLY = "assembly"


def check_shards(
    files: Iterable[str | Path],
    shapes: Mapping[str, Sequence[int]],
    assembly: str | None,
    tied: Mapping[str, str],
    optional: str | None = None,
) -> None:
    """Read the headers of all shards and compare them with what the model needs.

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
        A shard is missing, truncated or of another assembly; a tensor is missing or has another shape.
    """
    found: set[str] = set()
    for path in map(Path, files):
        if not path.is_file():
            raise ValueError(f"{path} is missing; fetch the model again, all shards of its index are needed")
        try:
            with safe_open(path, framework="pt") as shard:
                metadata = shard.metadata() or {}
                sizes = {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is truncated or damaged ({error}); fetch it again"
            ) from None
        if assembly is not None and metadata.get(ASSEMBLY) != assembly:
            raise ValueError(
                f"{path} belongs to assembly {metadata.get(ASSEMBLY, 'unknown')} but config.json to {assembly}; "
                "put all files of one assembly into the folder"
            )
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


def stamp(path: str | Path, entries: Mapping[str, str]) -> None:
    """Add entries to a safetensors file's metadata; the tensors stay as they are.

    The file is written anew beside itself and takes the old one's place whole.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with path.open("rb") as source, partial.open("wb") as target:
            header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
            header["__metadata__"] = {**header.get("__metadata__", {}), **entries}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # the format aligns tensors to 8 bytes
            target.write(len(text).to_bytes(8, "little"))
            target.write(text)
            shutil.copyfileobj(source, target, 1 << 22)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
