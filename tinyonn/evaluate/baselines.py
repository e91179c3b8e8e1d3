"""The models that are compared: which weights each method keeps, and whether what stays is updated.

================= ==================================================================================================
name              what is kept
================= ==================================================================================================
``default``       the selection as it would be assembled, with its core
a score's name    of each tensor the best by a score that is rebuilt from INT4 records (`tinyonn.score.scores`)
``sparsegpt``     SparseGPT, in blocks of 128 columns, updated (`tinyonn.evaluate.layerwise`)
``wanda-float``   Wanda as published: the norms of float inputs, compared within each row, layer after layer
``root-float-N``  |W| · √g like ``root``, with g the mean over N recorded samples of |∂L/∂W| in float32
================= ==================================================================================================

Behind a name ``+update`` updates what is kept as SparseGPT does, and ``+uniform`` gives every tensor the same share;
without it all methods keep as many weights of a tensor as ``default``. So ``wanda-float+uniform``,
``sparsegpt+uniform`` and ``magnitude+uniform`` are what was published under these names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tinyonn.checks import FLOAT_ROOT, UNIFORM, UPDATED, WANDA_FLOAT, base_of, is_method
from tinyonn.config import EvaluateConfig
from tinyonn.corpus.file import Sample
from tinyonn.errors import InputError
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.gradients import float_gradients
from tinyonn.evaluate.layerwise import prune, prune_model, updated_wanda, wanda
from tinyonn.score.scores import SCORES
from tinyonn.score.source import DROPPED, Source, tensors_outside
from tinyonn.select.select import allocate, groups_of, select
from tinyonn.select.selection import Selection, SelectOptions

METHODS = EvaluateConfig().methods


@dataclass(frozen=True)
class Recipe:
    """A method at a budget.

    Attributes
    ----------
    method : str
        As in the table above.
    options : SelectOptions
        Of methods that choose weights themselves only the budget and the allocation count.
    """

    method: str
    options: SelectOptions

    @property
    def base(self) -> str:
        """The method without what stands behind it."""
        return base_of(self.method)

    @property
    def updates(self) -> bool:
        """Whether weights are updated."""
        return self.base == "sparsegpt" or UPDATED in self.method

    @property
    def differentiates(self) -> bool:
        """Whether weights are chosen by float gradients."""
        return self.base.startswith(FLOAT_ROOT)

    def samples(self, calibration: int) -> int:
        """Recorded samples that it takes, of so many for those that leave it open."""
        if self.differentiates:
            return max(int(self.base.removeprefix(FLOAT_ROOT)), calibration if self.updates else 0)
        return calibration if self.updates or self.base == WANDA_FLOAT else 0


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
    if not is_method(method):
        known = ", ".join(dict.fromkeys([*METHODS, *SCORES]))
        raise InputError(
            f"--methods has {method!r}, which is no method; there are {known}, {WANDA_FLOAT} and {FLOAT_ROOT}N, and "
            f"{UPDATED} and {UNIFORM} behind them"
        )
    options = replace(selection, budget=budget)
    if UNIFORM in method:
        options = replace(options, allocation="uniform", shares={})
    elif shares:
        options = replace(options, allocation="given", shares=dict(shares))
    base = base_of(method)
    if base == "default":
        return Recipe(method, options)
    return Recipe(method, replace(options, core=0.0, score=base if base in SCORES else "magnitude"))


def masks_of(selection: Selection, source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and mask, bool of the tensor's own shape, of every tensor that is cut: True is kept."""
    for name in selection.tensors:
        yield name, torch.from_numpy(groups_of(selection, source, name) != DROPPED)


def kept_by_tensor(selection: Selection) -> dict[str, int]:
    """Weights kept in every tensor."""
    return {name: int(cuts.kept.sum()) for name, cuts in selection.tensors.items()}


@contextmanager
def cut(
    dense: DenseWeights,
    recipe: Recipe,
    source: Source,
    counts: Mapping[str, int],
    samples: Sequence[Sample],
    scratch: Path,
) -> Iterator[int]:
    """The model as a recipe leaves it, in place; whole again afterwards. Gives how many weights are kept.

    Parameters
    ----------
    dense : DenseWeights
    recipe : Recipe
    source : Source
        Of the run's statistics and the model's weights.
    counts : mapping of str to int
        Weights that every tensor keeps, from `counts_of`.
    samples : sequence of Sample
        As many as `Recipe.samples` says.
    scratch : Path
        Folder for the gradients of ``root-float-N``, 4 bytes a weight, which stay there for further budgets.

    Raises
    ------
    InputError
        As `select`; or samples are needed and there are too few.
    """
    needed = recipe.samples(1)
    if len(samples) < needed:
        raise InputError(
            f"{recipe.method} needs calibration samples, {needed} or more, and {len(samples)} are recorded or asked for"
        )
    if recipe.base in ("sparsegpt", WANDA_FLOAT):
        how = prune if recipe.base == "sparsegpt" else updated_wanda if recipe.updates else wanda
        with dense.replaced({}):
            for _ in prune_model(dense, samples, counts, how):
                pass
            yield sum(counts.values())
        return
    if recipe.differentiates:
        masks = float_masks(dense, recipe, counts, samples, scratch)
    else:
        kept_T = np.array(list(counts.values()))
        masks = masks_of(select(source, recipe.options, kept_T=kept_T), source)
    kept = sum(counts.values())
    if not recipe.updates:
        with dense.masked(masks):
            yield kept
        return
    with dense.replaced({}):
        for _ in prune_model(dense, samples, dict(masks)):
            pass
        yield kept


def counts_of(source: Source, options: SelectOptions) -> dict[str, int]:
    """Weights that every tensor keeps, in model order; the same for all methods with the same allocation."""
    tensors = tensors_outside(source.parameters)
    counts = allocate(source, tensors, options, [options.weights_of(source)])[0]
    return {parameter.name: int(count) for parameter, count in zip(tensors, counts, strict=True)}


def float_masks(
    dense: DenseWeights, recipe: Recipe, counts: Mapping[str, int], samples: Sequence[Sample], scratch: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and mask of every tensor by |W| · √g, g from float gradients of the first samples."""
    number = int(recipe.base.removeprefix(FLOAT_ROOT))
    sizes = float_gradients(dense, samples[:number], list(counts), scratch / f"gradients-{number}")
    for name, count in counts.items():
        score = dense.original(name).float().abs().cpu() * torch.from_numpy(sizes(name)).sqrt()
        mask = torch.zeros(score.numel(), dtype=torch.bool)
        mask[score.reshape(-1).topk(count).indices] = True
        yield name, mask.view(score.shape)
