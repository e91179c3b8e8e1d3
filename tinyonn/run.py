"""Reading a run: ``tinyonn.open_run("storage/demo")``.

Averages are taken over the segments that are live at the moment of the call, weighted by their samples.

``tinyonn merge`` averages a run's segments until each slice has one, as far as it is recorded.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError, StoreDamagedError
from tinyonn.places import local_folder, store_location
from tinyonn.plan.demands import Need, state_ram
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import MiB, format_seconds
from tinyonn.store.arrays import bands
from tinyonn.store.lock import RunLock
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.merge import merge_bytes, merge_ready, ready_merges
from tinyonn.store.reader import Reader
from tinyonn.store.records import (
    MEAN_BINS,
    SHIFTS,
    STATISTICS,
    Float64,
    TensorCalibration,
    UInt16,
    average_records,
    count_means,
    final_codebooks,
    shares,
    value_tables,
    weighted_values,
)
from tinyonn.store.repository import Store

T = TypeVar("T")
Float32 = np.ndarray[Any, np.dtype[np.float32]]


class Run:
    """A recorded run, for reading; also while it is being recorded.

    Attributes
    ----------
    store : Store
        Opened for reading only.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def manifest(self) -> Manifest:
        """What decides the run's bits."""
        return self.store.manifest

    @property
    def parameters(self) -> list[Parameter]:
        """Every recorded tensor, model order."""
        return list(self.manifest.parameters)

    @property
    def segments(self) -> list[Segment]:
        """Live segments."""
        return self.store.segments()

    @property
    def samples(self) -> int:
        """Samples committed, those set aside not counted."""
        return sum(segment.samples for segment in self.segments)

    @property
    def set_aside(self) -> list[dict[str, Any]]:
        """``{"index", "reason"}`` of every sample that was set aside."""
        return [item for segment in self.segments for item in segment.set_aside]

    @cached_property
    def calibration(self) -> dict[str, TensorCalibration]:
        """Bases and threshold of every tensor.

        Raises
        ------
        InputError
            Before the first segment.
        """
        calibration = self.store.calibration
        if calibration is None:
            raise InputError(f"{self.store.location}: nothing is recorded yet; run `tinyonn record` first")
        return calibration

    def mean(self, name: str, slice: str | None = None) -> Float32:
        """Mean act level, grad level and freq of every weight of a tensor.

        Parameters
        ----------
        name : str
        slice : str, optional
            Only this slice's segments.

        Returns
        -------
        float32 [3, *shape]
            Act and grad in levels (0..15, half octaves above the tensor's base), freq in 0..1.

        Raises
        ------
        InputError
            No such tensor or slice, or no samples yet.
        StoreDamagedError
            Names tensor and chunk.
        """
        parameter = self.manifest.parameter(name)

        def compute(reader: Reader) -> Float32:
            out = np.empty((3, *parameter.shape), dtype=np.float32)
            for first, last in bands(parameter.shape):
                out[:, first:last] = self._mean_rows(reader, parameter, slice, first, last)
            return out

        return self._steadily(compute)

    def mean_rows(self, name: str, first: int, last: int) -> Float64:
        """`mean` of some rows of a tensor alone, over all slices: float64 [3, last - first, ...]."""
        parameter = self.manifest.parameter(name)
        return self._steadily(lambda reader: self._mean_rows(reader, parameter, None, first, last))

    def records(self, name: str, slice: str | None = None) -> UInt16:
        """The averaged INT4 codes of a tensor, nearest rounding, score 0; `codebooks` says what they stand for.

        Parameters
        ----------
        name : str
        slice : str, optional
            Only this slice's segments.

        Returns
        -------
        uint16 [*shape]
        """
        parameter = self.manifest.parameter(name)

        def compute(reader: Reader) -> UInt16:
            codebooks, values = self._combined(reader, parameter, slice)
            out = np.empty(parameter.shape, dtype=np.uint16)
            tables = value_tables(codebooks)
            for first, last, parts in self._parts(reader, parameter, slice):
                flat = out[first:last].reshape(-1)
                average_records(parts, values, tables, np.uint64(0), np.uint64(0), True, flat)
            return out

        return self._steadily(compute)

    def codebooks(self, name: str, slice: str | None = None) -> Float64:
        """The means that the codes of `records` stand for, float64 [3, 16]: act, grad, freq."""
        parameter = self.manifest.parameter(name)
        return self._steadily(lambda reader: self._combined(reader, parameter, slice)[0])

    def rows(self, name: str) -> zarr.Array[Any]:
        """The scored uint16 records of a tensor, all slices merged; attributes say what the codes stand for.

        Raises
        ------
        InputError
            Before `tinyonn score`.
        """
        return self._output("rows", name, "score")

    def affinity(self, name: str) -> zarr.Array[Any]:
        """The uint8 affinity of every weight of a tensor: dominant slice << 4 | selectivity.

        The number of a slice is its place in `slices`.

        Raises
        ------
        InputError
            Before `tinyonn score`.
        """
        return self._output("affinity", name, "score")

    def labels(self, name: str) -> zarr.Array[Any]:
        """The uint8 cell of every weight of a tensor; 255 is the trunk, in no cell.

        Raises
        ------
        InputError
            Before `tinyonn cluster`.
        """
        return self._output("labels", name, "cluster")

    @property
    def slices(self) -> list[str]:
        """Names of the slices, in the order of their numbers."""
        return list(self.manifest.slices)

    def _output(self, group: str, name: str, stage: str) -> zarr.Array[Any]:
        self.manifest.parameter(name)
        reader = self.store.reader()
        if reader.stage(group) is None:
            raise InputError(f"{self.store.location} has no {group} yet; run `tinyonn {stage}` first")
        return reader.output(group, name)

    def _mean_rows(
        self, reader: Reader, parameter: Parameter, slice: str | None, first: int, last: int
    ) -> Float64:
        segments = self._segments(reader, slice)
        mean = np.zeros((3, last - first, *parameter.shape[1:]))
        for segment, share in zip(segments, shares(segments), strict=True):
            codebooks = reader.codebooks(segment, parameter.name)
            records = reader.read(segment, parameter.name, first, last)
            for s, statistic in enumerate(STATISTICS):
                mean[s] += (codebooks[s] * share)[(records >> SHIFTS[statistic]) & 15]
        return mean

    def _segments(self, reader: Reader, slice: str | None) -> list[Segment]:
        """Live segments that weigh something."""
        if slice is not None and slice not in self.manifest.slices:
            raise InputError(f"no slice {slice!r} in this run; there are {', '.join(self.manifest.slices)}")
        segments = [s for s in reader.segments if s.samples and slice in (None, s.slice)]
        if not segments:
            where = f"slice {slice}" if slice else self.store.location
            raise InputError(f"{where}: no samples are recorded yet; run `tinyonn record` first")
        return segments

    def _parts(
        self, reader: Reader, parameter: Parameter, slice: str | None
    ) -> Iterator[tuple[int, int, tuple[UInt16, ...]]]:
        """First row, last row and the segments' flat records, chunk by chunk."""
        segments = self._segments(reader, slice)
        for first, last in bands(parameter.shape):
            parts = (reader.read(segment, parameter.name, first, last) for segment in segments)
            yield first, last, tuple(np.ascontiguousarray(part).reshape(-1) for part in parts)

    def _combined(self, reader: Reader, parameter: Parameter, slice: str | None) -> tuple[Float64, Float64]:
        """Codebooks of the average over segments, and what each code of each segment adds to a mean."""
        segments = self._segments(reader, slice)
        books = [reader.codebooks(segment, parameter.name) for segment in segments]
        values = weighted_values(books, shares(segments))
        counts = np.zeros((len(STATISTICS), MEAN_BINS), np.int64)
        for _, _, parts in self._parts(reader, parameter, slice):
            count_means(np.stack(parts), values, counts)
        return final_codebooks(counts, values), values

    def _steadily(self, compute: Callable[[Reader], T]) -> T:
        """Compute from one snapshot; once more if the run's owner merged and cleaned it away meanwhile."""
        reader = self.store.reader()
        try:
            return compute(reader)
        except StoreDamagedError:
            renewed = self.store.reader()
            if renewed.segments == reader.segments:
                raise
            return compute(renewed)


