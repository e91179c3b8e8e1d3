"""What one recorder does: load the model once, then record segments and write them into forks of the store.

Plain Python without Ray: the driver runs it as an actor, tests run it directly. A segment goes through `record` and
then `write` for each window; the store's fork is begun only when there is something to write.

The bases of the levels are calibrated from the first samples of every slice: one pass counts sizes and puts every
tensor's median on level 7. They are then frozen in the run.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinyonn.corpus.file import Sample
from tinyonn.dense.load import DenseModel, load_model
from tinyonn.errors import CapacityError, InputError, first_line
from tinyonn.plan.usage import process_meter
from tinyonn.record.activations import BINS, COLUMN_LOW, STEPS, WEIGHT_LOW, weight_bins
from tinyonn.record.encode import Encoder
from tinyonn.record.gradients import CountSink
from tinyonn.record.levels import FLOAT32_SHIFT, MEDIAN_LEVEL, SUM_SAMPLES, base_from_counts
from tinyonn.record.recorder import Recorder
from tinyonn.record.sums import EIGHTHS, Site
from tinyonn.store.manifest import Segment
from tinyonn.store.records import TensorCalibration, UInt8, dither_seed
from tinyonn.workers.facts import WorkerFacts, WorkerUse

if TYPE_CHECKING:
    from tinyonn.config import ModelConfig

LOOKED_AT_ROWS = 512  # of a tensor's rows, evenly spread, where all would cost more than they tell


def calibrate(
    recorder: Recorder,
    samples: Sequence[Sample],
    windows: Sequence[Sequence[str]],
    progress: Callable[[], None] = lambda: None,
) -> dict[str, TensorCalibration]:
    """Calibrate every tensor.

    Parameters
    ----------
    recorder : Recorder
    samples : sequence of Sample
        Taken from all slices; bad ones are skipped.
    windows : sequence of sequences of names
        Tensors that are recorded together.

    Raises
    ------
    InputError
        No sample gave finite values.
    """
    result: dict[str, TensorCalibration] = {}
    bad: dict[int, str] = {}
    for names in windows:
        good = [sample for sample in samples if sample.index not in bad]
        recorder.open_counts(names)
        found = recorder.record(good, progress)
        bad.update(found)
        if found and result:  # the windows before have these samples in their bases: begin again without them
            left = [sample for sample in samples if sample.index not in bad]
            return calibrate(recorder, left, windows, progress)
        if len(found) == len(good):
            reasons = f" ({next(iter(bad.values()))})" if bad else ""
            raise InputError(
                f"none of the {len(samples)} calibration samples gives finite values{reasons}; "
                "check the model's weights, or use model.dtype: float32"
            )
        for name in names:
            result[name] = _bases(recorder, recorder.sites[name])
    return {p.name: result[p.name] for p in recorder.parameters}


def _bases(recorder: Recorder, site: Site) -> TensorCalibration:
    assert isinstance(site.sink, CountSink)
    median = _median_eighth(recorder, site)
    half_octave = int(np.exp2(np.float32(median / STEPS)).astype(np.float32).view(np.int32)) >> FLOAT32_SHIFT
    return TensorCalibration(max(half_octave - MEDIAN_LEVEL, 0), base_from_counts(site.sink.counts), median)


def _median_eighth(recorder: Recorder, site: Site) -> int:
    """Median of log2 act over weights and samples that are not zero, in 1/8 octaves."""
    if site.act_counts is not None:
        counts, low = site.act_counts, -EIGHTHS // 2
    else:
        assert site.histograms is not None
        bins, inputs = _looked_at(recorder, site)
        by_input = np.zeros((site.inputs, BINS), np.float64)
        np.add.at(by_input, (inputs, bins), 1.0)
        pairs = by_input.T @ site.histograms.astype(np.float64)  # [k, b]
        counts = np.zeros(2 * BINS - 1)
        np.add.at(counts, np.add.outer(np.arange(1, BINS), np.arange(1, BINS)), pairs[1:, 1:])
        low = -1 + STEPS * (COLUMN_LOW + WEIGHT_LOW)
    total = counts.sum()
    return low + int(np.searchsorted(np.cumsum(counts), total / 2)) if total > 0 else 0


def _looked_at(recorder: Recorder, site: Site) -> tuple[UInt8, Any]:
    """Weight bins of evenly spread rows and the input that each weight meets, both [rows, columns]."""
    rows, columns = site.matrix_shape
    chosen = np.arange(0, rows, max(1, rows // LOOKED_AT_ROWS))
    read = recorder.weights(site.parameter)
    bins = np.concatenate([weight_bins(read(row, row + 1)) for row in chosen.tolist()])
    inputs = np.broadcast_to(chosen[:, None] if site.by_row else np.arange(columns)[None, :], bins.shape)
    return bins, inputs


class Worker:
    """One recorder on one device.

    Parameters
    ----------
    model : ModelConfig
    threads : int
        CPU threads.
    seed : int
        Of the dithering.
    """

    def __init__(self, model: ModelConfig, threads: int, seed: int) -> None:
        process_meter()
        self._model = model
        self._threads = threads
        self._seed = seed
        self.recorder: Recorder
        self._calibration: dict[str, TensorCalibration] = {}
        self._windows: Sequence[Sequence[str]] = []
        self._done = 0
        self._recording = 0.0
        self._writing = 0.0

    def load(self) -> WorkerFacts:
        """Load the model and describe the worker. Apart from the constructor, so that errors come out as they are."""
        return self.adopt(load_model(self._model))

    def adopt(self, dense: DenseModel) -> WorkerFacts:
        """Take a model that is loaded already."""
        self.recorder = Recorder(dense, self._threads)
        device = self.recorder.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{self._threads}"
        return WorkerFacts(tuple(self.recorder.parameters), name, platform.node(), os.getpid())

    def calibrate(
        self, samples: Sequence[Sample], windows: Sequence[Sequence[str]]
    ) -> dict[str, TensorCalibration]:
        """See `tinyonn.record.worker.calibrate`."""
        torch.set_num_threads(self._threads)
        return calibrate(self.recorder, samples, windows)

    def prepare(self, calibration: dict[str, TensorCalibration], windows: Sequence[Sequence[str]]) -> None:
        """Take the run's calibration and the windows; needed once, before `record`."""
        self._calibration, self._windows = calibration, windows

    def record(self, samples: Sequence[Sample], window: int, known_bad: dict[int, str]) -> dict[int, str]:
        """Record a segment's samples for one window of tensors.

        Parameters
        ----------
        samples : sequence of Sample
        window : int
        known_bad : dict
            Samples already set aside, which are left out.

        Returns
        -------
        dict
            Reason by index of samples found bad now. Windows recorded before have them in their sums.

        Raises
        ------
        CapacityError
            Out of GPU memory.
        """
        torch.set_num_threads(self._threads)  # a setting of the calling thread
        started = time.perf_counter()
        calibration = {name: self._calibration[name] for name in self._windows[window]}
        good = [sample for sample in samples if sample.index not in known_bad]
        try:
            self.recorder.open(calibration, spills=len(good) > SUM_SAMPLES)
            bad = self.recorder.record(good, self._count)
        except torch.cuda.OutOfMemoryError as error:
            raise CapacityError(
                f"out of GPU memory on {self.recorder.device} ({first_line(error)}); "
                "use more record.windows, a smaller data.max_tokens or model.checkpointing: true"
            ) from None
        self._recording += time.perf_counter() - started
        return bad

    def write(self, fork: Any, segment: Segment, window: int) -> Any:
        """Encode the window's sums into the fork and hand the fork back. Frees the sums.

        Parameters
        ----------
        fork : icechunk.ForkSession
        segment : Segment
            Its `samples` are the good ones.
        window : int
        """
        from tinyonn.store.arrays import SegmentWriter, band_rows

        torch.set_num_threads(self._threads)
        started = time.perf_counter()
        writer = SegmentWriter(fork, segment.slice, segment.first, segment.last)
        for name in self._windows[window] if segment.samples else ():
            site, calibration = self.recorder.sites[name], self._calibration[name]
            shape = site.parameter.shape
            vector = len(shape) == 1
            encoder = Encoder(site.sums(segment.samples), self.recorder.weights(site.parameter), calibration)
            bands = encoder.bands(
                dither_seed(self._seed, segment.name, name), 1 if vector else band_rows(shape)
            )
            in_shape = ((0, band[0]) if vector else (first, band) for first, band in bands)
            writer.write(name, shape, calibration, encoder.codebooks, in_shape)
            site.close()
        self._writing += time.perf_counter() - started
        return fork

    def use(self) -> WorkerUse:
        """What has been used so far; may be called while `record` runs."""
        vram = torch.cuda.max_memory_reserved() if self.recorder.device.type == "cuda" else 0
        return WorkerUse.now(self._done, self._recording, self._writing, vram)

    def _count(self) -> None:
        self._done += 1
