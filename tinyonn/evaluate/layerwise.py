"""Methods that prune layer by layer, each layer on what the pruned layers before it give, as they were published.

*SparseGPT* (Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774, Algorithm 1, unstructured). For a layer with
inputs X [tokens, in], ``H = Xᵀ X`` (plus a share of its mean diagonal) and ``U`` the upper Cholesky factor of ``H⁻¹``:

- in every block of columns those weights stay whose error ``(w_ij / U_jj)²`` is largest;
- column by column ``e_i = (w_ij − ŵ_ij) / U_jj`` and ``w_i,j: −= e_i U_j,j:``, so that later weights take up the error.

With a mask given, only the second happens: any selection's kept weights, brought back towards the dense layer's output.

*Wanda* (Sun et al. 2023, https://arxiv.org/abs/2306.11695, Algorithm 1): in every row those weights stay whose
``|w_ij| · ‖X_j‖₂`` is largest, as many in each row; nothing is updated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from tinyonn.corpus.file import Sample
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError

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


def wanda_mask(weight_OI: torch.Tensor, moments: torch.Tensor, keep: int) -> torch.Tensor:
    """Wanda's mask.

    Parameters
    ----------
    weight_OI : Tensor [out, in]
    moments : float32 [in] or [in, in]
        ``Σ_t X_tj²``, or ``Xᵀ X`` with these on its diagonal; the scale does not matter.
    keep : int
        How many weights to keep, the same number in every row, or one more where they do not divide.

    Returns
    -------
    bool [out, in]
        True is kept.
    """
    squares_I = moments if moments.dim() == 1 else moments.diagonal()
    outputs, inputs = weight_OI.shape
    score_OI = weight_OI.float().abs() * squares_I.sqrt()
    ends = torch.arange(outputs + 1, device=score_OI.device) * keep // outputs
    order_OI = score_OI.argsort(dim=1, descending=True, stable=True)
    mask_OI = torch.zeros_like(score_OI, dtype=torch.bool)
    ranks_I = torch.arange(inputs, device=score_OI.device)
    return mask_OI.scatter_(1, order_OI, ranks_I < ends.diff()[:, None])


def wanda(weight_OI: torch.Tensor, moments: torch.Tensor, keep: int) -> torch.Tensor:
    """A matrix with the weights of `wanda_mask` alone."""
    return weight_OI * wanda_mask(weight_OI, moments, keep)


def updated_wanda(weight_OI: torch.Tensor, hessian_II: torch.Tensor, keep: int) -> torch.Tensor:
    """The same, what stays updated as of SparseGPT."""
    return prune(weight_OI, hessian_II, wanda_mask(weight_OI, hessian_II, keep))


Keep = int | torch.Tensor
Prune = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]


def prune_model(
    dense: Cuttable,
    samples: Sequence[Sample],
    keep: Mapping[str, Keep],
    how: Prune = prune,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Prune a model in place, layer by layer, each on what the pruned layers before it give.

    Parameters
    ----------
    dense : DenseWeights
        Its matrices are changed; within ``dense.replaced({})`` they are restored at the end.
    samples : sequence of Sample
        For calibration: every layer runs twice on each, and the outputs of one layer are held.
    keep : mapping
        By tensor: how many weights, or (of `prune`) a mask of the tensor's own shape. Others stay as they are.
    how : callable
        `prune`, `wanda` or `updated_wanda`.

    Yields
    ------
    str, Tensor
        Name and the new matrix in the model's dtype and the tensor's own shape, once it is in the model.
    """
    layers: dict[int | None, list[str]] = {}
    for parameter in dense.parameters:
        if parameter.name in keep:
            layers.setdefault(parameter.layer, []).append(parameter.name)
    passes = Passes(dense, samples)
    for names in layers.values():
        moments = second_moments(dense, samples, names, how is wanda, passes)
        for name in names:
            weight = dense.module(name).get_parameter("weight")
            across = not isinstance(dense.module(name), torch.nn.Linear)  # a Conv1D holds [in, out]
            wanted = keep[name]
            if across and isinstance(wanted, torch.Tensor):
                wanted = wanted.T
            pruned = how(weight.T if across else weight, moments.pop(name), wanted)
            with torch.no_grad():
                weight.copy_(pruned.T if across else pruned)
            yield name, weight
        passes.go_on(names[0])


class Passes:
    """Passes of samples from layer to layer: what the last layer that is done gave is held and not computed again.

    Parameters
    ----------
    dense : Cuttable
    samples : sequence of Sample
    """

    def __init__(self, dense: Cuttable, samples: Sequence[Sample]) -> None:
        self._dense, self._samples = dense, samples
        self._done: list[torch.nn.Module] = []
        self._outputs: list[Any] = []

    @torch.no_grad()
    def run(self) -> Iterator[None]:
        """Pass after pass, each up to where a hook stops it."""
        device = next(self._dense.model.parameters()).device
        for number, sample in enumerate(self._samples):
            ids = torch.from_numpy(sample.input_ids.astype(np.int64)).to(device)[None]
            with self._skipping(number):
                try:
                    self._dense.model.base_model(input_ids=ids, use_cache=False)
                except _StopForwardError:
                    pass
            yield

    def go_on(self, name: str) -> None:
        """The layer of this tensor is done: hold what it gives now."""
        parts = name.split(".")
        number = next(place for place, part in enumerate(parts) if part.isdigit())
        layer = self._dense.model.get_submodule(".".join(parts[: number + 1]))
        outputs: list[Any] = []

        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            outputs.append(output)
            raise _StopForwardError

        handle = layer.register_forward_hook(hook)
        try:
            for _ in self.run():
                pass
        finally:
            handle.remove()
        self._done.append(layer)
        self._outputs = outputs

    @contextmanager
    def _skipping(self, number: int) -> Iterator[None]:
        """Layers that are done give what was held."""
        own = [layer.__dict__ for layer in self._done]
        before = [attributes.get("forward") for attributes in own]
        try:
            for attributes in own:
                attributes["forward"] = partial(_given, self._outputs[number])
            yield
        finally:
            for attributes, forward in zip(own, before, strict=True):
                attributes.pop("forward")
                if forward is not None:
                    attributes["forward"] = forward


def _given(output: Any, *arguments: Any, **options: Any) -> Any:
    return output


@torch.no_grad()
def second_moments(
    dense: Cuttable,
    samples: Sequence[Sample],
    names: Sequence[str],
    diagonal: bool = False,
    passes: Passes | None = None,
) -> dict[str, torch.Tensor]:
    """``Xᵀ X`` of some matrices' inputs by name, float32 [in, in], or [in], its diagonal alone; a pass stops once it
    has met them all.
    """
    sums: dict[str, torch.Tensor] = {}
    met: set[str] = set()

    def hook_of(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            X_TI = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            if diagonal:
                squares_I = X_TI.square().sum(0)
                sums[name] = sums[name] + squares_I if name in sums else squares_I
            elif name in sums:
                sums[name].addmm_(X_TI.T, X_TI)
            else:
                sums[name] = X_TI.T @ X_TI
            met.add(name)
            if len(met) == len(names):
                raise _StopForwardError

        return hook

    hooks = [dense.module(name).register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        for _ in (passes or Passes(dense, samples)).run():
            met.clear()
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in names if name not in sums]
    if missing:
        raise InputError(
            f"{missing[0]} meets no input in {len(samples)} calibration samples; give some samples"
        )
    return sums
