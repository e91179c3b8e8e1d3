"""Merging: segments of one slice averaged into larger ones, band by band, one commit each.

Which merges there are, and in what order, is decided in `tinyonn.store.tree`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import StoreError
from tinyonn.store.arrays import SegmentWriter, band_rows, bands, codebooks_of, read_together
from tinyonn.store.manifest import Segment
from tinyonn.store.reader import Reader
from tinyonn.store.records import (
    Float64,
    UInt16,
    average_records,
    averaged_codebooks,
    dither_seed,
    shares,
    value_tables,
    weighted_values,
)
from tinyonn.store.repository import Store
from tinyonn.store.tree import Merge, Node, merge_tree, merges, next_segment, ready_merges

__all__ = [
    "Merge", "Node", "execute", "merge_bytes", "merge_ready", "merge_tree", "merges", "next_segment", "ready_merges",
]  # fmt: skip


def merge_ready(store: Store, stop: Callable[[], bool] = lambda: False, clean: bool = True) -> int:
    """Carry out merges until none is ready, each with a commit of its own: it may be cut off at any moment.

    Memory stays at one chunk per child and one for the result.

    Parameters
    ----------
    store : Store
        Opened for writing. Other threads of the process may commit meanwhile.
    stop : callable
        Asked before each tensor; True ends the work, and the merge under way is dropped.
    clean : bool
        Delete replaced segments from the disk after each merge.

    Returns
    -------
    int
        Merges committed.
    """
    done = 0
    while ready := ready_merges(store.manifest, store.segments()):
        for merge in ready:
            if not execute(store, merge, stop):
                return done
            done += 1
            if clean:
                store.clean()
    return done


def merge_bytes(parameters: Sequence[Parameter], parts: int) -> int:
    """Memory of a merge of so many segments: a chunk of each, as it is and as it is stored, and one for the result."""
    band = max((2 * band_rows(p.shape) * p.size // p.shape[0] for p in parameters), default=0)
    return band * (2 * parts + 3)


def execute(store: Store, merge: Merge, stop: Callable[[], bool] = lambda: False) -> bool:
    """Carry out one merge; False if `stop` ended it. Nothing is visible before the last step."""
    parameters = store.manifest.parameters
    calibration = store.calibration or {}
    reader = store.reader()
    merged = merge.merged
    fork = store.begin(merged)
    try:
        writer = SegmentWriter(fork, merged.slice, merged.first, merged.last)
        for parameter in parameters if merged.samples else ():
            if stop():
                return False
            if parameter.name not in calibration:
                raise StoreError(
                    f"{store.location}: no calibration for {parameter.name}; record into another folder"
                )
            seed = dither_seed(store.manifest.seed, merged.name, parameter.name)
            codebooks, bands_of = average(reader, list(merge.children), parameter, seed, merge.final)
            writer.write(parameter.name, parameter.shape, calibration[parameter.name], codebooks, bands_of)
        if not store.replace(list(merge.children), fork, merged):
            raise StoreError(
                f"{store.location}: {merged.name} is live beside its parts; record into another folder"
            )
        return True
    finally:
        store.drop(merged)


def average(
    reader: Reader, segments: list[Segment], parameter: Parameter, seed: int, nearest: bool
) -> tuple[Float64, Iterator[tuple[int, UInt16]]]:
    """Average one tensor over segments, weighted by samples, chunk by chunk.

    Parameters
    ----------
    reader : Reader
    segments : list of Segment
        Those without samples weigh nothing and are not read; at least one must have some.
    parameter : Parameter
    seed : int
        Of the dithering.
    nearest : bool
        Round to the nearest code instead.

    Returns
    -------
    codebooks : float64 [3, 16]
        Of the result.
    bands : iterator of (first row, uint16 records [rows, ...])
    """
    segments = [segment for segment in segments if segment.samples]
    weights = shares(segments)
    arrays = [
        (reader.array(segment, parameter.name), reader.what(segment, parameter.name)) for segment in segments
    ]
    parts = [codebooks_of(array, what) for array, what in arrays]
    codebooks = averaged_codebooks(parts, weights)
    values = weighted_values(parts, weights)
    return codebooks, _averaged_bands(arrays, values, codebooks, parameter, seed, nearest)


def _averaged_bands(
    arrays: list[tuple[Any, str]],
    values: Float64,
    codebooks: Float64,
    parameter: Parameter,
    seed: int,
    nearest: bool,
) -> Iterator[tuple[int, UInt16]]:
    tables = value_tables(codebooks)
    width = parameter.size // parameter.shape[0]
    for first, last in bands(parameter.shape):
        parts = tuple(read_together(arrays, first, last))
        if len(parts) == 1:  # an average of one is itself: no rounding
            yield first, parts[0]
            continue
        out = np.empty_like(parts[0])
        flat = tuple(np.ascontiguousarray(part).reshape(-1) for part in parts)
        average_records(
            flat,
            values,
            tables,
            np.uint64(seed),
            np.uint64(first * width),
            nearest,
            out.reshape(-1),
        )
        yield first, out