def open_run(location: str | Path) -> Run:
    """Open a run for reading.

    Parameters
    ----------
    location : str or path
        The run's folder (``storage/demo``), its store, or the ``s3://`` address of either.

    Raises
    ------
    InputError
        Nothing is recorded there.
    StoreDamagedError
        The store cannot be read.
    """
    text = str(location).rstrip("/")
    inner = f"{text}/store"
    return Run(Store.open(inner if Store.exists(inner) else text))


LOG = logging.getLogger(__name__)
OWN_BYTES = 260 * MiB  # of the process: Python with the store and Numba's kernels


@dataclass(frozen=True)
class MergeReport:
    """What a call of `merge_run` did: merges, and live segments by slice before and after."""

    location: str
    merges: int
    before: dict[str, int]
    after: dict[str, int]
    complete: bool
    merge_seconds: float
    planned_rss_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> Sheet:
        """For people."""
        rest = "" if self.complete else "; the run is not recorded to its end"
        note = f"{self.merges:,} merges in {format_seconds(self.merge_seconds)}{rest}"
        sheet = (
            Sheet(f"merged {whole(self.location)}", [note]).text("slice").number("segments before", "after")
        )
        for name, count in self.before.items():
            sheet.add(whole(name), f"{count:,}", f"{self.after[name]:,}")
        return sheet


def merge_run(location: str) -> MergeReport:
    """Carry out all merges that are ready. May be cut off at any moment and called again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.

    Raises
    ------
    InputError
        No run is there.
    StoreBusyError
        Another process records or merges it.
    CapacityError
        It does not fit, or the disk is full.
    """
    started = time.monotonic()
    Store.open(store_location(location))  # a wrong name must not leave a lock behind
    with RunLock(local_folder(location), what="merge"):
        store = Store.open(store_location(location), read_only=False)
        before = store.segments()
        planned = _state(store) if ready_merges(store.manifest, before) else 0
        merges = merge_ready(store)
        store.clean()
        after = store.segments()
    complete = sum(s.last - s.first for s in after) == sum(store.manifest.slices.values())
    LOG.debug("merged %s: %d merges, %d -> %d live segments", location, merges, len(before), len(after))
    names = list(store.manifest.slices)
    return MergeReport(
        location,
        merges,
        _by_slice(names, before),
        _by_slice(names, after),
        complete,
        time.monotonic() - started,
        planned,
    )


def _state(store: Store) -> int:
    """What it needs of RAM, or a refusal."""
    parameters = store.manifest.parameters
    parts = max(len(merge.children) for merge in ready_merges(store.manifest, store.segments()))
    needs = [
        Need("chunks that are averaged", merge_bytes(parameters, parts)),
        Need("the process", OWN_BYTES),
    ]
    return state_ram("merging", needs, "end other programs, or merge on a machine with more of it")


def _by_slice(names: Sequence[str], segments: Sequence[Segment]) -> dict[str, int]:
    counts = Counter(segment.slice for segment in segments)
    return {name: counts[name] for name in names}
