"""Calibration: the bases of the levels, from the first samples of every slice.

One pass counts sizes and puts every tensor's median on level 7. The bases are then frozen in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinyonn.corpus.file import Sample
from tinyonn.errors import InputError
from tinyonn.record.activations import BINS, COLUMN_LOW, STEPS, WEIGHT_LOW, weight_bins
from tinyonn.record.gradients import CountSink
from tinyonn.record.levels import FLOAT32_SHIFT, MEDIAN_LEVEL, base_from_counts
from tinyonn.record.recorder import Recorder
from tinyonn.record.sites import EIGHTHS, Site
from tinyonn.store.records import TensorCalibration, UInt8

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
