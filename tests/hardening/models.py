"""Models' files that are damaged in tests, and what is said to that."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tinyonn.errors import InputError
from tinyonn.experts.folder import open_assembled


def turn(path: Path, place: int, bit: int = 0) -> None:
    """Turn one bit of a file; places from the end are negative. Time of change stays."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def place_of(path: Path, name: str, element: int = 0) -> int:
    """Where an element of a tensor lies in its file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    key = next(key for key in header if key.endswith(name))
    first, last = header[key]["data_offsets"]
    elements = torch.Size(header[key]["shape"]).numel()
    return int(8 + length + first + element * (last - first) // elements)


def bare(folder: Path) -> None:
    """Take the digests out of a folder, as an earlier version wrote it."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            known = {k: v for k, v in file.metadata().items() if k not in ("digests", "seal")}
        save_file(load_file(path), path, known)
    tree = json.loads((folder / "config.json").read_text("utf-8"))
    tree.pop("digests", None)
    (folder / "config.json").write_text(json.dumps(tree), "utf-8")
    (folder / "digests.json").unlink(missing_ok=True)


def refusal(folder: Path) -> str:
    """What ``from_pretrained`` says; empty if it loads."""
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        return str(error) or "?"
    return ""


def refused(folder: Path) -> str:
    """What this package says; empty if it loads."""
    try:
        open_assembled(folder)
    except InputError as error:
        return str(error)
    return ""
