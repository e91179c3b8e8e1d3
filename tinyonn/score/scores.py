"""Scores that decide which weights are kept, behind one interface; higher is kept.

Most are one family, S = a log2 rms + b log2 g + c share + d log2 |W|, of the rms of a weight's input, the size of its
gradient, the share of samples in which it was active, and its own size:

============== ============================================================================ ===============
name           score of weight (i, j)                                                       a, b, c, d
============== ============================================================================ ===============
``balanced``   |W| · rms^½ · g^¾: between ``wanda`` and ``wg``                              ½, ¾, 0, 1
``root``       |W| · √g: the geometric mean of ``magnitude`` and ``wg``                     0, ½, 0, 1
``wanda``      |W| · rms of input j (Sun et al. 2023, https://arxiv.org/abs/2306.11695)     1, 0, 0, 1
``wg``         |W · g|, the root of the Fisher estimate of the loss (Molchanov et al.
               2019, https://arxiv.org/abs/1906.10771)                                      0, 1, 0, 1
``magnitude``  |W|                                                                          0, 0, 0, 1
``source``     high activation, low gradient, high frequency: the first idea                1, −1, 1, 1
``a,b,c,d``    any other
``energy``     ``wanda`` over its root mean square in the tensor: what share of the
               layer's output energy goes through the weight
``gblm``       |W| · (rms / mean rms + g / mean g), gradient-blended Wanda (Das et al.
               2023, https://arxiv.org/abs/2311.04902), both factors scaled to the tensor
``random``     uniform, from a hash of tensor and index
============== ============================================================================ ===============

The rms of an input and g, the size of a gradient, are restored from INT4 codes. A mean level v with base b averages
``floor(2 log2 size) + 254 − b``, with two unequal steps to the octave, so for sizes spread evenly over octaves the mean
of ``2 log2 size`` is ``v + b − 254 + log2 3 − 1``: the geometric mean over samples. ``act`` = |W_ij| · rms_j, so every
weight of input j tells ``2 log2 rms_j = 2 log2 act − 2 log2 |W_ij|``, each with the error of a 4-bit code; their mean
over a thousand rows hardly has one. Everything up to the products is integer arithmetic, in steps of 1/512 octave, or
tables, so that a score has the same bits on every machine. Scores are products and not sums of logarithms: 2 to the
power of S, or of S / d, which order the weights of a tensor alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, prod
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from tinyonn.config import PRESETS
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.score.source import Band, Float32, Rows
from tinyonn.store.arrays import band_rows, bands, spread
from tinyonn.store.records import CODES, Float64, dither_bits, dither_seed

Exponents = tuple[float, float, float, float]
LEVEL_SHIFT = float(np.log2(3) - 1)
STEPS = 512  # of an octave, in integer logarithms
MANTISSA = 1024  # the ten upper bits of a mantissa, whose logarithm comes from a table
LOOKED_AT_ROWS = 1024  # at least, if there are so many
LOWEST_LEVEL, HIGHEST_LEVEL = 1.0, 14.0  # a mean level beyond was cut off in many samples
FEWEST = 4  # weights of an input within these, to take their mean

_LOG2 = np.round(STEPS * np.log2(1 + (np.arange(MANTISSA) + 0.5) / MANTISSA)).astype(np.int64)


@dataclass(frozen=True)
class Look:
    """What a look at some rows of a tensor tells.

    Attributes
    ----------
    rms : float32 [inputs]
        Geometric mean over samples of each input's rms; 0 for an input without any weight.
    root_mean_square : float32
        Of |W| · rms over the weights looked at.
    grad_counts : int64 [16]
        How many of them have each grad code.
    """

    rms: Float32
    root_mean_square: np.float32
    grad_counts: np.ndarray


def look_at(source: Rows, parameter: Parameter) -> Look:
    """Restore the inputs' sizes from evenly spread bands of rows (all rows, where these are the inputs)."""
    name, shape = parameter.name, parameter.shape
    by_row = name in source.transposed
    field = source.attributes(name)["fields"]["act"]
    book = np.array(field["codebook"], dtype=np.float64)
    logs = _integer_logs(book, field["base"])
    inside = (book >= LOWEST_LEVEL) & (book <= HIGHEST_LEVEL)
    inside[-1] = False  # the last entry stands for a long tail
    inputs = shape[0] if by_row else shape[1]
    sums = _Sums.of(inputs)
    spans = list(bands(shape))
    wanted = len(spans) if by_row else -(-LOOKED_AT_ROWS // band_rows(shape))
    for first, last in spread(spans, wanted):
        band = source.band(name, first, last, ("records", "weights"))
        assert band.records is not None and band.weights is not None
        _add(
            band.weights.view(np.int32),
            band.records,
            np.int64(first if by_row else -1),
            logs,
            inside,
            _LOG2,
            sums,
        )
    rms = sums.rms()
    energy = fsum((rms.astype(np.float64) ** 2 * sums.square).tolist())
    weights = int(sums.grad_counts.sum())
    return Look(rms, np.float32((energy / weights) ** 0.5 or 1.0), sums.grad_counts)


def gradient_sizes(attributes: Any) -> Float32:
    """Size of the gradient that each grad code stands for: float32 [16], geometric mean over samples of |∂L/∂W|."""
    field = attributes["fields"]["grad"]
    return exp2(_integer_logs(np.array(field["codebook"], dtype=np.float64), field["base"]))


def _integer_logs(book: Float64, base: int) -> np.ndarray:
    """Log2 of the size of mean levels, in integer steps: int64."""
    return np.asarray(np.round(STEPS / 2 * (book + (base - 254 + LEVEL_SHIFT))), dtype=np.int64)


def exp2(logs: np.ndarray) -> Float32:
    """2 to the power of integer logarithms: float32."""
    table = (
        np.round(np.exp2(np.arange(STEPS) / STEPS) * 2**20) / 2**20
    )  # the same whatever the C library's last bit
    return np.asarray(np.ldexp(table[logs % STEPS], (logs // STEPS).astype(np.int32)), dtype=np.float32)


class _Sums(NamedTuple):
    """Over the weights of each input that were looked at; logarithms as integers, all [inputs]."""

    total: np.ndarray  # of log2 rms, over the weights within the levels' range
    counted: np.ndarray  # of these
    lowest: np.ndarray  # log2 rms over all weights
    highest: np.ndarray
    codes: np.ndarray  # sum of 2 code - 15, below 0 where the levels are low
    square: np.ndarray
    grad_counts: np.ndarray  # [16]

    @classmethod
    def of(cls, inputs: int) -> _Sums:
        total, count, codes = (np.zeros(inputs, np.int64) for _ in range(3))
        lowest, highest = np.full(inputs, 1 << 40), np.full(inputs, -(1 << 40))
        return cls(total, count, lowest, highest, codes, np.zeros(inputs), np.zeros(CODES, np.int64))

    def rms(self) -> Float32:
        """Of an input whose levels were all cut off, the bound that comes nearest: the largest weight's level is
        the lowest at most, the smallest weight's the highest at least.
        """
        known = self.counted >= FEWEST
        bound = np.where(self.codes < 0, self.lowest, self.highest)
        logs = np.where(known, self.total // np.maximum(self.counted, 1), bound)
        return np.where(np.abs(logs) < 1 << 40, exp2(np.clip(logs, -120 * STEPS, 120 * STEPS)), np.float32(0))


@njit(nogil=True, cache=True)
def _add(
    bits: Any,
    records: Any,
    first: Any,
    logs: Any,
    inside: Any,
    table: Any,
    sums: Any,
) -> None:
    total, count, lowest, highest, codes, square, grad_counts = sums
    weights = bits.view(np.float32)
    for i in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            place = j if first < 0 else first + i
            record = records[i, j]
            code = record >> 12
            grad_counts[(record >> 8) & 15] += 1
            square[place] += np.float64(weights[i, j]) * np.float64(weights[i, j])
            positive = bits[i, j] & 0x7FFFFFFF
            exponent = positive >> 23
            if exponent == 0:  # zero, or too small to have any level
                continue
            size = np.int64(exponent - 127) * 512 + table[(positive >> 13) & 1023]
            rms = logs[code] - size
            codes[place] += 2 * np.int64(code) - 15
            lowest[place] = min(lowest[place], rms)
            highest[place] = max(highest[place], rms)
            if inside[code]:
                total[place] += rms
                count[place] += 1


TensorScore = Callable[[Band], Float32]


@dataclass(frozen=True)
class Score:
    """A way to score weights.

    Attributes
    ----------
    needs : frozenset of str
        What of a band the score reads.
    prepare : callable
        ``prepare(source, parameter)`` looks at the tensor once and gives a function of its bands, float32
        [rows, columns].
    """

    needs: frozenset[str]
    prepare: Callable[[Rows, Parameter], TensorScore]


def score_named(name: str) -> Score:
    """A score by its name.

    Raises
    ------
    InputError
        No such score.
    """
    if name in SCORES:
        return SCORES[name]
    exponents = exponents_of(name)
    if exponents is None:
        raise InputError(
            f"no score is called {name!r}; choose one of {', '.join(SCORES)}, or four numbers such as 0.5,0.75,0,1"
        )
    return family(*exponents)


def exponents_of(name: str) -> Exponents | None:
    """a, b, c and d of a score of the family; None for another, or none."""
    if name in PRESETS:
        return PRESETS[name]
    try:
        a, b, c, d = (float(part) for part in name.split(","))
    except ValueError:
        return None
    return (a, b, c, d) if all(map(isfinite, (a, b, c, d))) and any((a, b, c, d)) and d >= 0 else None


def name_of(exponents: Sequence[float]) -> str:
    """The name that `score_named` knows it by."""
    given = tuple(float(value) for value in exponents)
    known = next((name for name, its in PRESETS.items() if its == given), None)
    return known or ",".join(f"{value:g}" for value in given)


def _random(source: Rows, parameter: Parameter) -> TensorScore:
    seed = np.uint64(dither_seed(0, "random", parameter.name))
    width = prod(parameter.shape[1:])

    def score(band: Band) -> Float32:
        assert band.records is not None
        out = np.empty(band.records.shape, np.float32)
        _uniform(seed, np.uint64(band.first * width), out.reshape(-1))
        return out

    return score


def family(a: float, b: float, c: float, d: float, over_energy: bool = False) -> Score:
    """2 to the power of S; where d is neither 0 nor 1 of S / d."""
    if d:
        a, b, c = a / d, b / d, c / d

    def prepare(source: Rows, parameter: Parameter) -> TensorScore:
        by_row = parameter.name in source.transposed
        rms_I = np.ones(parameter.shape[0 if by_row else 1], np.float32)
        if a:
            look = look_at(source, parameter)
            rms_I = _power(look.rms, a)
            rms_I = rms_I * (np.float32(1.0) / look.root_mean_square) if over_energy else rms_I
        factors = np.ones((CODES, CODES), np.float32)
        if b:
            factors *= _power(gradient_sizes(source.attributes(parameter.name)), b)[:, None]
        if c:
            share = np.array(source.attributes(parameter.name)["fields"]["freq"]["codebook"], np.float64)
            factors *= exp2(np.round(STEPS * c * share).astype(np.int64))[None]
        return _by_input(_multiply if d else _multiply_alone, by_row, rms_I, factors.reshape(-1))

    if not (a or b or c):
        return Score(frozenset({"weights"}), lambda source, parameter: lambda band: np.abs(_weights(band)))
    return Score(frozenset({"records", "weights"}), prepare)


def _power(values: Float32, exponent: float) -> Float32:
    """A power, with the same bits on every machine: quarters up to 1 by square roots, others by integer logarithms."""
    half = np.sqrt(values)
    quarters = {0.25: np.sqrt(half), 0.5: half, 0.75: half * np.sqrt(half), 1: values}
    if exponent in quarters:
        return np.asarray(quarters[exponent], dtype=np.float32)
    some = values > 0
    logs = np.round(STEPS * np.log2(np.where(some, values, 1), dtype=np.float64))
    raised = exp2(np.clip(np.round(exponent * logs), -120 * STEPS, 120 * STEPS).astype(np.int64))
    return np.where(some, raised, np.float32(0))


def _gblm(source: Rows, parameter: Parameter) -> TensorScore:
    look = look_at(source, parameter)
    sizes = gradient_sizes(source.attributes(parameter.name))
    mean = (sizes.astype(np.float64) * look.grad_counts).sum() / look.grad_counts.sum()
    rms = look.rms / np.float32(fsum(look.rms.tolist()) / look.rms.size or 1.0)
    by_row = parameter.name in source.transposed
    return _by_input(_blend, by_row, rms, sizes * np.float32(1.0 / mean))


def _by_input(kernel: Any, by_row: bool, rms_I: Float32, sizes: Float32) -> TensorScore:
    """A kernel of |W|, its input's size and what its grad code stands for."""

    def score(band: Band) -> Float32:
        weights = _weights(band)
        assert band.records is not None
        out = np.empty(weights.shape, np.float32)
        own = rms_I[band.first : band.first + len(weights), None] if by_row else rms_I[None]
        kernel(weights, band.records, own, sizes, out)
        return out

    return score


def _weights(band: Band) -> Float32:
    assert band.weights is not None
    return band.weights


SCORES: dict[str, Score] = {
    **{name: family(*exponents) for name, exponents in PRESETS.items()},
    "energy": family(1, 0, 0, 1, over_energy=True),
    "gblm": Score(frozenset({"records", "weights"}), _gblm),
    "random": Score(frozenset({"records"}), _random),
}


@njit(nogil=True, cache=True)
def _multiply(W: Any, records: Any, rms: Any, factors: Any, out: Any) -> None:
    """With rms [1, columns] or [rows, 1], factors by grad and freq code."""
    across, down = int(rms.shape[1] > 1), int(rms.shape[0] > 1)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = abs(W[i, j]) * rms[i * down, j * across] * factors[(records[i, j] >> 4) & 255]


@njit(nogil=True, cache=True)
def _multiply_alone(W: Any, records: Any, rms: Any, factors: Any, out: Any) -> None:
    """The same without the weights."""
    across, down = int(rms.shape[1] > 1), int(rms.shape[0] > 1)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = rms[i * down, j * across] * factors[(records[i, j] >> 4) & 255]


@njit(nogil=True, cache=True)
def _blend(W: Any, records: Any, rms: Any, sizes: Any, out: Any) -> None:
    """With rms [1, columns] or [rows, 1]."""
    across, down = int(rms.shape[1] > 1), int(rms.shape[0] > 1)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = abs(W[i, j]) * (rms[i * down, j * across] + sizes[(records[i, j] >> 8) & 15])


@njit(nogil=True, cache=True)
def _uniform(seed: Any, first: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = np.float32(dither_bits(seed, first + np.uint64(i)) >> np.uint64(40))
