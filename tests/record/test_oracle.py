"""The recorder against the float64 oracle: every parameter kind, every architecture, NF4 and unquantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.dense.architectures import ARCHITECTURES, VOCAB
from tests.record.oracle import float64_copy, statistics
from tinyonn.config import ModelConfig
from tinyonn.corpus.file import Sample
from tinyonn.dense.load import load_model
from tinyonn.record.activations import column_tables, frequency_curve, level_curve, weight_bins
from tinyonn.record.levels import levels
from tinyonn.record.recorder import Recorder
from tinyonn.record.worker import calibrate
from tinyonn.store.records import TensorCalibration

SAMPLES = 6


def samples_of(count: int, seed: int = 0) -> list[Sample]:
    """Random tokens of unequal length; the first third of each is not labelled."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        ids = rng.integers(0, VOCAB - 8, 24 + 3 * index).astype(np.int32)
        labels = ids.copy()
        labels[: len(ids) // 3] = -100
        found.append(Sample(index, "x", ids, labels))
    return found


def record_levels(
    recorder: Recorder, samples: list[Sample], calibration: dict[str, TensorCalibration]
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Mean act level, mean grad level and freq of every weight, before any INT4 code."""
    recorder.open(calibration, spills=False)
    assert recorder.record(samples) == {}
    found = {}
    for name, site in recorder.sites.items():
        sums = site.sums(len(samples))
        grad = sums.grad / len(samples)
        if sums.histograms is None:
            assert sums.act is not None and sums.freq is not None
            act, freq = sums.act / len(samples), sums.freq / len(samples)
        else:
            rows, columns = site.matrix_shape
            bins = weight_bins(recorder.weights(site.parameter)(0, rows))
            inputs = np.arange(rows)[:, None] if site.by_row else np.arange(columns)[None, :]
            act = column_tables(sums.histograms, level_curve(calibration[name].act_base))[inputs, bins]
            freq = column_tables(sums.histograms, frequency_curve(calibration[name].freq_threshold))[
                inputs, bins
            ]
        shape = site.parameter.shape
        found[name] = (act.reshape(shape), grad.reshape(shape), freq.reshape(shape))
    return found


CASES = [(name, quantization) for name in ARCHITECTURES for quantization in ("none", "nf4")] + [
    ("gemma2", "none"),  # a soft cap behind the head
    ("granite", "nf4"),  # a scale behind it
    ("minicpm3", "none"),  # a factor before it
    ("opt", "none"),  # rows of an embedding that its input does not say
    ("gpt2_narrow", "nf4"),  # rows that are no whole blocks of NF4
]


@pytest.mark.parametrize(("name", "quantization"), CASES)
def test_every_weight_against_the_oracle(
    name: str, quantization: str, model_of: Callable[[str], Path]
) -> None:
    config = ModelConfig(path=str(model_of(name)), quantization=quantization, dtype="float32", device="cpu")
    dense = load_model(config)
    twin = float64_copy(dense.model)
    recorder = Recorder(dense)
    samples = samples_of(SAMPLES)
    calibration = calibrate(recorder, samples, [list(recorder.sites)])
    recorded = record_levels(recorder, samples, calibration)
    exact = [statistics(twin, sample) for sample in samples]
    assert set(recorded) == set(exact[0]) == {name for name, _ in twin.named_parameters()}
    for parameter, (act, grad, freq) in recorded.items():
        frozen = calibration[parameter]
        grads = np.mean([levels(one[parameter][1], frozen.grad_base) for one in exact], axis=0)
        acts = np.mean([levels(one[parameter][0], frozen.act_base) for one in exact], axis=0)
        threshold = 2.0 ** (frozen.freq_threshold / 8)
        shares = np.mean([one[parameter][0] > threshold for one in exact], axis=0)
        # Rounding may move a value across the edge of a level: by one, in one sample, and seldom. Without rotary
        # positions the softmax does not see a key's bias, whose gradient is rounding alone.
        if max(float(one[parameter][1].max()) for one in exact) > 1e-12:
            assert np.abs(grad - grads).max() <= 1.01 / SAMPLES * 2, parameter
            assert np.mean(grad != grads) < 0.01, parameter
        # Both factors of act are binned at 1/8 octave, so a sample near a level's edge is off by one.
        assert np.abs(act - acts).max() <= 1.01, parameter
        assert np.abs(act - acts).mean() < 0.15, parameter
        assert abs(float(np.mean(act - acts))) < 0.05, parameter
        assert np.abs(freq - shares).mean() < 0.05, parameter


def test_bfloat16_matmuls_stay_close_to_the_oracle(model_of: Callable[[str], Path]) -> None:
    config = ModelConfig(path=str(model_of("qwen2")), quantization="nf4", dtype="bfloat16", device="cpu")
    dense = load_model(config)
    twin = float64_copy(dense.model)
    recorder = Recorder(dense)
    samples = samples_of(SAMPLES)
    calibration = calibrate(recorder, samples, [list(recorder.sites)])
    recorded = record_levels(recorder, samples, calibration)
    exact = [statistics(twin, sample) for sample in samples]
    for parameter, (_, grad, _) in recorded.items():
        grads = np.mean(
            [levels(one[parameter][1], calibration[parameter].grad_base) for one in exact], axis=0
        )
        assert np.abs(grad - grads).mean() < 0.4, parameter


@pytest.mark.parametrize("name", ["qwen2", "gemma", "gpt2"])
def test_gradient_checkpointing_changes_no_bit(name: str, model_of: Callable[[str], Path]) -> None:
    found = []
    for checkpointing in (False, True):
        config = ModelConfig(
            path=str(model_of(name)),
            quantization="nf4",
            dtype="float32",
            device="cpu",
            checkpointing=checkpointing,
        )
        recorder = Recorder(load_model(config))
        samples = samples_of(SAMPLES)
        calibration = calibrate(recorder, samples, [list(recorder.sites)])
        found.append(record_levels(recorder, samples, calibration))
    for parameter, plain in found[0].items():
        for one, other in zip(plain, found[1][parameter], strict=True):
            np.testing.assert_array_equal(one, other, err_msg=parameter)


def test_loss_is_the_models_own(model_of: Callable[[str], Path]) -> None:
    import torch

    dense = load_model(
        ModelConfig(path=str(model_of("qwen3")), quantization="none", dtype="float32", device="cpu")
    )
    recorder = Recorder(dense)
    recorder.open_counts([])
    for sample in samples_of(3):
        ids, labels = (torch.from_numpy(a.astype(np.int64))[None] for a in (sample.input_ids, sample.labels))
        with torch.no_grad():
            expected = float(dense.model(input_ids=ids, labels=labels).loss)
        assert recorder.run(sample) == pytest.approx(expected, rel=1e-5)
