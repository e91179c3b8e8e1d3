"""A task of ``tinyonn score``: some tensors' records of all segments as one, each with the code of its S.

S is what `tinyonn assemble` cuts by, made by the same function (`scores`); a row holds its code of equal mass in the
tensor. The trunk is never cut: its codes are of what the records alone say (`tables`), and its weights are not read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from tinyonn.dense.parameters import Parameter
from tinyonn.score.scores import TensorScore, family
from tinyonn.score.source import Band, Float32, ReadWeights, tensors_outside
from tinyonn.score.tables import Part, ScoreTables, fit_tables, score_records
from tinyonn.show.sizes import MiB
from tinyonn.store.arrays import BandWriter, attributes_of, band_rows, bands, codebooks_of, read_chunk, spread
from tinyonn.store.manifest import Segment
from tinyonn.store.reader import Reader
from tinyonn.store.records import CODES, TensorCalibration, UInt8, UInt16

if TYPE_CHECKING:
    from icechunk import ForkSession

UInt32 = np.ndarray[Any, np.dtype[np.uint32]]

LOOKED_AT = 1 << 18  # weights of a tensor that its tables are fitted to
LOOKED_AT_BANDS = 8  # that they are taken from, evenly spread
HELD_BYTES = 128 * MiB  # of records a task keeps between fitting and scoring, instead of reading them again


@dataclass(frozen=True)
class ScoreTask:
    """Some tensors, scored by one task."""

    parameters: tuple[Parameter, ...]
    calibration: dict[str, TensorCalibration]
    segments: tuple[tuple[Segment, int], ...]
    slices: int
    exponents: tuple[float, float, float, float]
    weights: ReadWeights
    transposed: frozenset[str]


def task_bytes(shape: tuple[int, ...], parts: int, cut: bool = True) -> int:
    """Memory of one task while it scores a tensor with so many parts.

    A band's records of all parts are read while those of the band before are still there, unless all of a tensor's are
    kept, and with them what is made of them; beside them are a chunk as it is stored, twice, rows and affinity, and
    both as they are stored; of a tensor that can be cut its weights, as read, as rounded and in float32, and their S.
    """
    count = band_rows(shape) * prod(shape[1:])
    band = 2 * count
    whole = 2 * prod(shape) * parts
    held = whole + 7 * prod(shape) if _few(shape) and whole <= HELD_BYTES else 0
    looked_at = 2 * min(LOOKED_AT * 2, prod(shape)) * parts * 2
    reading = (1 if held or band >= 2 * prod(shape) else 2) * band * parts
    scoring = (8 + 4 + 4 + 4) * count if cut else 0
    return held + max(looked_at, reading) + 2 * band + 3 * band + scoring


def _few(shape: tuple[int, ...]) -> bool:
    return len(list(bands(shape))) <= LOOKED_AT_BANDS


def score_tensors(reader: Reader, fork: ForkSession, task: ScoreTask) -> ForkSession:
    """A task: score its tensors into the fork and hand the fork back."""
    for parameter in task.parameters:
        _score_tensor(reader, fork, task, parameter)
    return fork


def _score_tensor(reader: Reader, fork: ForkSession, task: ScoreTask, parameter: Parameter) -> None:
    name, shape = parameter.name, parameter.shape
    merged = Merged(reader, task, parameter)
    score, codes = None, None
    if tensors_outside([parameter]):
        score = family(*task.exponents).prepare(merged, parameter)
        codes = merged.thresholds(score)
    attributes = row_attributes(task, name, merged.tables, codes)
    rows = BandWriter(fork, f"rows/{name}", shape, "uint16", attributes)
    affinity = BandWriter(fork, f"affinity/{name}", shape, "uint8", {})
    for first, last in bands(shape):
        records, compared = merged.both(first, last)
        if score is not None and codes is not None:
            band = Band(first, records=records, weights=merged.weights(first, last))
            _add_codes(_keys(score(band)).reshape(-1), codes, records.reshape(-1))
        rows.write(first, records)
        affinity.write(first, compared)


class Merged:
    """A tensor's rows before they are written: the records of all segments as one, and the base's weights.

    Parameters
    ----------
    reader : Reader
    task : ScoreTask
    parameter : Parameter

    Attributes
    ----------
    tables : ScoreTables
    transposed : frozenset of str
    """

    def __init__(self, reader: Reader, task: ScoreTask, parameter: Parameter) -> None:
        self._task, self._name, self._shape = task, parameter.name, parameter.shape
        self._cut = bool(tensors_outside([parameter]))
        self.transposed = task.transposed
        name, shape = parameter.name, parameter.shape
        self._arrays = [
            (reader.array(segment, name), reader.what(segment, name)) for segment, _ in task.segments
        ]
        parts = [
            Part(number, segment.samples, codebooks_of(array, what))
            for (segment, number), (array, what) in zip(task.segments, self._arrays, strict=True)
        ]
        self._chosen = spread(list(bands(shape)), LOOKED_AT_BANDS)
        self._hold = 2 * parameter.size * len(parts) <= HELD_BYTES and _few(shape)
        self._held: dict[int, UInt16] = {}
        self._made: dict[int, tuple[UInt16, UInt8]] = {}
        self._read: dict[int, Float32] = {}
        looked_at = []
        for first, last in self._chosen:
            records = _read(self._arrays, first, last)
            looked_at.append(_thinned(records, shape, LOOKED_AT // len(self._chosen)))
            if self._hold:
                self._held[first] = records
        together = list(np.concatenate(looked_at, axis=1))
        self.tables = fit_tables(parts, together, task.exponents, task.slices)

    def attributes(self, name: str) -> dict[str, Any]:
        """Of the rows to be, but for how S is coded."""
        return row_attributes(self._task, name, self.tables)

    def both(self, first: int, last: int) -> tuple[UInt16, UInt8]:
        """Rows [first, last): records whose score is 0 where the tensor can be cut, and affinity."""
        if first in self._made:
            return self._made[first]
        records = self._held.pop(first) if first in self._held else _read(self._arrays, first, last)
        tables = self.tables
        scored, compared = np.empty(records.shape[1], np.uint16), np.empty(records.shape[1], np.uint8)
        score_records(
            records, tables.shares, tables.slices, tables.codes, tables.score, tables.bias, scored, compared
        )
        if self._cut:
            scored &= np.uint16(0xFFF0)
        band = (last - first, *self._shape[1:])
        found = scored.reshape(band), compared.reshape(band)
        if self._hold:
            self._made[first] = found
        return found

    def weights(self, first: int, last: int) -> Float32:
        """Of the base model: float32 [rows, columns]."""
        if first in self._read:
            return self._read[first]
        found = np.ascontiguousarray(self._task.weights(self._name, first, last), dtype=np.float32)
        if self._hold:
            self._read[first] = found
        return found

    def band(self, name: str, first: int, last: int, needs: Collection[str]) -> Band:
        """As `tinyonn.score.source.Rows` has it."""
        records = self.both(first, last)[0] if "records" in needs else None
        return Band(first, records, weights=self.weights(first, last) if "weights" in needs else None)

    def thresholds(self, score: TensorScore) -> UInt32:
        """Keys of S where a code ends and the next begins, of equal mass over what is looked at: uint32 [15]."""
        found = []
        for first, last in self._chosen:
            band = self.band(self._name, first, last, ("records", "weights"))
            keys = _keys(score(band)).reshape(-1)
            # An odd step: all columns have their turn.
            found.append(keys[:: ceil(keys.size * len(self._chosen) / LOOKED_AT) | 1])
        keys = np.sort(np.concatenate(found))
        return keys[(np.arange(1, CODES) * keys.size) // CODES]


def _keys(scores: Float32) -> UInt32:
    """Integers that order like scores from 0 on."""
    return scores.view(np.uint32)


@njit(nogil=True, cache=True)
def _add_codes(keys: Any, thresholds: Any, rows: Any) -> None:
    for i in range(keys.size):
        code = 0
        for step in (8, 4, 2, 1):
            if keys[i] >= thresholds[code + step - 1]:
                code += step
        rows[i] |= np.uint16(code)


def row_attributes(
    task: ScoreTask, name: str, tables: ScoreTables, thresholds: UInt32 | None = None
) -> dict[str, Any]:
    """What makes a tensor's scored records readable: as of a segment, and where the codes of S begin."""
    attributes = attributes_of(task.calibration[name], tables.codebooks)
    of_s = "code of equal mass of S = a log2 rms + b log2 g + c share + d log2 |W|"
    attributes["fields"]["score"] = {
        "shift": 0,
        "bits": 4,
        "unit": of_s if thresholds is not None else f"{of_s}, |W| counting through act alone",
        "weight": list(task.exponents),
    }
    if thresholds is not None:
        attributes["fields"]["score"]["from"] = [float(value) for value in thresholds.view(np.float32)]
    return attributes


def _read(arrays: list[tuple[Any, str]], first: int, last: int) -> UInt16:
    """Rows of all parts, flat: uint16 [parts, weights]."""
    out = np.empty((len(arrays), (last - first) * prod(arrays[0][0].shape[1:])), np.uint16)
    for row, (array, what) in zip(out, arrays, strict=True):
        read_chunk(array, first, last, row, what)
    return out


def _thinned(records: UInt16, shape: tuple[int, ...], most: int) -> UInt16:
    """Every so many-th row of a band, with at most about `most` weights: uint16 [parts, weights]."""
    width = prod(shape[1:])
    by_row = records.reshape(records.shape[0], -1, width)
    step = max(1, ceil(records.shape[1] / most))
    return np.ascontiguousarray(by_row[:, ::step]).reshape(records.shape[0], -1)
