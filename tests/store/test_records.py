from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.invariants import dither
from tinyonn.store.records import (
    UInt8,
    average_records,
    averaged_codebooks,
    codebook_of,
    dither_bits,
    dither_seed,
    pack,
    positions,
    round_positions,
    unpack,
    value_tables,
    weighted_values,
)

CODES = hnp.arrays(np.uint8, st.integers(1, 40), elements=st.integers(0, 15))
BOOKS = np.stack([np.linspace(0, 15, 16), np.cumsum(np.linspace(0.3, 1.5, 16)), np.linspace(0, 1, 16) ** 2])


@given(hnp.arrays(np.uint16, hnp.array_shapes(max_dims=3, max_side=8)))
def test_unpack_against_hexadecimal_digits(records: np.ndarray[tuple[int, ...], np.dtype[np.uint16]]) -> None:
    """An independent reader: a record is four hexadecimal digits, act first."""
    digits = np.array([[int(digit, 16) for digit in f"{int(value):04x}"] for value in records.ravel()])
    for index, field in enumerate(unpack(records)):
        assert field.dtype == np.uint8
        assert field.shape == records.shape
        assert np.array_equal(field.ravel(), digits[:, index])
    assert np.array_equal(pack(*unpack(records)), records)


def test_a_record_by_hand() -> None:
    ten, eleven, twelve = (np.array([code], np.uint8) for code in (10, 11, 12))
    assert pack(ten, eleven, twelve, 13)[0] == 0xABCD


def test_seeds_differ_by_each_part_and_never_change() -> None:
    assert dither_seed(7, "code/0-16", "embed.weight") == 0x576AB8C20829DCE8
    seeds = {
        dither_seed(*key)
        for key in [(7, "a/0-1", "t"), (8, "a/0-1", "t"), (7, "a/0-2", "t"), (7, "a/0-1", "u")]
    }
    assert len(seeds) == 4


@settings(deadline=None)
@given(seed=st.integers(0, 2**64 - 1))
def test_dither_is_splitmix64(seed: int) -> None:
    bits = [int(dither_bits(np.uint64(seed), np.uint64(i))) for i in range(5)]
    assert bits == [int(value) for value in dither(seed, 5)]


@given(
    values=st.lists(st.floats(0, 15), min_size=1, max_size=200, unique=True).map(sorted),
    data=st.data(),
)
def test_codebooks_increase_strictly_whatever_the_means(values: list[float], data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 10**6), min_size=len(values), max_size=len(values)))
    book = codebook_of(np.array(values), np.array(counts, float), 1 / 256)
    assert len(book) == 16
    assert np.all(np.diff(book) > 0)
    assert book[0] == values[0]
    assert book[-1] >= values[-1]


def test_entries_follow_the_root_of_the_density() -> None:
    values = np.linspace(0, 15, 3001)
    counts = np.exp(-((values - 5) ** 2) / 4)
    book = codebook_of(values, counts, 1 / 256)
    roots = [np.sqrt(counts[(values > a) & (values <= b)]).sum() for a, b in pairwise(book)]
    assert max(roots[1:-1]) < 1.5 * min(roots[1:-1])


def test_entries_of_a_final_codebook_have_equal_mass() -> None:
    values = np.linspace(0, 15, 3001)
    counts = np.exp(-((values - 5) ** 2) / 4)
    book = codebook_of(values, counts, 1 / 4096, final=True)
    nearest = np.abs(values[:, None] - book).argmin(axis=1)
    masses = np.bincount(nearest, counts, 16) / counts.sum()
    assert np.abs(masses[1:-1] * 16 - 1).max() < 0.12


def test_codebooks_of_an_average_are_averages_of_quantiles() -> None:
    rng = np.random.default_rng(0)
    narrow, wide = rng.normal(5, 0.5, 20_000), rng.normal(7, 1.5, 20_000)
    books = [codebook_of(np.sort(means), np.ones(20_000)) for means in (narrow, wide)]
    weights = np.array([0.25, 0.75])
    both = averaged_codebooks([np.stack([book] * 3) for book in books], weights)
    between = codebook_of(np.sort(0.25 * np.sort(narrow) + 0.75 * np.sort(wide)), np.ones(20_000))
    assert both.shape == (3, 16)
    assert np.abs(both[0] - between)[1:-1].max() < 0.05


