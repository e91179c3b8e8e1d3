from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.select.arrays import arrays, attributes, make_source
from tinyonn.config import PRESETS, ScoreConfig
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.score.scores import (
    LEVEL_SHIFT,
    SCORES,
    exponents_of,
    gradient_sizes,
    look_at,
    name_of,
    score_named,
)
from tinyonn.score.source import ArraySource, Float32

NAME = "l.0.up_proj.weight"


def scored(source: ArraySource, score: str, name: str = NAME) -> Float32:
    parameter = next(p for p in source.parameters if p.name == name)
    chosen = score_named(score)
    band = source.band(name, 0, parameter.shape[0], chosen.needs)
    return chosen.prepare(source, parameter)(band)


@pytest.mark.parametrize("name", [*PRESETS, "0.3,1.2,-0.5,1", "1,0.5,0,2", "0.5,0.25,0,0"])
def test_a_score_is_two_to_the_power_of_s(name: str) -> None:
    source = make_source()
    parameter = next(p for p in source.parameters if p.name == NAME)
    exponents = exponents_of(name)
    assert exponents is not None
    a, b, c, d = (value / (exponents[3] or 1) for value in exponents)
    fields, its = source.attributes(NAME)["fields"], source.arrays[NAME]
    rms = look_at(source, parameter).rms.astype(np.float64)[None] if a else np.ones((1, 1))
    g = gradient_sizes(source.attributes(NAME)).astype(np.float64)[its["records"] >> 8 & 15]
    share = np.array(fields["freq"]["codebook"])[its["records"] >> 4 & 15]
    with np.errstate(divide="ignore"):
        raised = np.where(rms > 0, rms, 1) ** a * (rms > 0)
    wanted = np.abs(its["weights"].astype(np.float64)) ** d * raised * g**b * 2 ** (c * share)
    np.testing.assert_allclose(scored(source, name), wanted, rtol=5e-3)
    assert name_of(exponents) == name


def test_quarters_have_the_bits_of_square_roots() -> None:
    source = make_source()
    sizes = gradient_sizes(source.attributes(NAME))[source.arrays[NAME]["records"] >> 8 & 15]
    assert np.array_equal(scored(source, "root"), np.abs(source.arrays[NAME]["weights"]) * np.sqrt(sizes))


@pytest.mark.parametrize("name", ["nosuch", "1,2,3", "0,0,0,0", "1,nan,0,1", "1,0,0,-1", ""])
def test_what_is_no_score_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"no score is called .* four numbers such as 0\.5,0\.75,0,1"):
        score_named(name)


