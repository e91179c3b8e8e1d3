"""Passes over bands for `tinyonn.experts.need`, compiled, and the tasks that run them.

Shape suffixes: ``S`` slices, ``N`` weights of a band, ``K`` experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zarr
from numba import njit

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import CapacityError
from tinyonn.experts.select import TensorGroups, groups_bytes
from tinyonn.experts.selection import Selection
from tinyonn.experts.source import Source
from tinyonn.store.arrays import band_rows, bands, codebooks_of, read_rows
from tinyonn.store.faults import is_full
from tinyonn.store.reader import Reader
from tinyonn.store.records import SHIFTS, STATISTICS, Float64, UInt8, UInt16, dither_bits, dither_seed, shares

STEPS = 32  # bins of an octave
LOWEST = -44  # octave of the first bin
BINS = 2048  # numbered in 16 bits
MANTISSAS = 1024

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Counts = np.ndarray[Any, np.dtype[np.int64]]

# Log2 of 1 to 2 in steps of 2**-20: the same on every machine.
LOG2 = np.round(np.log2(1 + (np.arange(MANTISSAS) + 0.5) / MANTISSAS) * 2**20) / 2**20


@dataclass(frozen=True)
class NeedData:
    """What bins are made of; sent to the workers.

    Attributes
    ----------
    reader : Reader
        Of the run's snapshot.
    source : Source
        Of weights and, for the selection, records.
    slices : tuple of str
        Those that have samples.
    slope : float
        Octaves of need for one grad level, which is half an octave of gradient.
    """

    reader: Reader
    source: Source
    slices: tuple[str, ...]
    slope: float

    def tensor(self, name: str) -> NeedTensor:
        """A tensor's records of every slice, opened once."""
        return NeedTensor(self, name)


class NeedTensor:
    """How much each slice needs the weights of a tensor, band by band."""

    def __init__(self, data: NeedData, name: str) -> None:
        self._data, self._name = data, name
        self._slices: list[list[tuple[zarr.Array[Any], str, Float32]]] = []
        for slice in data.slices:
            segments = [one for one in data.reader.segments if one.samples and one.slice == slice]
            parts = []
            for segment, share in zip(segments, shares(segments), strict=True):
                array = data.reader.array(segment, name)
                what = data.reader.what(segment, name)
                table = (codebooks_of(array, what)[STATISTICS.index("grad")] * share).astype(np.float32)
                parts.append((array, what, table))
            self._slices.append(parts)

    def bins(self, first: int, last: int, weights: Float32) -> UInt16:
        """In steps within the tensor, uint16 [S, rows, columns].

        Parameters
        ----------
        first, last : int
            Rows.
        weights : float32 [rows, columns]
        """
        out = np.empty((len(self._slices), *weights.shape), np.uint16)
        levels = np.empty(weights.size, np.float32)
        for number, parts in enumerate(self._slices):
            levels[:] = 0
            for array, what, table in parts:
                records = np.ascontiguousarray(read_rows(array, first, last, what))
                _add_levels(records.reshape(-1), SHIFTS["grad"], table, levels)
            _bins(weights.reshape(-1), levels, self._data.slope, LOG2, out[number].reshape(-1))
        return out


def count_needs(data: NeedData, parameters: tuple[Parameter, ...]) -> list[Counts]:
    """A task: weights of every bin, int64 [S, bins] for each tensor."""
    found = []
    for parameter in parameters:
        counts = np.zeros((len(data.slices), BINS), np.int64)
        tensor = data.tensor(parameter.name)
        for first, last in bands(parameter.shape):
            weights = data.source.band(parameter.name, first, last, ("weights",)).weights
            assert weights is not None
            for its, bins in zip(counts, tensor.bins(first, last, weights), strict=True):
                _count(bins.reshape(-1), its)
        found.append(counts)
    return found


def sample_needs(
    data: NeedData,
    selection: Selection,
    tables: Mapping[str, Float32],
    share: float,
    seed: int,
    parameters: tuple[Parameter, ...],
) -> list[Float32]:
    """A task: needs of a share of the weights that experts are made of, float32 [n, S] for each tensor."""
    found = []
    for parameter in parameters:
        hash_seed = np.uint64(dither_seed(seed, "need", parameter.name))
        limit = np.uint64(min(2**32 - 1, int(share * 2**32)))
        parts = []
        for first, groups, bins in _bands(data, selection, parameter):
            chosen = np.zeros(groups.size, np.bool_)
            begin = first * parameter.shape[1]
            _draw(groups.reshape(-1), np.uint64(begin), hash_seed, limit, selection.experts, chosen)
            its = bins.reshape(len(bins), -1)[:, chosen]
            parts.append(np.take_along_axis(tables[parameter.name], its.astype(np.int64), axis=1).T)
        found.append(np.ascontiguousarray(np.concatenate(parts), dtype=np.float32))
    return found


