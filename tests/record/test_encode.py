"""Records of a segment: what the codes stand for on average, and that they never depend on the banding."""

from __future__ import annotations

from functools import partial

import numpy as np

from tinyonn.record.activations import position_tables, weight_bins
from tinyonn.record.encode import TensorSums, encode
from tinyonn.store.records import TensorCalibration, positions, unpack

LEVELS = tuple(float(x) for x in np.linspace(0.5, 14, 16))
SHARES = tuple(float(x) for x in np.linspace(0, 1, 16))
CALIBRATION = TensorCalibration(240, 200, -35, LEVELS, LEVELS, SHARES)


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


def test_codes_average_to_the_positions_and_bands_change_no_bit() -> None:
    for by_row in (False, True):
        sums, weights = sums_of(96, 40, 30, by_row)
        read = partial(rows_of, weights)
        whole = np.concatenate([band for _, band in encode(sums, read, CALIBRATION, 5, 96)])
        parts = list(encode(sums, read, CALIBRATION, 5, 7))
        assert [first for first, _ in parts] == list(range(0, 96, 7))
        np.testing.assert_array_equal(whole, np.concatenate([band for _, band in parts]))
        mean = np.zeros((3, 96, 40))
        repeats = 300
        for seed in range(repeats):
            records = np.concatenate([band for _, band in encode(sums, read, CALIBRATION, seed, 96)])
            mean += np.stack(unpack(records)[:3]) / repeats
        tables = position_tables(sums.histograms, CALIBRATION)
        inputs = np.arange(96)[:, None] if by_row else np.arange(40)[None, :]
        expected = tables[inputs, weight_bins(weights)].astype(np.float64) / 256
        grad = positions(sums.grad / sums.samples, CALIBRATION.codebooks()[1]) / 256
        assert np.abs(mean[0] - expected[..., 0]).max() < 0.2
        assert np.abs(mean[1] - grad).max() < 0.2
        assert np.abs(mean[2] - expected[..., 1]).max() < 0.2
        assert abs(float((mean[1] - grad).mean())) < 0.005


def test_dense_sums_are_encoded_from_their_own_means() -> None:
    rng = np.random.default_rng(0)
    act, grad, freq = (
        rng.integers(0, 151, (1, 500)),
        rng.integers(0, 151, (1, 500)),
        rng.integers(0, 11, (1, 500)),
    )
    sums = TensorSums(10, grad.astype(np.uint8), None, False, act.astype(np.uint8), freq.astype(np.uint8))
    ((first, records),) = encode(sums, lambda a, b: np.zeros((b - a, 500), np.float32), CALIBRATION, 1, 1)
    assert first == 0
    codes = unpack(records)
    for code, part, book in zip(
        codes, (act / 10, grad / 10, freq / 10), CALIBRATION.codebooks(), strict=False
    ):
        position = positions(part, book) / 256
        assert (np.floor(position) <= code).all()
        assert (code <= np.ceil(position)).all()
    assert not codes[3].any()
