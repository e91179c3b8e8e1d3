"""Banded products and exact sums."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tinyonn.record.gradients import CountSink, LevelSink, band_height, product_bands, spill
from tinyonn.record.levels import FINITE_HALF_OCTAVES, levels_torch


def slot() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 3, 5), (7, 300, 33), (64, 1000, 2600)])
def test_bands_make_up_the_whole_product(tokens: int, rows: int, columns: int) -> None:
    A, B = torch.randn(tokens, rows, dtype=torch.float64), torch.randn(tokens, columns, dtype=torch.float64)
    whole = torch.empty(rows, columns, dtype=torch.float64)
    tallest = 0
    for first, band in product_bands(A, B):
        whole[first : first + band.shape[0]] = band
        tallest = max(tallest, band.shape[0])
    torch.testing.assert_close(whole, A.T @ B)
    assert tallest <= band_height(columns, 8)


def test_no_band_is_larger_than_promised() -> None:
    for columns in (64, 2560, 6912, 151_936):
        for itemsize in (2, 4):
            height = band_height(columns, itemsize)
            assert height % 64 == 0
            assert height == 64 or height * columns * itemsize <= 2 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_exact_in_two_threads_and_in_one(dtype: torch.dtype) -> None:
    bands = [torch.randn(700, 400).to(dtype) for _ in range(17)]
    expected = sum(levels_torch(band, 240).to(torch.int32) for band in bands)
    with ThreadPoolExecutor(1) as pool:
        for executor in (None, pool):
            sums = torch.zeros(1000, 400, dtype=torch.uint8)
            sink = LevelSink(sums, 240, executor)
            top = slot()
            for band in bands:
                sink.add(band, 300, top)
            assert torch.equal(sums[300:].to(torch.int32), torch.as_tensor(expected))
            assert not sums[:300].any()
            assert int(top) == max(int((band.float().abs().view(torch.int32) >> 22).max()) for band in bands)


def test_seventeen_samples_of_the_highest_level_fill_a_byte() -> None:
    sums = torch.zeros(2, 3, dtype=torch.uint8)
    sink = LevelSink(sums, 0)
    for _ in range(17):
        sink.add(torch.full((2, 3), 1e30), 0, slot())
    assert sums.tolist() == [[255] * 3] * 2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite_are_noticed(value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        band = torch.ones(4, 5, dtype=dtype)
        band[2, 3] = value
        for sink in (LevelSink(torch.zeros(4, 5, dtype=torch.uint8), 240), CountSink()):
            top = slot()
            sink.add(band, 0, top)
            assert int(top) >= FINITE_HALF_OCTAVES
            top = slot()
            sink.add_rows(torch.arange(4), band.float(), top)
            assert int(top) >= FINITE_HALF_OCTAVES


def test_rows_are_added_where_they_belong() -> None:
    sums = torch.zeros(6, 2, dtype=torch.uint8)
    LevelSink(sums, 246).add_rows(torch.tensor([4, 1]), torch.tensor([[1.0, 0.0], [2.0, 1.5]]), slot())
    assert sums.tolist() == [[0, 0], [10, 9], [0, 0], [0, 0], [8, 0], [0, 0]]


def test_spilled_sums_saturate_and_never_wrap() -> None:
    total = np.array([0, 65_000, 65_535], np.uint16)
    sums = np.array([255, 255, 1], np.uint8)
    for _ in range(4):
        spill(sums, total)
        assert not sums.any()
        sums[:] = (255, 255, 1)
    assert total.tolist() == [1020, 65_535, 65_535]


def test_counts_hold_every_value() -> None:
    sink = CountSink()
    band = torch.tensor([[0.0, 1.0, -1.25], [1.5, 2.0, 3.0]])
    sink.add(band, 0, slot())
    sink.forget()
    sink.add(band, 0, slot())
    sink.keep()
    assert sink.counts.sum() == 6
    assert sink.counts[254] == 2
    assert sink.counts[255] == sink.counts[256] == sink.counts[257] == sink.counts[0] == 1
