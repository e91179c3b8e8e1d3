"""The models that are compared: which weights each method keeps, all with the same number in every tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tinyonn.corpus.file import Sample
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.sparsegpt import prune_model
from tinyonn.experts.scores import SCORES
from tinyonn.experts.select import groups_of, select
from tinyonn.experts.selection import Selection, SelectOptions
from tinyonn.experts.source import DROPPED, Band, RunSource, Source
from tinyonn.run import Run
from tinyonn.store.arrays import attributes_of
from tinyonn.store.records import CODES, SHIFTS, STATISTICS, UInt16

UPDATED = "+update"  # of a method's name: its mask, with SparseGPT's update of what is kept
METHODS = (
    "default", "S", "seed", "activation", "magnitude", "wanda", "wg", "gblm", "random", "sparsegpt", "default+update",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A method at a budget.

    Attributes
    ----------
    method : str
        ``default`` (the selection as it would be assembled), a score's name, ``sparsegpt``, or the first two with
        ``+update`` behind.
    options : SelectOptions
        For ``sparsegpt`` only the budget and the allocation count.
    """

    method: str
    options: SelectOptions

    @property
    def needs_samples(self) -> bool:
        """Whether weights are updated, from calibration samples."""
        return self.method == "sparsegpt" or self.method.endswith(UPDATED)


def recipe_of(method: str, selection: SelectOptions, budget: float, shares: Mapping[str, float]) -> Recipe:
    """What a method does under a budget.

    Parameters
    ----------
    method : str
    selection : SelectOptions
        The default; other methods share its allocation, trunk and seed, and have no core.
    budget : float
        As ``SelectOptions.budget``.
    shares : mapping of str to float
        If not empty, the allocation for this budget, in place of the selection's.

    Raises
    ------
    InputError
        No such method.
    """
    options = replace(selection, budget=budget)
    if shares:
        options = replace(options, allocation="given", shares=dict(shares))
    score = method.removesuffix(UPDATED)
    if score == "default":
        return Recipe(method, options)
    plain = replace(options, core=0.0)
    if method == "sparsegpt":
        return Recipe(method, replace(plain, score="magnitude"))
    if score not in SCORES:
        known = ", ".join(dict.fromkeys([*METHODS, *SCORES]))
        raise InputError(f"evaluate.methods has {method!r}, which is no method; there are {known}")
    return Recipe(method, replace(plain, score=score))


def masks_of(selection: Selection, source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and mask, bool of the tensor's own shape, of every tensor that is cut: True is kept."""
    for name in selection.tensors:
        yield name, torch.from_numpy(groups_of(selection, source, name) != DROPPED)


def kept_by_tensor(selection: Selection) -> dict[str, int]:
    """Weights kept in every tensor."""
    return {name: int(cuts.kept.sum()) for name, cuts in selection.tensors.items()}


@contextmanager
def cut(dense: DenseWeights, recipe: Recipe, source: Source, samples: Sequence[Sample]) -> Iterator[int]:
    """The model as a recipe leaves it, in place; whole again afterwards. Gives how many weights are kept.

    Parameters
    ----------
    dense : DenseWeights
    recipe : Recipe
    source : Source
        Of the run's statistics and the model's weights.
    samples : sequence of Sample
        For recipes that update weights; a forward pass of each per layer.

    Raises
    ------
    InputError
        As `select`; or samples are needed and there are none.
    """
    selection = select(source, recipe.options)
    if not recipe.needs_samples:
        with dense.masked(masks_of(selection, source)):
            yield selection.budget
        return
    if not samples:
        raise InputError(f"{recipe.method} needs calibration samples; set evaluate.calibration to 1 or more")
    counts: Mapping[str, int | torch.Tensor] = kept_by_tensor(selection)
    keep = counts if recipe.method == "sparsegpt" else dict(masks_of(selection, source))
    with dense.replaced({}):
        for _ in prune_model(dense, samples, keep):
            pass
        yield selection.budget


class SliceSource:
    """A run's statistics on one slice alone, for masks made of that slice.

    Parameters
    ----------
    run : Run
    source : RunSource
        Of all slices: the weights come from it.
    slice : str
    weights : (float, float, float)
        Of act, grad and freq in S.

    Notes
    -----
    One tensor's records are held at a time; there are no labels.
    """

    cells = 0
    slices = 1

    def __init__(self, run: Run, source: RunSource, slice: str, weights: tuple[float, float, float]) -> None:
        self._run, self._source, self._slice = run, source, slice
        self._weights = np.array([weights[0], -weights[1], weights[2]]) / np.abs(weights).sum()
        self._held: tuple[str, UInt16] = ("", np.empty(0, np.uint16))
        self._attributes: dict[str, Mapping[str, Any]] = {}
        self.parameters: tuple[Parameter, ...] = source.parameters
        self.trunk: tuple[str, ...] = ()
        self.transposed: Collection[str] = source.transposed
        self.identity = f"{source.identity} {slice}"

    def attributes(self, name: str) -> Mapping[str, Any]:
        """As of the run's rows, with the slice's codebooks, means and deviations."""
        if name not in self._attributes:
            books = self._run.codebooks(name, self._slice)
            tree = attributes_of(self._run.calibration[name], books)
            records = self._records(name)
            mean, deviation = [], []
            for book, statistic in zip(books, STATISTICS, strict=True):
                counts = np.bincount(((records >> SHIFTS[statistic]) & 15).reshape(-1), minlength=CODES)
                mean.append(float(book @ counts / counts.sum()))
                spread = float(np.sqrt(((book - mean[-1]) ** 2) @ counts / counts.sum()))
                deviation.append(spread if spread > 0 else 1.0)
            tree["fields"]["score"] = {"weight": self._weights.tolist(), "mean": mean, "deviation": deviation}
            self._attributes[name] = tree
        return self._attributes[name]

    def band(self, name: str, first: int, last: int, needs: Collection[str]) -> Band:
        """Rows [first, last)."""
        weights = self._source.band(name, first, last, ("weights",)).weights if "weights" in needs else None
        records = self._records(name)[first:last] if "records" in needs else None
        return Band(first, records, None, weights)

    def _records(self, name: str) -> UInt16:
        if self._held[0] != name:
            self._held = (name, self._run.records(name, self._slice))
        return self._held[1]
