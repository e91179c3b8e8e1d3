"""Records of a segment: what the codes stand for on average, and that they never depend on the banding."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from tinyonn.record.activations import column_tables, frequency_curve, level_curve, weight_bins
from tinyonn.record.encode import MEAN_STEPS, Encoder, ReadWeights, TensorSums, spread_rows
from tinyonn.store.records import TensorCalibration, positions, unpack

CALIBRATION = TensorCalibration(240, 200, -35)


def sums_of(rows: int, columns: int, samples: int, by_row: bool) -> tuple[TensorSums, np.ndarray]:
    rng = np.random.default_rng(rows)
    weights = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
    histograms = np.zeros((rows if by_row else columns, 256), np.uint16)
    for row in histograms:
        np.add.at(row, rng.integers(130, 170, samples), 1)
    grad = rng.integers(0, 15 * samples + 1, (rows, columns)).astype(np.uint16)
    return TensorSums(samples, grad, histograms, by_row), weights


def rows_of(weights: np.ndarray, first: int, last: int) -> np.ndarray:
    return weights[first:last]


def encoded(sums: TensorSums, read: ReadWeights, seed: int, band_rows: int) -> np.ndarray:
    bands = Encoder(sums, read, CALIBRATION).bands(seed, band_rows)
    return np.concatenate([band for _, band in bands])


def means_of(sums: TensorSums, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean act level, grad level and freq of every weight, straight from the histograms."""
    assert sums.histograms is not None
    level = column_tables(sums.histograms, level_curve(CALIBRATION.act_base))
    share = column_tables(sums.histograms, frequency_curve(CALIBRATION.freq_threshold))
    rows, columns = weights.shape
    inputs = np.arange(rows)[:, None] if sums.by_row else np.arange(columns)[None, :]
    bins = weight_bins(weights)
    return level[inputs, bins], sums.grad / sums.samples, share[inputs, bins]


@pytest.mark.parametrize("by_row", [False, True])
def test_codes_average_to_the_positions_and_bands_change_no_bit(by_row: bool) -> None:
    sums, weights = sums_of(96, 40, 30, by_row)
    read = partial(rows_of, weights)
    encoder = Encoder(sums, read, CALIBRATION)
    parts = list(encoder.bands(5, 7))
    assert [first for first, _ in parts] == list(range(0, 96, 7))
    np.testing.assert_array_equal(encoded(sums, read, 5, 96), np.concatenate([band for _, band in parts]))
    mean = np.zeros((3, 96, 40))
    repeats = 300
    for seed in range(repeats):
        mean += np.stack(unpack(encoded(sums, read, seed, 96))[:3]) / repeats
    for s, exact in enumerate(means_of(sums, weights)):
        expected = positions(exact, encoder.codebooks[s]) / 256
        assert np.abs(mean[s] - expected).max() < 0.2
        assert abs(float((mean[s] - expected).mean())) < 0.005


@pytest.mark.parametrize("by_row", [False, True])
def test_codebooks_are_fitted_to_the_segments_own_means(by_row: bool) -> None:
    """No code is wasted: the codes' entropy is near that of sixteen used about evenly, and the ends hold all."""
    sums, weights = sums_of(512, 96, 30, by_row)
    encoder = Encoder(sums, partial(rows_of, weights), CALIBRATION)
    codes = unpack(np.concatenate([band for _, band in encoder.bands(1, 64)]))
    for s, exact in enumerate(means_of(sums, weights)):
        book = encoder.codebooks[s]
        assert np.all(np.diff(book) > 0)
        step = 1 / MEAN_STEPS
        assert book[0] <= exact.min() + step
        assert book[-1] >= exact.max() - step
        assert len(np.unique(codes[s])) == 16


def test_a_large_tensor_is_fitted_to_rows_spread_over_it() -> None:
    for rows, columns, by_row, least in (
        (6912, 2560, False, 400),
        (151_936, 2560, True, 8000),
        (40_000, 32, False, 30_000),
    ):
        spans = spread_rows(rows, columns, by_row)
        assert all(0 <= first < last <= rows for first, last in spans)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert least <= sum(last - first for first, last in spans) <= max(2**20 // columns, 8192)
        gaps = [b[0] - a[0] for a, b in pairwise(spans)]
        assert max(gaps) <= 2 * min(gaps)
    assert spread_rows(100, 100, False) == [(0, 100)]
    assert spread_rows(1, 5_000_000, False) == [(0, 1)]


def test_dense_sums_are_encoded_from_their_own_means() -> None:
    rng = np.random.default_rng(0)
    act, grad, freq = (
        rng.integers(0, 151, (1, 500)),
        rng.integers(0, 151, (1, 500)),
        rng.integers(0, 11, (1, 500)),
    )
    sums = TensorSums(10, grad.astype(np.uint8), None, False, act.astype(np.uint8), freq.astype(np.uint8))
    encoder = Encoder(sums, lambda a, b: np.zeros((b - a, 500), np.float32), CALIBRATION)
    ((first, records),) = encoder.bands(1, 1)
    assert first == 0
    codes = unpack(records)
    for code, part, book in zip(codes, (act / 10, grad / 10, freq / 10), encoder.codebooks, strict=False):
        position = positions(part, book) / 256
        assert (np.floor(position) <= code).all()
        assert (code <= np.ceil(position)).all()
    assert not codes[3].any()