def recorded_as(weights: np.ndarray, rms: np.ndarray, base: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Records and attributes of a tensor whose act is |W| · rms in every sample."""
    levels = np.clip(2 * np.log2(np.maximum(np.abs(weights) * rms, 1e-30)) + 254 - base - LEVEL_SHIFT, 0, 15)
    book = np.maximum.accumulate(np.quantile(levels, (np.arange(16) + 0.5) / 16)) + np.arange(16) * 1e-9
    codes = np.abs(levels[..., None] - book).argmin(-1)
    found = attributes()
    found["fields"]["act"] = {"codebook": book.tolist(), "base": base}
    return (codes << 12).astype(np.uint16), found


@pytest.mark.parametrize("transposed", [False, True])
def test_an_inputs_rms_is_restored_from_its_weights_codes(transposed: bool) -> None:
    rng = np.random.default_rng(0)
    rms = np.exp2(rng.normal(-1, 0.8, 96))
    weights = rng.normal(0, 0.03, (1500, 96)).astype(np.float32)
    records, its = recorded_as(weights, rms, base=int(2 * np.log2(0.01) + 254 - 7))
    if transposed:
        weights, records = np.ascontiguousarray(weights.T), np.ascontiguousarray(records.T)
    parameter = Parameter("w", (weights.shape[0], weights.shape[1]), 0, "linear")
    source = ArraySource(
        (parameter,),
        {"w": {"records": records, "weights": weights}},
        {"w": its},
        transposed=frozenset({"w"} if transposed else ()),
    )
    restored = look_at(source, parameter).rms
    error = np.abs(np.log2(restored / rms))
    assert np.median(error) < 0.02
    assert error.max() < 0.1
    wanted = np.abs(weights) * (rms[:, None] if transposed else rms)
    np.testing.assert_allclose(scored(source, "wanda", "w"), wanted, rtol=0.08)
    energy = scored(source, "energy", "w")
    assert float((energy.astype(np.float64) ** 2).mean()) == pytest.approx(1, rel=1e-4)


def test_an_input_below_all_levels_gets_a_small_size_and_one_without_weights_none() -> None:
    rng = np.random.default_rng(0)
    rms = np.full(20, 0.5)
    rms[3] = 1e-6
    weights = rng.normal(0, 0.03, (400, 20)).astype(np.float32)
    weights[:, 5] = 0
    records, its = recorded_as(weights, rms, base=230)
    parameter = Parameter("w", (400, 20), 0, "linear")
    source = ArraySource((parameter,), {"w": {"records": records, "weights": weights}}, {"w": its})
    restored = look_at(source, parameter).rms
    assert restored[5] == 0
    assert restored[3] < 0.1 * restored[0]


def test_gradients_have_absolute_sizes() -> None:
    sizes = gradient_sizes(attributes())
    field = attributes()["fields"]["grad"]
    wanted = 2 ** ((np.array(field["codebook"]) + field["base"] - 254 + LEVEL_SHIFT) / 2)
    np.testing.assert_allclose(sizes, wanted, rtol=2e-3)


def test_weight_times_gradient_and_blended_wanda() -> None:
    source = make_source()
    size, weights = source.arrays[NAME], np.abs(source.arrays[NAME]["weights"])
    g = gradient_sizes(source.attributes(NAME))[size["records"] >> 8 & 15]
    np.testing.assert_allclose(scored(source, "wg"), weights * g, rtol=1e-6)
    np.testing.assert_array_equal(scored(source, "magnitude"), weights)
    look = look_at(source, next(p for p in source.parameters if p.name == NAME))
    wanted = weights * (look.rms / look.rms.mean() + g / g.mean())
    np.testing.assert_allclose(scored(source, "gblm"), wanted, rtol=1e-5)


def test_the_default_score_is_the_weight_times_powers_of_input_and_gradient() -> None:
    assert name_of(ScoreConfig().exponents) == "balanced"
    for transposed in (False, True):
        source = make_source(transposed=transposed)
        records, weights = source.arrays[NAME]["records"], np.abs(source.arrays[NAME]["weights"])
        g = gradient_sizes(source.attributes(NAME)).astype(np.float64)[records >> 8 & 15]
        np.testing.assert_allclose(scored(source, "root"), weights * g**0.5, rtol=1e-6)
        rms = look_at(source, next(p for p in source.parameters if p.name == NAME)).rms.astype(np.float64)
        wanted = weights * (rms[:, None] if transposed else rms) ** 0.5 * g**0.75
        np.testing.assert_allclose(scored(source, "balanced"), wanted, rtol=1e-6)


def test_random_scores_are_uniform_and_depend_on_the_tensor() -> None:
    shape = (300, 200)
    parameters = tuple(Parameter(name, shape, 0, "linear") for name in ("a", "b"))
    data = {p.name: arrays(shape, 0) for p in parameters}
    source = ArraySource(parameters, data, {p.name: attributes() for p in parameters})
    one, other = scored(source, "random", "a"), scored(source, "random", "b")
    assert one.std() == pytest.approx(one.max() / 12**0.5, rel=0.02)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    part = SCORES["random"].prepare(source, parameters[0])(source.band("a", 7, 20, {"records"}))
    np.testing.assert_array_equal(part, one[7:20])


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r"no score is called 'wander'.*wanda"):
        score_named("wander")
    source = make_source()
    bare = ArraySource(
        source.parameters, {NAME: {"records": source.arrays[NAME]["records"]}}, source.attribute
    )
    with pytest.raises(InputError, match=f"weights of {NAME}"):
        scored(bare, "magnitude")
