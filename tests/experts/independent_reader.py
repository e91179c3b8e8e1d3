"""Reads an assembled folder with NumPy and the standard library alone: every kept weight with its place and expert.

    python tests/experts/independent_reader.py FOLDER

The files are safetensors: 8 bytes with the header's length, a JSON header with each tensor's type, shape and range of
bytes, then the bytes. A matrix of a linear layer is three tensors; entry e of expert g and row o has
row_pointer[g * out + o] <= e < row_pointer[g * out + o + 1], and stands at (o, columns[e]).
BF16 is the upper half of a float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"BF16": "<u2", "F32": "<f4", "U16": "<u2", "I32": "<i4"}
Weights = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def read_weights(folder: Path) -> Iterator[tuple[str, Weights]]:
    """Module, and the expert, row, column and value (float32) of each of its kept weights."""
    layers = json.loads((folder / "config.json").read_text("utf-8"))["sparse_layers"]
    files = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    for module, layer in layers.items():
        parts = [
            read_tensor(folder / files[name], name)
            for name in (f"base.{module}.{part}" for part in ("values", "columns", "row_pointer"))
        ]
        (kind, values), (_, columns), (_, pointer) = parts
        line = np.repeat(np.arange(pointer.size - 1), np.diff(pointer))
        wide = (values.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else values
        yield module, (line // layer["out"], line % layer["out"], columns.astype(np.int64), wide)


def read_tensor(path: Path, name: str) -> tuple[str, np.ndarray[Any, Any]]:
    """Type and elements of one tensor, flat."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(length))[name]
        first, last = entry["data_offsets"]
        stream.seek(8 + length + first)
        return entry["dtype"], np.frombuffer(stream.read(last - first), TYPES[entry["dtype"]])


if __name__ == "__main__":
    for module, (_, rows, _, _) in read_weights(Path(sys.argv[1])):
        print(module, rows.size)
