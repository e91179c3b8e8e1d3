"""Scores that decide which weights are kept, behind one interface; higher is kept.

============== ============================================================================ ===================
name           score of weight (i, j)                                                       needs
============== ============================================================================ ===================
``S``          w_a z(act) − w_g z(grad) + w_f z(freq), with the weights the run was scored  records
               with (tuned ones, if it was tuned)
``seed``       the same with equal weights: high activation, low gradient, high frequency   records
``activation`` the same of act alone                                                        records
``magnitude``  |W|                                                                          weights
``wanda``      |W| · rms of input j (Sun et al. 2023, https://arxiv.org/abs/2306.11695)     records, weights
``energy``     ``wanda`` over its root mean square in the tensor: what share of the
               layer's output energy goes through the weight                                records, weights
``wg``         |W · g|, the root of the Fisher estimate of the loss (Molchanov et al.
               2019, https://arxiv.org/abs/1906.10771)                                      records, weights
``root``       |W| · √g: the geometric mean of ``magnitude`` and ``wg``                     records, weights
``balanced``   |W| · rms^½ · g^¾: between ``wanda`` and ``wg``                              records, weights
``gblm``       |W| · (rms / mean rms + g / mean g), gradient-blended Wanda (Das et al.
               2023, https://arxiv.org/abs/2311.04902), both factors scaled to the tensor   records, weights
``random``     uniform, from a hash of tensor and index                               nothing
============== ============================================================================ ===================

The rms of an input and g, the size of a gradient, are restored from INT4 codes. A mean level v with base b averages
``floor(2 log2 size) + 254 − b``, with two unequal steps to the octave, so for sizes spread evenly over octaves the mean
of ``2 log2 size`` is ``v + b − 254 + log2 3 − 1``: the geometric mean over samples. ``act`` = |W_ij| · rms_j, so every
weight of input j tells ``2 log2 rms_j = 2 log2 act − 2 log2 |W_ij|``, each with the error of a 4-bit code; their mean
over a thousand rows hardly has one. Everything up to the products is integer arithmetic, in steps of 1/512 octave, or
tables, so that a score has the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import fsum, prod
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from tinyonn.config import ACTIVATION_WEIGHTS, SEED_WEIGHTS
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.experts.source import Band, Float32, Source
from tinyonn.score.stage import spread
from tinyonn.score.tables import TRIPLES, ScoreWeights
from tinyonn.store.arrays import band_rows, bands
from tinyonn.store.records import CODES, STATISTICS, Float64, dither_bits, dither_seed

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


def look_at(source: Source, parameter: Parameter) -> Look:
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
    prepare: Callable[[Source, Parameter], TensorScore]


def score_named(name: str) -> Score:
    """A score by its name.

    Raises
    ------
    InputError
        No such score.
    """
    if name not in SCORES:
        raise InputError(f"no score is called {name!r}; choose one of {', '.join(SCORES)}")
    return SCORES[name]


def score_table(attributes: Any, weights: tuple[float, float, float] | None = None) -> Float32:
    """S of every 12-bit code of a tensor, float32 [4096]; by default with the weights that the run was scored with."""
    field = attributes["fields"]["score"]
    signed = field["weight"] if weights is None else ScoreWeights(*weights).signed
    index = np.arange(TRIPLES)
    total = np.zeros(TRIPLES)
    for s, book in enumerate(_codebooks(attributes)):
        # Element by element: a matrix product may add in another order on another machine.
        z = (book - field["mean"][s]) / field["deviation"][s]
        total = total + signed[s] * z[index >> (8 - 4 * s) & 15]
    return total.astype(np.float32)


def _codebooks(attributes: Any) -> Float64:
    return np.array([attributes["fields"][name]["codebook"] for name in STATISTICS], dtype=np.float64)


def _of_table(weights: tuple[float, float, float] | None = None) -> Score:
    def prepare(source: Source, parameter: Parameter) -> TensorScore:
        table = score_table(source.attributes(parameter.name), weights)

        def score(band: Band) -> Float32:
            assert band.records is not None
            out = np.empty(band.records.shape, np.float32)
            _look_up(band.records, table, out)
            return out

        return score

    return Score(frozenset({"records"}), prepare)


def _magnitude(source: Source, parameter: Parameter) -> TensorScore:
    return lambda band: np.abs(_weights(band))


def _random(source: Source, parameter: Parameter) -> TensorScore:
    seed = np.uint64(dither_seed(0, "random", parameter.name))
    width = prod(parameter.shape[1:])

    def score(band: Band) -> Float32:
        assert band.records is not None
        out = np.empty(band.records.shape, np.float32)
        _uniform(seed, np.uint64(band.first * width), out.reshape(-1))
        return out

    return score


def _product(of_input: float = 0, of_gradient: float = 0, over_energy: bool = False) -> Score:
    """|W| times powers, in quarters, of the rms of its input and of its gradient."""

    def prepare(source: Source, parameter: Parameter) -> TensorScore:
        by_row = parameter.name in source.transposed
        rms_I = np.ones(parameter.shape[0 if by_row else 1], np.float32)
        if of_input:
            look = look_at(source, parameter)
            rms_I = _power(look.rms, of_input)
            rms_I = rms_I * (np.float32(1.0) / look.root_mean_square) if over_energy else rms_I
        sizes = np.ones(CODES, np.float32)
        if of_gradient:
            sizes = _power(gradient_sizes(source.attributes(parameter.name)), of_gradient)
        return _by_input(_multiply, by_row, rms_I, sizes)

    return Score(frozenset({"records", "weights"}), prepare)


def _power(values: Float32, exponent: float) -> Float32:
    """A power in quarters up to 1, by square roots: their bits are the same on every machine."""
    half = np.sqrt(values)
    return {0.25: np.sqrt(half), 0.5: half, 0.75: half * np.sqrt(half), 1: values}[exponent]


def _gblm(source: Source, parameter: Parameter) -> TensorScore:
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
    "S": _of_table(),
    "seed": _of_table(SEED_WEIGHTS),
    "activation": _of_table(ACTIVATION_WEIGHTS),
    "magnitude": Score(frozenset({"weights"}), _magnitude),
    "wanda": _product(of_input=1),
    "energy": _product(of_input=1, over_energy=True),
    "wg": _product(of_gradient=1),
    "root": _product(of_gradient=0.5),
    "balanced": _product(of_input=0.5, of_gradient=0.75),
    "gblm": Score(frozenset({"records", "weights"}), _gblm),
    "random": Score(frozenset({"records"}), _random),
}


@njit(nogil=True, cache=True)
def _look_up(records: Any, table: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = table[records[i, j] >> 4]


@njit(nogil=True, cache=True)
def _multiply(W: Any, records: Any, rms: Any, sizes: Any, out: Any) -> None:
    """With rms [1, columns] or [rows, 1]."""
    across, down = int(rms.shape[1] > 1), int(rms.shape[0] > 1)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = abs(W[i, j]) * rms[i * down, j * across] * sizes[(records[i, j] >> 8) & 15]


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
