"""The activation side: bins, tables and what they promise, against plain NumPy on unbinned numbers."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyonn.record.activations import (
    add_dense_levels,
    add_to_histograms,
    column_bins,
    column_tables,
    frequency_curve,
    level_curve,
    weight_bins,
)
from tinyonn.record.levels import levels


@settings(deadline=None)  # the first example compiles
@given(st.floats(2.0**-22, 2.0**8, width=32))
def test_weight_bins_are_eighth_octaves(value: float) -> None:
    found = int(weight_bins(np.array([value], np.float32))[0])
    # The bin is taken from the top seven bits of the mantissa: exact for bfloat16, 1/128 off at most for float32.
    exact = 1 + 8 * (np.log2(value) + 23)
    assert abs(found + 0.5 - exact) <= 0.5 + 8 * np.log2(1 + 1 / 128)


@settings(deadline=None)  # the first example compiles
@given(st.floats(2.0**-17, 2.0**13, width=32))
def test_column_bins_are_eighth_octaves_of_the_rms(rms: float) -> None:
    top = torch.zeros(1, dtype=torch.int32)
    bins = column_bins(torch.tensor([rms * rms]), top)
    assert 0 < int(top) < 510
    assert abs(int(bins[0]) + 0.5 - (1 + 8 * (np.log2(rms) + 18))) <= 0.5 + 8 * np.log2(1 + 1 / 128)


def test_zero_has_a_bin_of_its_own_and_the_ends_are_clipped() -> None:
    assert weight_bins(np.array([0.0, -0.0, 1e-30, 1e9], np.float32)).tolist() == [0, 0, 0, 255]
    top = torch.zeros(1, dtype=torch.int32)
    assert column_bins(torch.tensor([0.0, 1e-30, 1e30]), top).tolist() == [0, 0, 255]
    assert int(top) < 510


def test_infinite_and_missing_inputs_are_noticed() -> None:
    for value in (float("inf"), float("nan"), -float("nan")):  # the processor's own NaN has a sign
        top = torch.zeros(1, dtype=torch.int32)
        column_bins(torch.tensor([1.0, value]), top)
        assert int(top) >= 510


def test_tables_give_the_mean_level_and_the_share_above_the_threshold() -> None:
    rng = np.random.default_rng(0)
    samples, inputs = 400, 40
    rms = np.exp2(rng.normal(0, 1.5, (samples, inputs)) + rng.normal(0, 2, inputs)).astype(np.float32)
    rms[rng.random(rms.shape) < 0.2] = 0.0
    weights = (rng.standard_normal((64, inputs)) * 0.05).astype(np.float32)
    weights[rng.random(weights.shape) < 0.1] = 0.0
    histograms = np.zeros((inputs, 256), np.uint16)
    top = torch.zeros(1, dtype=torch.int32)
    bins = np.stack([column_bins(torch.from_numpy(row * row), top).numpy() for row in rms])
    add_to_histograms(bins, histograms)
    assert (histograms.sum(axis=1) == samples).all()
    act = np.abs(weights)[None] * rms[:, None, :]
    base, threshold = 240, -35
    exact_level = levels(act, base).astype(np.float64).mean(axis=0)
    exact_share = (act > 2.0 ** (threshold / 8)).mean(axis=0)
    where = (np.arange(inputs)[None, :], weight_bins(weights))
    level = column_tables(histograms, level_curve(base))[where]
    share = column_tables(histograms, frequency_curve(threshold))[where]
    assert np.abs(level - exact_level).max() < 0.2  # levels: a code is some half a level wide
    assert abs(float((level - exact_level).mean())) < 0.01
    assert np.abs(share - exact_share).max() < 0.05
    assert (level[weights == 0] == 0).all()
    assert (share[weights == 0] == 0).all()


def test_dense_sums_equal_the_formula() -> None:
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((12, 9)).astype(np.float32)
    row, column = rng.random(12).astype(np.float32), rng.random(9).astype(np.float32)
    act, freq = np.zeros((12, 9), np.uint8), np.zeros((12, 9), np.uint8)
    for _ in range(3):
        add_dense_levels(weights, row, column, 247, 0.5, act, freq)
    values = np.abs(weights) * np.sqrt(row[:, None] + column[None, :])
    np.testing.assert_array_equal(act, 3 * levels(values, 247))
    np.testing.assert_array_equal(freq, 3 * (values > 0.5))
