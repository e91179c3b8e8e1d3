"""The sums of a band against whole float64 arrays in NumPy, on the CPU and in the operations that a GPU runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from tests.profile.oracle import random_group, totals_of
from tinyonn.profile.kernel import GroupSums, Totals, sums_torch

BASES = (245, 230)
CPU = torch.device("cpu")


def band(
    rows: int, columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Weights, gradient over many octaves, rms by row and by column; some of each are 0."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=draw)
    D = torch.randn(rows, columns, generator=draw) * torch.exp2(
        8 * torch.randn(rows, columns, generator=draw) - 12
    )
    W[torch.rand(rows, columns, generator=draw) < 0.1] = 0
    D[torch.rand(rows, columns, generator=draw) < 0.1] = 0
    rms = {True: torch.rand(rows, generator=draw), False: torch.rand(columns, generator=draw)}
    rms[False][0] = 0
    return W.to(dtype), D.to(dtype), rms


def oracle(
    W: torch.Tensor, D: torch.Tensor, rms: torch.Tensor, by_row: bool, group: Any, groups: int
) -> Totals:
    # Levels are of float32 values: the product is rounded once, as the kernel rounds it.
    act = W.float().abs().numpy() * (rms[:, None] if by_row else rms[None, :]).numpy()
    return totals_of(W.float().numpy(), D.float().numpy(), act, group, groups, BASES)


def assert_close(found: Totals, wanted: Totals, rtol: float = 1e-12) -> None:
    np.testing.assert_array_equal(found.act, wanted.act)
    np.testing.assert_array_equal(found.grad, wanted.grad)
    np.testing.assert_allclose(found.contribution, wanted.contribution, rtol=rtol)
    np.testing.assert_allclose(found.pull, wanted.pull, rtol=rtol, atol=rtol * wanted.contribution.max())


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(64, 96, 7), (3, 41, 255), (1, 1, 1), (130, 5, 2)])
def test_a_band_against_numpy(rows: int, columns: int, groups: int, dtype: torch.dtype, by_row: bool) -> None:
    W, D, rms = band(rows, columns, dtype)
    group = random_group((rows, columns), groups, 1)
    sums = GroupSums(groups, CPU)
    for first in range(0, rows, 32):
        part = slice(first, first + 32)
        here = rms[True][part] if by_row else rms[False]
        sums.add(W[part], D[part], torch.from_numpy(group[part]), here, by_row, BASES)
    assert_close(sums.totals(), oracle(W, D, rms[by_row], by_row, group, groups))


def test_sums_of_many_bands_leave_32_bits() -> None:
    ones, group = torch.ones(512, 2048), torch.zeros(512, 2048, dtype=torch.uint8)
    sums = GroupSums(1, CPU)
    bands = (1 << 32) // (15 * ones.numel()) + 2
    for _ in range(bands):
        sums.add(ones, ones, group, torch.ones(2048), False, (0, 0))
    found = sums.totals()
    assert found.act[0] == found.grad[0] == 15 * ones.numel() * bands > 1 << 32
    assert found.contribution[0] == found.pull[0] == ones.numel() * bands


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operations_of_a_gpu_against_numpy(dtype: torch.dtype) -> None:
    W, D, rms = band(70, 90, dtype)
    group = random_group((70, 90), 9, 2)
    wanted = oracle(W, D, rms[False], False, group, 9)
    levels, sums, top = sums_torch(W, D, torch.from_numpy(group), rms[False][None, :], BASES)
    found = Totals(*levels[:, :9].numpy(), *sums[:, :9].numpy())
    np.testing.assert_array_equal(found.act, wanted.act)
    np.testing.assert_array_equal(found.grad, wanted.grad)
    largest = float((W.double() * D.double()).abs().max())
    error = (
        2.0**-30 * largest * group.size
    )  # half a unit for each weight, the unit at most 2^-29 of the largest
    np.testing.assert_allclose(found.contribution, wanted.contribution, rtol=0, atol=error)
    np.testing.assert_allclose(found.pull, wanted.pull, rtol=0, atol=error)
    assert int(top) == int((D.float().abs().view(torch.int32) >> 22).max())


def test_the_order_of_additions_on_a_gpu_changes_no_bit() -> None:
    W, D, rms = band(40, 60, torch.float32)
    group = torch.from_numpy(random_group((40, 60), 5, 3))
    r = rms[False][None, :].expand(40, 60)
    order = torch.randperm(W.numel(), generator=torch.Generator().manual_seed(1))
    mixed_W, mixed_D, mixed_group, mixed_r = (a.reshape(-1)[order].view(40, 60) for a in (W, D, group, r))
    one = sums_torch(W, D, group, r, BASES)
    other = sums_torch(mixed_W, mixed_D, mixed_group, mixed_r, BASES)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_nothing_but_zeros_on_a_gpu() -> None:
    zeros, group = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.uint8)
    levels, sums, top = sums_torch(zeros, zeros, group, torch.ones(1, 8), BASES)
    assert not levels.any() and not sums.any() and int(top) == 0


def test_a_second_thread_takes_half_and_always_the_same() -> None:
    W, D, rms = band(301, 512, torch.float32)
    group = random_group((301, 512), 11, 4)
    found = []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            sums = GroupSums(11, CPU, pool)
            sums.add(W, D, torch.from_numpy(group), rms[True], True, BASES)
            found.append(sums.totals())
    assert_close(found[0], oracle(W, D, rms[True], True, group, 11))
    for other in found[1:]:
        assert all(np.array_equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_is_seen_though_its_weight_is_in_no_group(value: float) -> None:
    W, D, rms = band(8, 16, torch.float32)
    group = torch.full((8, 16), 255, dtype=torch.uint8)
    finite = GroupSums(3, CPU).add(W, D, group, rms[False], False, BASES)
    D[5, 7] = value
    assert finite < 510 <= GroupSums(3, CPU).add(W, D, group, rms[False], False, BASES)
    assert sums_torch(W, D, group, rms[False][None, :], BASES)[2] >= 510
