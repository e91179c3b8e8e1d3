"""The models that are compared: which weights each method keeps, all with the same number in every tensor.

Methods that update what is kept are SparseGPT (Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774, Algorithm 1,
unstructured). For a layer with inputs X [tokens, in], ``H = Xᵀ X`` (plus a share of its mean diagonal) and ``U`` the
upper Cholesky factor of ``H⁻¹``:

- in every block of columns those weights stay whose error ``(w_ij / U_jj)²`` is largest;
- column by column ``e_i = (w_ij − ŵ_ij) / U_jj`` and ``w_i,j: −= e_i U_j,j:``, so that later weights take up the error.

With a mask given, only the second happens: any selection's kept weights, brought back towards the dense layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from tinyonn.checks import UPDATED
from tinyonn.config import EvaluateConfig
from tinyonn.corpus.file import Sample
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.experts.scores import SCORES
from tinyonn.experts.select import groups_of, select
from tinyonn.experts.selection import Selection, SelectOptions
from tinyonn.experts.source import DROPPED, Source

BLOCK = 128  # columns whose mask is chosen together
DAMPING = 0.01  # of H's mean diagonal


class Cuttable(Protocol):
    """A loaded model whose matrices can be read and replaced; see `tinyonn.evaluate.dense.DenseWeights`."""

    model: Any
    parameters: list[Parameter]

    def module(self, name: str) -> torch.nn.Module: ...  # noqa: D102
    def original(self, name: str) -> torch.Tensor: ...  # noqa: D102


class _StopForwardError(Exception):
    """Raised by a hook once a pass has shown all that is wanted."""


def prune(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    keep: int | torch.Tensor,
    block: int = BLOCK,
    damping: float = DAMPING,
) -> torch.Tensor:
    """Prune a matrix and update what stays.

    Parameters
    ----------
    weight_OI : Tensor [out, in]
    hessian_II : float32 [in, in]
        ``Xᵀ X``; its scale does not matter.
    keep : int or bool Tensor [out, in]
        How many weights to keep, the same share in every block of columns; or which.
    block : int
    damping : float

    Returns
    -------
    float32 [out, in]
        0 where a weight was left out.

    Raises
    ------
    InputError
        H has no Cholesky factor even with the damping: it is not finite, or not of the form ``Xᵀ X``.
    """
    W = weight_OI.float().clone()
    U = _factor(hessian_II, damping)
    outputs, inputs = W.shape
    given = keep.to(W.device) if isinstance(keep, torch.Tensor) else None
    done = kept = 0
    for first in range(0, inputs, block):
        last = min(first + block, inputs)
        part, factor = W[:, first:last], U[first:last, first:last]
        if given is None:
            assert isinstance(keep, int)
            done += outputs * (last - first)
            wanted = keep * done // (outputs * inputs) - kept
            kept += wanted
            mask = _largest(part / factor.diagonal(), wanted)
        else:
            mask = given[:, first:last]
        errors = torch.zeros_like(part)
        for j in range(last - first):
            left_out = torch.where(mask[:, j], 0.0, part[:, j])
            errors[:, j] = left_out / factor[j, j]
            part[:, j:] -= errors[:, j : j + 1] * factor[j, j:]
        part *= mask
        W[:, last:] -= errors @ U[first:last, last:]
    return W


def _factor(hessian_II: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the damped H's inverse; inputs that were never anything but 0 stand alone."""
    H = hessian_II.double()
    diagonal = H.diagonal()
    H = H + torch.diag(torch.where(diagonal > 0, damping * diagonal.mean(), 1.0))
    L, failed = torch.linalg.cholesky_ex(H)
    if bool(failed) or not bool(torch.isfinite(L).all()):
        raise InputError(
            f"the inputs' second moments ({hessian_II.shape[0]} inputs) have no Cholesky factor with a damping of "
            f"{damping:g}; the calibration samples give values that are not finite, or use a larger damping"
        )
    U: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)
    return U.float()


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """True for so many of the largest absolute values."""
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[values.abs().reshape(-1).topk(count).indices] = True
    return mask.view(values.shape)


def prune_model(
    dense: Cuttable,
    samples: Sequence[Sample],
    keep: Mapping[str, int | torch.Tensor],
    block: int = BLOCK,
    damping: float = DAMPING,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Prune a model in place, layer by layer, each on what the pruned layers before it give.

    Parameters
    ----------
    dense : DenseWeights
        Its matrices are changed; within ``dense.replaced({})`` they are restored at the end.
    samples : sequence of Sample
        For calibration: one forward pass of each per layer, up to that layer.
    keep : mapping
        By tensor: how many weights, or a mask of the tensor's own shape. Others stay as they are.

    Yields
    ------
    str, Tensor
        Name and the new matrix in the model's dtype and the tensor's own shape, once it is in the model.
    """
    layers: dict[int | None, list[str]] = {}
    for parameter in dense.parameters:
        if parameter.name in keep:
            layers.setdefault(parameter.layer, []).append(parameter.name)
    for names in layers.values():
        hessians = second_moments(dense, samples, names)
        for name in names:
            weight = dense.module(name).get_parameter("weight")
            across = not isinstance(dense.module(name), torch.nn.Linear)  # a Conv1D holds [in, out]
            wanted = keep[name]
            if across and isinstance(wanted, torch.Tensor):
                wanted = wanted.T
            pruned = prune(weight.T if across else weight, hessians.pop(name), wanted, block, damping)
            with torch.no_grad():
                weight.copy_(pruned.T if across else pruned)
            yield name, weight


@torch.no_grad()
def second_moments(
    dense: Cuttable, samples: Sequence[Sample], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """``Xᵀ X`` of some matrices' inputs, float32 [in, in] by name; a pass stops once it has met them all."""
    sums: dict[str, torch.Tensor] = {}
    met: set[str] = set()

    def hook_of(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            X_TI = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            if name in sums:
                sums[name].addmm_(X_TI.T, X_TI)
            else:
                sums[name] = X_TI.T @ X_TI
            met.add(name)
            if len(met) == len(names):
                raise _StopForwardError

        return hook

    hooks = [dense.module(name).register_forward_pre_hook(hook_of(name)) for name in names]
    device = next(dense.model.parameters()).device
    try:
        for sample in samples:
            met.clear()
            ids = torch.from_numpy(sample.input_ids.astype(np.int64)).to(device)[None]
            try:
                dense.model.base_model(input_ids=ids, use_cache=False)
            except _StopForwardError:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in names if name not in sums]
    if missing:
        raise InputError(
            f"{missing[0]} meets no input in {len(samples)} calibration samples; give some samples"
        )
    return sums


METHODS = EvaluateConfig().methods


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
        raise InputError(f"--methods has {method!r}, which is no method; there are {known}")
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
        raise InputError(f"{recipe.method} needs calibration samples; give 1 or more")
    counts: Mapping[str, int | torch.Tensor] = kept_by_tensor(selection)
    keep = counts if recipe.method == "sparsegpt" else dict(masks_of(selection, source))
    with dense.replaced({}):
        for _ in prune_model(dense, samples, keep):
            pass
        yield selection.budget
