"""The weights of an assembled model, shard by shard: one for each decoder layer, one for what lies outside the layers.

A shard is written to a side file and renamed, so that it is whole or not there; its metadata name the assembly and hold
what is known of it, so that a later call can go on without it. A worker holds one tensor and one shard at a time.

In a compressed matrix with G groups, entries lie in the order of (group, row, column); group g has in row o the entries
``row_pointer[g * out + o] : row_pointer[g * out + o + 1]``. A value takes 2 bytes (BF16), a column 2, a pointer 4.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numba import njit

from tinyonn.dense.parameters import Parameter
from tinyonn.model.digests_tinyonn import METADATA, crc_of, header_text, read_header, sealed_metadata
from tinyonn.model.shards_tinyonn import ASSEMBLY
from tinyonn.score.source import DROPPED
from tinyonn.store.records import Float64, UInt8

if TYPE_CHECKING:
    from tinyonn.dense.weights import BaseWeights
    from tinyonn.score.source import Source
    from tinyonn.select.selection import Selection

WIDE = 1 << 16  # inputs, above which a column takes 4 bytes


class Compressed(NamedTuple):
    """One linear layer.

    Attributes
    ----------
    values : bfloat16 or float32 [entries]
    columns : uint16 or int32 [entries]
    row_pointer : int32 [groups * out + 1]
    sizes : int64 [groups]
        Entries of each group.
    """

    values: torch.Tensor
    columns: torch.Tensor
    row_pointer: torch.Tensor
    sizes: np.ndarray


def compress(W_OI: torch.Tensor, group_OI: UInt8, groups: int) -> Compressed:
    """Compress a matrix.

    Parameters
    ----------
    W_OI : bfloat16 or float32 [out, in]
    group_OI : uint8 [out, in]
        Number of each weight's group; those from `groups` on are left out.
    groups : int

    Returns
    -------
    Compressed
    """
    out, inputs = W_OI.shape
    bits = W_OI.contiguous().view(torch.uint16 if W_OI.dtype == torch.bfloat16 else torch.int32).numpy()
    counts = np.zeros((groups, out), np.int64)
    _count(group_OI, counts)
    pointer = np.zeros(groups * out + 1, np.int64)
    np.cumsum(counts.reshape(-1), out=pointer[1:])
    if pointer[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"{pointer[-1]:,} entries in one matrix; row pointers of 32 bits reach to 2,147,483,647"
        )
    values = np.empty(pointer[-1], bits.dtype)
    columns = np.empty(pointer[-1], np.uint16 if inputs <= WIDE else np.int32)
    _fill(bits, group_OI, pointer, values, columns)
    return Compressed(
        torch.from_numpy(values).view(W_OI.dtype),
        torch.from_numpy(columns),
        torch.from_numpy(pointer.astype(np.int32)),
        counts.sum(1),
    )


def expand(matrix: Compressed, out: int, inputs: int, chosen: np.ndarray) -> tuple[torch.Tensor, UInt8]:
    """The dense matrix of chosen groups, [out, in] with zeros elsewhere, and every weight's group, uint8 [out, in].

    Parameters
    ----------
    matrix : Compressed
    out, inputs : int
    chosen : bool [groups]
    """
    wide = torch.uint16 if matrix.values.dtype == torch.bfloat16 else torch.int32
    bits = matrix.values.view(wide).numpy()
    dense = np.zeros((out, inputs), bits.dtype)
    groups = np.full((out, inputs), DROPPED, np.uint8)
    _expand(bits, matrix.columns.numpy(), matrix.row_pointer.numpy(), chosen, dense, groups)
    return torch.from_numpy(dense).view(matrix.values.dtype), groups


def stored_bytes(out: int, inputs: int, groups: int, entries: int, value_bytes: int = 2) -> int:
    """What a compressed matrix takes, in memory and in a file."""
    return entries * (value_bytes + (2 if inputs <= WIDE else 4)) + 4 * (groups * out + 1)


def sums_by_group(group: UInt8, codes: np.ndarray, worth: Float64, groups: int) -> Float64:
    """What the weights of each group are worth together, and those of no group last: float64 [groups + 1]."""
    counts = np.zeros((256, 16), np.int64)
    _count_codes(group.reshape(-1), codes.reshape(-1), counts)
    worths = counts @ worth
    return np.append(worths[:groups], worths[groups:].sum())


@njit(nogil=True, cache=True)
def _count(group: Any, counts: Any) -> None:
    row = np.empty((4, 256), np.int32)  # four, so that an increment need not wait for the one before
    whole = group.shape[1] // 4 * 4
    for i in range(group.shape[0]):
        row[:] = 0
        for j in range(0, whole, 4):
            for k in range(4):
                row[k, group[i, j + k]] += 1
        for j in range(whole, group.shape[1]):
            row[0, group[i, j]] += 1
        for g in range(counts.shape[0]):
            counts[g, i] = row[0, g] + row[1, g] + row[2, g] + row[3, g]


@njit(nogil=True, cache=True)
def _fill(bits: Any, group: Any, pointer: Any, values: Any, columns: Any) -> None:
    out = group.shape[0]
    groups = (pointer.size - 1) // out
    cursor = np.empty(groups, np.int64)
    for i in range(out):
        for g in range(groups):
            cursor[g] = pointer[g * out + i]
        for j in range(group.shape[1]):
            number = group[i, j]
            if number < groups:
                place = cursor[number]
                values[place] = bits[i, j]
                columns[place] = j
                cursor[number] = place + 1


@njit(nogil=True, cache=True)
def _expand(values: Any, columns: Any, pointer: Any, chosen: Any, dense: Any, groups: Any) -> None:
    out = dense.shape[0]
    for g in range(chosen.size):
        for i in range(out):
            for place in range(pointer[g * out + i], pointer[g * out + i + 1]):
                groups[i, columns[place]] = g
                if chosen[g]:
                    dense[i, columns[place]] = values[place]


@njit(nogil=True, cache=True)
def _count_codes(group: Any, records: Any, counts: Any) -> None:
    for i in range(group.size):
        counts[group[i], records[i] >> 12] += 1


TYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CONTENT = "content"  # in a shard's metadata, beside "assembly"


@dataclass(frozen=True)
class Shard:
    """One file of weights.

    Attributes
    ----------
    path : Path
    cut : tuple of Parameter
        Matrices that are stored by expert.
    whole : tuple of str
        Names of tensors that are stored as they are.
    """

    path: Path
    cut: tuple[Parameter, ...]
    whole: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """What is known of a matrix that is stored by expert.

    Attributes
    ----------
    module : str
        Name of the base's module.
    out, inputs : int
    sizes : list of int
        Weights of every expert, the core last.
    worth : list of float
        Share of the layer's recorded output energy, Σ (|W| rms x)², that goes through each of them.
    """

    module: str
    out: int
    inputs: int
    sizes: list[int]
    worth: list[float]


@dataclass(frozen=True)
class Sources:
    """Where a shard's bytes come from; sent to the workers."""

    assembly: str
    source: Source
    base: BaseWeights
    selection: Selection
    quantized: frozenset[str]