def label_needs(
    data: NeedData,
    selection: Selection,
    tables: Mapping[str, Float32],
    centres: tuple[Float32, Float32],
    folder: Path,
    parameters: tuple[Parameter, ...],
) -> list[tuple[Counts, Float64]]:
    """A task: write the label of every weight that an expert may hold, 0 for all others.

    Parameters
    ----------
    centres : float32 [K, S] and float32 [K]
        Centres and handicaps, of `tinyonn.experts.need.find_centres`.

    Returns
    -------
    list of int64 [K] and float64 [K, S]
        Weights of every expert in each tensor, the core's not counted, and the sums of their logs of needs.
    """
    found = []
    for parameter in parameters:
        path = label_path(folder, parameter.name)
        try:
            with part_path(path).open("wb") as file:
                found.append(_write_labels(file, data, selection, tables, centres, parameter))
        except OSError as error:
            if is_full(error):
                raise CapacityError(
                    f"no space left in {folder} for the experts' labels, a byte for each linear weight; free some and "
                    "run again"
                ) from None
            raise
        part_path(path).replace(path)
    return found


def _write_labels(
    file: BinaryIO,
    data: NeedData,
    selection: Selection,
    tables: Mapping[str, Float32],
    centres: tuple[Float32, Float32],
    parameter: Parameter,
) -> tuple[Counts, Float64]:
    """As a NumPy file, band after band."""
    header = {"descr": "|u1", "fortran_order": False, "shape": tuple(parameter.shape)}
    np.lib.format.write_array_header_1_0(file, header)
    counts, sums_KS = np.zeros(len(centres[0]), np.int64), np.zeros(centres[0].shape)
    for _, groups, bins in _bands(data, selection, parameter):
        labels = np.zeros(groups.size, np.uint8)
        _nearest(
            groups.reshape(-1), bins.reshape(len(bins), -1), tables[parameter.name],
            (np.ascontiguousarray(centres[0].T), centres[1]), selection.experts, labels, counts, sums_KS,
        )  # fmt: skip
        file.write(labels.tobytes())
    return counts, sums_KS


def label_path(folder: Path, name: str) -> Path:
    """Labels of a tensor."""
    return folder / f"{name}.npy"


def part_path(path: Path) -> Path:
    """Where it is written, until it is whole."""
    return path.with_suffix(".part")


def _bands(data: NeedData, selection: Selection, parameter: Parameter) -> Iterator[tuple[int, UInt8, UInt16]]:
    """First row, groups [rows, columns] and bins [S, rows, columns]."""
    groups = TensorGroups(selection, data.source, parameter.name)
    tensor = data.tensor(parameter.name)
    for first, last in bands(parameter.shape):
        band = data.source.band(parameter.name, first, last, groups.needs | {"weights"})
        assert band.weights is not None
        yield first, groups.of_band(band), tensor.bins(first, last, band.weights)


def task_needs(groups: Sequence[Sequence[Parameter]], slices: int) -> list[int]:
    """Memory of every task, its largest tensor's: a band's weights, records, groups, levels and bins."""
    return [
        max(groups_bytes(p) + band_rows(p.shape) * prod(p.shape[1:]) * (4 + 2 + 2 * slices) for p in group)
        for group in groups
    ]


@njit(nogil=True, cache=True)
def _add_levels(records_N: Any, shift: Any, table: Any, levels_N: Any) -> None:
    for i in range(records_N.size):
        levels_N[i] += table[(records_N[i] >> shift) & 15]


@njit(nogil=True, cache=True)
def _bins(weights_N: Any, levels_N: Any, slope: Any, logs: Any, out_N: Any) -> None:
    bits_N = weights_N.view(np.uint32)
    for i in range(weights_N.size):
        bits = bits_N[i]
        octave = np.int64((bits >> np.uint32(23)) & np.uint32(255)) - 127
        size = octave + logs[(bits >> np.uint32(13)) & np.uint32(1023)] + slope * levels_N[i]
        step = np.int64(np.floor((size - LOWEST) * STEPS))
        out_N[i] = min(max(step, 0), BINS - 1)


@njit(nogil=True, cache=True)
def _count(bins_N: Any, counts: Any) -> None:
    for i in range(bins_N.size):
        counts[bins_N[i]] += 1


@njit(nogil=True, cache=True)
def _draw(groups_N: Any, first: Any, seed: Any, limit: Any, core: Any, out_N: Any) -> None:
    for i in range(groups_N.size):
        if groups_N[i] < core:
            out_N[i] = (dither_bits(seed, first + np.uint64(i)) & np.uint64(0xFFFFFFFF)) <= limit


@njit(nogil=True, cache=True)
def _nearest(
    groups_N: Any,
    bins_SN: Any,
    table_SB: Any,
    centres: Any,
    core: Any,
    out_N: Any,
    counts_K: Any,
    sums_KS: Any,
) -> None:
    centres_SK, handicaps_K = centres
    slices, experts = centres_SK.shape
    far_K = np.empty(experts, np.float32)
    for i in range(groups_N.size):
        if groups_N[i] >= core:  # the core's, or dropped
            continue
        far_K[:] = handicaps_K
        for s in range(slices):
            need = table_SB[s, bins_SN[s, i]]
            for k in range(experts):
                away = need - centres_SK[s, k]
                far_K[k] += away * away
        best = 0
        for k in range(1, experts):
            if far_K[k] < far_K[best]:
                best = k
        out_N[i] = best
        counts_K[best] += 1
        for s in range(slices):
            sums_KS[best, s] += table_SB[s, bins_SN[s, i]]
