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
``gblm``       |W| · (rms / mean rms + α · g / mean g), gradient-blended Wanda (Das et al.
               2023, https://arxiv.org/abs/2311.04902), both factors scaled to the tensor   records, weights
``random``     uniform, from a hash of seed, tensor and index                               nothing
============== ============================================================================ ===================

The rms of an input and g, the size of a gradient, are restored from the records (`tinyonn.experts.absolute`).
Everything up to the products is integer arithmetic or tables, so that a score has the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import fsum, prod
from typing import Any

import numpy as np
from numba import njit

from tinyonn.config import ACTIVATION_WEIGHTS, SEED_WEIGHTS
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.experts.absolute import gradient_sizes, look_at
from tinyonn.experts.source import Band, Float32, Source
from tinyonn.score.tables import SELECTIVITY_STEPS, TRIPLES, ScoreWeights
from tinyonn.store.records import CODES, STATISTICS, Float64, dither_bits, dither_seed

TensorScore = Callable[[Band], Float32]


@dataclass(frozen=True)
class ScoreSettings:
    """What scores can be told.

    Attributes
    ----------
    weights : (float, float, float) or None
        Of act, grad and freq in ``S``, instead of those that the run was scored with; grad counts against.
    alpha : float
        Of the gradient in ``gblm``, beside an activation term whose mean is 1 as its own.
    seed : int
        Of ``random``.
    """

    weights: tuple[float, float, float] | None = None
    alpha: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """A way to score weights.

    Attributes
    ----------
    needs : frozenset of str
        What of a band the score reads.
    prepare : callable
        ``prepare(source, parameter, settings)`` looks at the tensor once and gives a function of its bands, float32
        [rows, columns].
    """

    needs: frozenset[str]
    prepare: Callable[[Source, Parameter, ScoreSettings], TensorScore]


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
    """S of every 12-bit code of a tensor: float32 [4096].

    Parameters
    ----------
    attributes : mapping
        Of the tensor's rows.
    weights : (float, float, float), optional
        Of act, grad (which counts against) and freq; by default those that the run was scored with.
    """
    field = attributes["fields"]["score"]
    signed = field["weight"] if weights is None else ScoreWeights(*weights).signed
    index = np.arange(TRIPLES)
    total = np.zeros(TRIPLES)
    for s, book in enumerate(_codebooks(attributes)):
        # Element by element: a matrix product may add in another order on another machine.
        z = (book - field["mean"][s]) / field["deviation"][s]
        total = total + signed[s] * z[index >> (8 - 4 * s) & 15]
    return total.astype(np.float32)


def core_ranks(attributes: Any) -> np.ndarray:
    """How high a weight stands in every slice: uint16 [65536] by ``12-bit code << 4 | selectivity``, higher is higher.

    The order of S − margin, the margin being the distance of the dominant slice from the mean of the others, which
    the selectivity counts. Equal values have equal ranks.
    """
    margin = np.arange(CODES, dtype=np.float32) / np.float32(SELECTIVITY_STEPS)
    S = score_table(attributes)[:, None] - margin[None, :]
    _, ranks = np.unique(S.reshape(-1), return_inverse=True)
    return np.asarray(ranks.reshape(-1), dtype=np.uint16)


def _codebooks(attributes: Any) -> Float64:
    return np.array([attributes["fields"][name]["codebook"] for name in STATISTICS], dtype=np.float64)


def _of_table(weights_of: Callable[[ScoreSettings], tuple[float, float, float] | None]) -> Score:
    def prepare(source: Source, parameter: Parameter, settings: ScoreSettings) -> TensorScore:
        table = score_table(source.attributes(parameter.name), weights_of(settings))

        def score(band: Band) -> Float32:
            assert band.records is not None
            out = np.empty(band.records.shape, np.float32)
            _look_up(band.records, table, out)
            return out

        return score

    return Score(frozenset({"records"}), prepare)


def _magnitude(source: Source, parameter: Parameter, settings: ScoreSettings) -> TensorScore:
    return lambda band: np.abs(_weights(band))


def _random(source: Source, parameter: Parameter, settings: ScoreSettings) -> TensorScore:
    seed = np.uint64(dither_seed(settings.seed, "random", parameter.name))
    width = prod(parameter.shape[1:])

    def score(band: Band) -> Float32:
        assert band.records is not None
        out = np.empty(band.records.shape, np.float32)
        _uniform(seed, np.uint64(band.first * width), out.reshape(-1))
        return out

    return score


def _wanda(source: Source, parameter: Parameter, settings: ScoreSettings) -> TensorScore:
    look = look_at(source, parameter)
    return _blended(source, parameter, look.rms, np.zeros(CODES, np.float32))


def _energy(source: Source, parameter: Parameter, settings: ScoreSettings) -> TensorScore:
    look = look_at(source, parameter)
    scale = np.float32(1.0) / look.root_mean_square
    return _blended(source, parameter, look.rms * scale, np.zeros(CODES, np.float32))


def _wg(source: Source, parameter: Parameter, settings: ScoreSettings) -> TensorScore:
    inputs = parameter.shape[0 if parameter.name in source.transposed else 1]
    sizes = gradient_sizes(source.attributes(parameter.name))
    return _blended(source, parameter, np.zeros(inputs, np.float32), sizes)


def _root(source: Source, parameter: Parameter, settings: ScoreSettings) -> TensorScore:
    inputs = parameter.shape[0 if parameter.name in source.transposed else 1]
    sizes = np.sqrt(gradient_sizes(source.attributes(parameter.name)))
    return _blended(source, parameter, np.zeros(inputs, np.float32), sizes)


def _gblm(source: Source, parameter: Parameter, settings: ScoreSettings) -> TensorScore:
    look = look_at(source, parameter)
    sizes = gradient_sizes(source.attributes(parameter.name))
    mean = (sizes.astype(np.float64) * look.grad_counts).sum() / look.grad_counts.sum()
    rms = look.rms / np.float32(fsum(look.rms.tolist()) / look.rms.size or 1.0)
    return _blended(source, parameter, rms, sizes * np.float32(settings.alpha / mean))


def _blended(source: Source, parameter: Parameter, rms_I: Float32, sizes: Float32) -> TensorScore:
    """|W| · (rms of the input + size of the gradient's code)."""
    by_row = parameter.name in source.transposed

    def score(band: Band) -> Float32:
        weights = _weights(band)
        assert band.records is not None
        out = np.empty(weights.shape, np.float32)
        if by_row:
            _blend_rows(weights, band.records, rms_I[band.first : band.first + weights.shape[0]], sizes, out)
        else:
            _blend_columns(weights, band.records, rms_I, sizes, out)
        return out

    return score


def _weights(band: Band) -> Float32:
    assert band.weights is not None
    return band.weights


SCORES: dict[str, Score] = {
    "S": _of_table(lambda settings: settings.weights),
    "seed": _of_table(lambda settings: SEED_WEIGHTS),
    "activation": _of_table(lambda settings: ACTIVATION_WEIGHTS),
    "magnitude": Score(frozenset({"weights"}), _magnitude),
    "wanda": Score(frozenset({"records", "weights"}), _wanda),
    "energy": Score(frozenset({"records", "weights"}), _energy),
    "wg": Score(frozenset({"records", "weights"}), _wg),
    "root": Score(frozenset({"records", "weights"}), _root),
    "gblm": Score(frozenset({"records", "weights"}), _gblm),
    "random": Score(frozenset({"records"}), _random),
}


@njit(nogil=True, cache=True)
def _look_up(records: Any, table: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = table[records[i, j] >> 4]


@njit(nogil=True, cache=True)
def _blend_columns(W: Any, records: Any, rms: Any, sizes: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = abs(W[i, j]) * (rms[j] + sizes[(records[i, j] >> 8) & 15])


@njit(nogil=True, cache=True)
def _blend_rows(W: Any, records: Any, rms: Any, sizes: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = abs(W[i, j]) * (rms[i] + sizes[(records[i, j] >> 8) & 15])


@njit(nogil=True, cache=True)
def _uniform(seed: Any, first: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = np.float32(dither_bits(seed, first + np.uint64(i)) >> np.uint64(40))