def plan_shards(
    folder: Path, parameters: Sequence[Parameter], cut: Sequence[str], others: Sequence[str]
) -> list[Shard]:
    """One shard per layer, and one for the rest if there is any.

    Parameters
    ----------
    folder : Path
    parameters : sequence of Parameter
        All of the model.
    cut : sequence of str
        Names of those that are stored by expert.
    others : sequence of str
        Names of persistent buffers.
    """
    by_layer: dict[int, list[Parameter]] = {}
    for parameter in parameters:
        by_layer.setdefault(-1 if parameter.layer is None else parameter.layer, []).append(parameter)
    if others:
        by_layer.setdefault(-1, [])
    shards = []
    for number, layer in enumerate(sorted(by_layer), start=1):
        its = by_layer[layer]
        whole = [p.name for p in its if p.name not in cut] + (list(others) if layer == -1 else [])
        path = folder / f"model-{number:05d}-of-{len(by_layer):05d}.safetensors"
        shards.append(Shard(path, tuple(p for p in its if p.name in cut), tuple(whole)))
    return shards


def write_shard(shard: Shard, sources: Sources) -> list[Layer]:
    """A task: write a shard, unless it is there already; what is known of its matrices."""
    if (known := read_content(shard.path, sources.assembly)) is not None:
        return known
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for parameter in shard.cut:
        layer, parts = _cut(parameter, sources)
        layers.append(layer)
        tensors |= {f"base.{layer.module}.{name}": part for name, part in parts.items()}
    for name in shard.whole:
        tensors[f"base.{name}"] = _whole(name, sources)
    content = json.dumps([vars(layer) for layer in layers])
    write_tensors(shard.path, tensors, {"format": "pt", ASSEMBLY: sources.assembly, CONTENT: content})
    return layers


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with digests, whole or not at all.

    The library's own writer puts metadata in another order each time; here equal tensors and metadata give equal files.

    Parameters
    ----------
    path : Path
    tensors : mapping of str to contiguous tensor
    metadata : mapping of str to str
    """
    order = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # keeps all of them aligned
    entries: dict[str, Any] = {}
    digests: dict[str, str] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        digests[name] = crc_of(_bytes(tensor))
    text = header_text(entries, sealed_metadata(entries, metadata, digests))
    side = path.with_suffix(".part")
    with side.open("wb") as stream:
        stream.write(text)
        for name in order:
            stream.write(_bytes(tensors[name]))
        stream.flush()
        os.fsync(stream.fileno())
    side.replace(path)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""


def read_content(path: Path, assembly: str) -> list[Layer] | None:
    """What is known of a shard's matrices; None if it is not there, damaged or of another assembly."""
    try:
        metadata = read_header(path)[0].get(METADATA) or {}
        if metadata.get(ASSEMBLY) != assembly or CONTENT not in metadata:
            return None
        return [Layer(**layer) for layer in json.loads(metadata[CONTENT])]
    except (ValueError, TypeError):
        return None


