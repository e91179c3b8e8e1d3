"""Scores and affinities against plain NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.recorded import parameters, segment_of
from tinyonn.score.tables import Part, ScoreTables, fit_tables, score_records, worth_of_statistics
from tinyonn.store.records import Float64, UInt8, UInt16, unpack

SAMPLES = {"code": 40, "prose": 30, "sums": 20}
PARAMETER = parameters()[2]
BALANCED = (0.5, 0.75, 0.0, 1.0)


def world(parts: int) -> tuple[list[Part], list[UInt16], Float64, Float64]:
    """Parts, their flat records, decoded means by slice [slices, 3, n] and over all [3, n]."""
    found, records, by_slice = [], [], []
    for number, (name, samples) in enumerate(SAMPLES.items()):
        decoded = []
        for part in range(parts):
            books, codes = segment_of(name, PARAMETER, part)
            found.append(Part(number, samples, books))
            records.append(codes.reshape(-1))
            decoded.append(np.stack([books[s][unpack(codes.reshape(-1))[s]] for s in range(3)]))
        by_slice.append(np.mean(decoded, axis=0))
    slices = np.stack(by_slice)
    weights = np.array(list(SAMPLES.values()), float)
    return found, records, slices, np.tensordot(weights / weights.sum(), slices, 1)


def scored(parts: list[Part], records: list[UInt16], tables: ScoreTables) -> tuple[UInt16, UInt8]:
    rows, affinity = np.empty(records[0].size, np.uint16), np.empty(records[0].size, np.uint8)
    score_records(
        np.stack(records),
        tables.shares,
        tables.slices,
        tables.codes,
        tables.score,
        tables.bias,
        rows,
        affinity,
    )
    return rows, affinity


@pytest.mark.parametrize("parts", [1, 3])
def test_merged_codes_are_the_nearest_and_have_equal_mass(parts: int) -> None:
    found, records, _, means = world(parts)
    tables = fit_tables(found, records, BALANCED, 3)
    rows, _ = scored(found, records, tables)
    for s, code in enumerate(unpack(rows)[:3]):
        book = tables.codebooks[s]
        assert np.all(np.diff(book) > 0)
        off = np.abs(book[code] - means[s])
        best = np.abs(book[:, None] - means[s]).min(axis=0)
        assert np.all(off <= best + (means[s].max() - means[s].min()) / 1000)
        masses = np.bincount(code, minlength=16) / code.size
        assert masses.max() < 2.5 / 16


@pytest.mark.parametrize("exponents", [BALANCED, (1.0, -1.0, 1.0, 1.0), (0.2, 0.7, 0.0, 0.0)])
def test_what_the_records_say_is_a_code_of_equal_mass(exponents: tuple[float, float, float, float]) -> None:
    found, records, _, _ = world(1)
    tables = fit_tables(found, records, exponents, 3)
    rows, _ = scored(found, records, tables)
    *codes, score = unpack(rows)
    act, grad, freq = (tables.codebooks[s][code] for s, code in enumerate(codes))
    R = exponents[0] * act / 2 + exponents[1] * grad / 2 + exponents[2] * freq  # two levels to the octave
    order = np.argsort(R, kind="stable")
    assert np.all(np.diff(score[order].astype(int)) >= 0)
    assert np.abs(np.bincount(score, minlength=16) / score.size - 1 / 16).max() < 0.03


@pytest.mark.parametrize("parts", [1, 3])
def test_affinity_names_the_slice_that_stands_highest_and_by_how_much(parts: int) -> None:
    found, records, slices, _ = world(parts)
    tables = fit_tables(found, records, BALANCED, 3)
    _, affinity = scored(found, records, tables)
    R = np.tensordot(slices, worth_of_statistics(BALANCED), ([1], [0]))
    S = (R - R.mean(axis=1, keepdims=True)) / R.std(axis=1, keepdims=True)
    top = np.sort(S, axis=0)
    margin = top[-1] - top[:-1].mean(axis=0)
    clear = top[-1] - top[-2] > 0.01
    assert clear.mean() > 0.85
    assert np.array_equal(affinity[clear] >> 4, S.argmax(axis=0)[clear])
    expected = np.minimum(np.floor(4 * margin), 15)
    assert np.abs((affinity & 15) - expected).max() <= 1
    assert np.mean((affinity & 15) == expected) > 0.97


def test_one_slice_alone_has_no_selectivity() -> None:
    found, records, _, _ = world(2)
    tables = fit_tables(found[2:4], records[2:4], BALANCED, 3)
    _, affinity = scored(found[2:4], records[2:4], tables)
    assert np.all(affinity == 1 << 4)


def test_a_tensor_whose_weights_are_all_alike_is_scored() -> None:
    """A constant statistic has no deviation to divide by."""
    book = np.tile(np.arange(16.0), (3, 1))
    records = [np.full(500, 0x7770, np.uint16)] * 2
    tables = fit_tables([Part(0, 5, book), Part(1, 5, book)], records, BALANCED, 2)
    rows, affinity = scored([], records, tables)
    assert len(np.unique(rows)) == 1
    assert np.all(affinity == 0)  # no selectivity, and of slices that stand equally high the first
    assert np.allclose(tables.codebooks[0][rows[0] >> 12], 7, atol=0.01)
