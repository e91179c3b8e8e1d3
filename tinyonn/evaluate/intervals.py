"""Intervals of held-out losses by bootstrap over documents, paired where two models meet.

A resample draws as many documents of every slice as there are, with replacement, and takes the mean over the slices of
their losses a token; the same draws for every model, so that the difference of two is that of the same documents. The
interval holds the middle 95 % of the resamples (percentiles). It says what other documents of these slices would have
given, and nothing of other recordings or other slices; a slice of one document adds nothing to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyonn.evaluate.loss import Losses
from tinyonn.store.records import Float64

RESAMPLES = 2000
SEED = 0
SHARE = 0.95


@dataclass(frozen=True)
class Interval:
    """What lies in the middle of the resamples, nats."""

    low: float
    high: float

    def tree(self) -> list[float]:
        """JSON values."""
        return [self.low, self.high]


def resampled(models: Sequence[Losses], resamples: int = RESAMPLES, seed: int = SEED) -> Float64 | None:
    """Mean losses of some models on resampled documents.

    Parameters
    ----------
    models : sequence of Losses
        Of the same documents.
    resamples, seed : int

    Returns
    -------
    float64 [models, resamples]
        None where the documents' losses are not known.
    """
    if not models or not all(model.documents for model in models):
        return None
    first = models[0].documents
    total = np.zeros((len(models), resamples))
    for number, name in enumerate(sorted(first)):
        tokens_D = np.array([tokens for _, tokens in first[name]], np.float64)
        nats_MD = np.array([[nats for nats, _ in model.documents[name]] for model in models])
        generator = np.random.default_rng([seed, number])
        drawn_RD = generator.multinomial(len(tokens_D), np.full(len(tokens_D), 1 / len(tokens_D)), resamples)
        with np.errstate(invalid="ignore"):  # a loss that is not finite makes its model's mean nan
            total += (nats_MD @ drawn_RD.T) / (drawn_RD @ tokens_D)
    return np.asarray(total / len(first))


def interval_of(values: Float64) -> Interval | None:
    """The middle of some resampled values; None if one of them is not finite."""
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - SHARE) / 2, (1 + SHARE) / 2]).tolist()
    return Interval(low, high)
