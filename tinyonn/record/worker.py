"""What one recorder does: load the model once, then record segments and write them into forks of the store.

Plain Python without Ray: the driver runs it as an actor, tests run it directly. A segment goes through `record` and
then `write` for each window; the store's fork is begun only when there is something to write.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tinyonn.corpus.file import Sample
from tinyonn.dense.load import DenseModel, load_model
from tinyonn.errors import CapacityError
from tinyonn.plan.usage import process_meter
from tinyonn.record.calibration import calibrate
from tinyonn.record.encode import Encoder
from tinyonn.record.levels import SUM_SAMPLES
from tinyonn.record.recorder import Recorder
from tinyonn.store.manifest import Segment
from tinyonn.store.records import TensorCalibration, dither_seed
from tinyonn.workers.facts import WorkerFacts, WorkerUse

if TYPE_CHECKING:
    from tinyonn.config import ModelConfig


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
        """See `tinyonn.record.calibration.calibrate`."""
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
                f"out of GPU memory on {self.recorder.device} ({str(error).splitlines()[0]}); "
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