def test_a_value_that_holds_much_of_the_mass_gets_entries_on_the_way_to_it() -> None:
    values = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    book = codebook_of(values, np.array([50.0, 10.0, 5.0, 5.0, 30.0]), 1 / 4096, share=True)
    assert book[:5].tolist() == [0.0, 0.015625, 0.03125, 0.0625, 0.125]
    assert book[-4:].tolist() == [0.875, 0.9375, 0.96875, 1.0]
    assert len(book) == 16
    assert np.all(np.diff(book) > 0)


@settings(deadline=None, max_examples=20)
@given(position=st.integers(0, 3840), seed=st.integers(0, 2**63))
def test_dithering_is_unbiased_and_its_fields_independent(position: int, seed: int) -> None:
    """The mean code is the position, in each field, to within five standard errors."""
    count = 20_000
    same = np.full(count, position, np.uint16)
    out = np.empty(count, np.uint16)
    round_positions(same, same, same, np.uint64(seed), np.uint64(0), out)
    fields = [field.astype(float) for field in unpack(out)]
    share = position % 256 / 256
    error = np.sqrt(share * (1 - share) / count)
    for field in fields[:3]:
        assert set(np.unique(field)) <= {position // 256, min(position // 256 + 1, 15)}
        assert abs(field.mean() - position / 256) <= 5 * error + 1e-12
    assert not fields[3].any()
    if 0.1 < share < 0.9:
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert abs(np.corrcoef(fields[a], fields[b])[0, 1]) < 5 / np.sqrt(count)
        assert abs(np.corrcoef(fields[0][1:], fields[0][:-1])[0, 1]) < 5 / np.sqrt(count)


def test_rounding_does_not_depend_on_how_a_tensor_is_cut() -> None:
    rng = np.random.default_rng(0)
    a, g, f = (rng.integers(0, 3841, 1000).astype(np.uint16) for _ in range(3))
    whole, cut = np.empty(1000, np.uint16), np.empty(1000, np.uint16)
    round_positions(a, g, f, np.uint64(9), np.uint64(50), whole)
    for first, last in ((0, 300), (300, 301), (301, 1000)):
        part = slice(first, last)
        round_positions(a[part], g[part], f[part], np.uint64(9), np.uint64(50 + first), cut[part])
    assert np.array_equal(whole, cut)


def test_positions_at_and_between_entries() -> None:
    book = BOOKS[1]
    assert positions(book, book).tolist() == [256 * k for k in range(16)]
    assert positions(np.array([book[3] * 0.5 + book[4] * 0.5, -9.0, 99.0]), book).tolist() == [896, 0, 3840]


def merged(
    parts: list[np.ndarray[tuple[int], np.dtype[np.uint16]]], nearest: bool, seed: int = 3
) -> list[UInt8]:
    out = np.empty_like(parts[0])
    values = weighted_values([BOOKS] * len(parts), np.full(len(parts), 1 / len(parts)))
    average_records(tuple(parts), values, value_tables(BOOKS), np.uint64(seed), np.uint64(0), nearest, out)
    return list(unpack(out))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_averages_are_unbiased(count: int) -> None:
    """Averaged over many seeds, the decoded merge is the mean of the decoded parts, in position."""
    rng = np.random.default_rng(count)
    parts = [(rng.integers(0, 4096, 400) << 4).astype(np.uint16) for _ in range(count)]
    exact = [np.mean([BOOKS[s][unpack(part)[s]] for part in parts], axis=0) for s in range(3)]
    total = [np.zeros(400) for _ in range(3)]
    rounds = 600
    for seed in range(rounds):
        for s, field in enumerate(merged(parts, False, seed * 7919)[:3]):
            total[s] += field
    for s in range(3):
        position = np.interp(exact[s], BOOKS[s], np.arange(16.0))
        off = total[s] / rounds - position
        step = (BOOKS[s][-1] - BOOKS[s][0]) / 4096 / np.diff(BOOKS[s]).min()
        assert np.abs(off).max() < 5 * 0.5 / np.sqrt(rounds) + step
        assert abs(off.mean()) < 5 * 0.5 / np.sqrt(rounds * 400) + 1 / 256


def test_the_average_of_equals_is_themselves_to_the_nearest() -> None:
    same = (np.arange(4096) << 4).astype(np.uint16)
    assert [field.tolist() for field in merged([same, same, same], True)] == [
        f.tolist() for f in unpack(same)
    ]
