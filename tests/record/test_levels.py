"""Levels: the formula itself, and every implementation of it to the bit."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyonn.record.levels import (
    add_levels_bfloat16,
    add_levels_float32,
    base_from_counts,
    levels,
    levels_torch,
)

SPECIAL = np.array([0.0, -0.0, 1e-45, 1.17e-38, 1.0, 1.4999999, 1.5, 2.0, -3.0, 3.4e38, np.inf], np.float32)


def by_formula(value: float, base: int) -> int:
    """Two levels an octave, steps at 2^n and 1.5 * 2^n, from the logarithm instead of the bits."""
    if value == 0 or abs(value) < 2.0**-126:
        return min(max((1 if abs(value) >= 2.0**-127 else 0) - base, 0), 15)
    if math.isinf(value):
        return min(max(510 - base, 0), 15)
    mantissa, exponent = math.frexp(abs(value))
    return min(max(2 * (exponent - 1 + 127) + (mantissa >= 0.75) - base, 0), 15)


@given(st.floats(width=32, allow_nan=False), st.integers(0, 500))
def test_levels_are_half_octaves(value: float, base: int) -> None:
    assert levels(np.array([value], np.float32), base)[0] == by_formula(value, base)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 500))
def test_all_kernels_agree_on_every_bit(seed: int, base: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.concatenate(
        [SPECIAL, (rng.standard_normal(500) * 2.0 ** rng.integers(-40, 40, 500)).astype(np.float32)]
    )
    expected = levels(values, base)
    np.testing.assert_array_equal(levels_torch(torch.from_numpy(values), base).numpy(), expected)
    sums = np.full(values.size, 100, np.uint8)
    top = add_levels_float32(values.view(np.int32), base, sums)
    np.testing.assert_array_equal(sums - 100, expected)
    assert top == 510  # infinity is among the special values
    half = torch.from_numpy(values).bfloat16()
    sums = np.zeros(values.size, np.uint8)
    top = add_levels_bfloat16(half.view(torch.int16).numpy(), base, sums)
    np.testing.assert_array_equal(sums, levels(half.float().numpy(), base))
    assert top == 510


def test_base_puts_the_median_on_level_seven() -> None:
    values = np.float32(np.random.default_rng(0).lognormal(-9, 2, 100_001))
    counts = np.bincount(values.view(np.int32) >> 22, minlength=512)
    base = base_from_counts(counts)
    assert levels(np.array([np.median(values)]), base)[0] == 7


def test_base_leaves_zeros_out_and_never_lifts_them() -> None:
    counts = np.zeros(512, np.int64)
    counts[0], counts[250] = 10**9, 3
    assert base_from_counts(counts) == 243
    counts[:] = 0
    counts[0] = 5
    assert base_from_counts(counts) == 0
    counts[2] = 1
    assert base_from_counts(counts) == 0  # not -5: zero stays on level 0
