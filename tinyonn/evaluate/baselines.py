"""The models that are compared: which weights each method keeps, all with the same number in every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from tinyonn.corpus.file import Sample
from tinyonn.errors import InputError
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.sparsegpt import prune_model
from tinyonn.experts.scores import SCORES
from tinyonn.experts.select import groups_of, select
from tinyonn.experts.selection import Selection, SelectOptions
from tinyonn.experts.source import DROPPED, Source

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