def _cut(parameter: Parameter, sources: Sources) -> tuple[Layer, dict[str, torch.Tensor]]:
    name, selection = parameter.name, sources.selection
    groups = selection.experts + 1
    group, worth = _grouped(parameter, sources, groups)
    if name in sources.source.transposed:
        group = np.ascontiguousarray(group.T)
    found = compress(sources.base.matrix(name), group, groups)
    wanted = selection.tensors[name].kept.tolist()
    assert found.sizes.tolist() == wanted, f"{name}: {found.sizes.sum()} weights cut, {sum(wanted)} selected"
    module = name.removesuffix(".weight")
    out, inputs = group.shape
    layer = Layer(module, out, inputs, found.sizes.tolist(), (worth[:-1] / worth.sum()).tolist())
    return layer, {"values": found.values, "columns": found.columns, "row_pointer": found.row_pointer}


def _grouped(parameter: Parameter, sources: Sources, groups: int) -> tuple[UInt8, Float64]:
    """Every weight's group in the recorded orientation, and what each group is worth, float64 [groups + 1]."""
    from tinyonn.select.select import TensorGroups
    from tinyonn.store.arrays import bands

    name = parameter.name
    view = TensorGroups(sources.selection, sources.source, name)
    codebook = np.array(sources.source.attributes(name)["fields"]["act"]["codebook"], dtype=np.float64)
    energy = np.exp2(codebook)  # two levels to the octave
    group = np.empty(parameter.shape, np.uint8)
    worth = np.zeros(groups + 1)
    for first, last in bands(parameter.shape):
        band = sources.source.band(name, first, last, view.needs | {"records"})
        assert band.records is not None
        group[first:last] = view.of_band(band)
        worth += sums_by_group(group[first:last], band.records, energy, groups)
    return group, worth


def _whole(name: str, sources: Sources) -> torch.Tensor:
    """A tensor of the trunk as the dense model computes with it."""
    if name not in sources.quantized:
        return sources.base.tensor(name).contiguous()
    matrix = sources.base.matrix(name)
    return matrix.T.contiguous() if name in sources.base.transposed else matrix


def shard_bytes(shard: Shard, sources: Sources) -> int:
    """What the matrices of a shard take by the format's arithmetic, without the trunk and the file's header."""
    selection, across = sources.selection, sources.source.transposed
    total = 0
    for parameter in shard.cut:
        out, inputs = parameter.shape[::-1] if parameter.name in across else parameter.shape
        entries = int(selection.tensors[parameter.name].kept.sum())
        total += stored_bytes(out, inputs, selection.experts + 1, entries, sources.base.dtype.itemsize)
    return total


def task_bytes(shard: Shard, sources: Sources, sizes: Mapping[str, int]) -> int:
    """Memory of a task that writes a shard: its tensors, and the largest matrix while it is cut.

    Parameters
    ----------
    shard : Shard
    sources : Sources
    sizes : mapping of str to int
        Weights of every tensor.
    """
    width = sources.base.dtype.itemsize
    largest = max((prod(p.shape) for p in shard.cut), default=0)
    # Of a matrix: as read and rounded, its groups twice, and its entries before they are joined to the shard.
    own = largest * (3 * width + 2)
    return shard_bytes(shard, sources) + width * sum(sizes.get(name, 0) for name in shard.whole) + own


def tensor_bytes(shard: Shard) -> dict[str, int]:
    """Bytes of every tensor of a written shard, from its header."""
    header, _ = read_header(shard.path)
    ranges = {name: entry["data_offsets"] for name, entry in header.items() if name != METADATA}
    return {name: last - first for name, (first, last) in ranges.items()}


def matrix_bytes(shard: Shard) -> int:
    """Of the matrices of a written shard, without the trunk and the file's header."""
    whole = {f"base.{name}" for name in shard.whole}
    return sum(size for name, size in tensor_bytes(shard).items() if name not in whole)
