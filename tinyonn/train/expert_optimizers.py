"""Optimizers of the values of sparse layers, of which a step may touch some groups and must not touch the others.

A group is updated if its gradient has any entry that is not 0. All others keep their values, moments and counts of
steps bit for bit: no decay, no old momentum. So an expert that was masked or unused goes on later where it was left.
Values are sorted by group, so a group is one stretch of the vector and everything here is slices.

Muon's update is the nearest orthogonal matrix, roughly, by Newton-Schulz iterations in bfloat16

    X <- a X + (b A + c A^2) X,   A = X X^T,   a, b, c = 3.4445, -4.7750, 2.0315

from X = M / |M|. Singular values end between about 0.7 and 1.2. Source: Jordan et al. 2024, Muon. Torch's own
function is used where there is one, so that this is the same, to the bit, as its `torch.optim.Muon`.

Shape suffixes: G groups (experts and, last, the core).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tinyonn.model.linear_tinyonn import ExpertLinear

Named = tuple[str, ExpertLinear]


class ValuesOptimizer(Optimizer):
    """Steps of sparse layers one after another; a subclass updates one.

    Parameters
    ----------
    layers : iterable of (name, ExpertLinear)
        On their device already.
    defaults : dict
        Hyperparameters.
    """

    def __init__(self, layers: Iterable[Named], defaults: dict[str, Any]) -> None:
        known = list(layers)
        self._layers = {layer.values: layer for _, layer in known}
        self._sizes = {
            layer.values: group_sizes(layer.row_pointer, layer.out_features, layer.groups)
            for _, layer in known
        }
        super().__init__([(f"{name}.values", layer.values) for name, layer in known], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every layer that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None:
                    self._update(values, values.grad, self._sizes[values], group)
        return loss

    def _update(
        self, values: nn.Parameter, grad: torch.Tensor, sizes: list[int], group: dict[str, Any]
    ) -> None:
        raise NotImplementedError


def expert_layers(model: nn.Module) -> Iterator[tuple[str, ExpertLinear]]:
    """Every sparse layer of a model, each once, and its name."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            yield name, module


def group_sizes(row_pointer: torch.Tensor, out: int, groups: int) -> list[int]:
    """Entries of each group."""
    if row_pointer.numel() != groups * out + 1:
        raise ValueError(
            f"a row pointer of {row_pointer.numel()} numbers does not fit {groups} groups of {out} rows; it "
            f"has {groups * out + 1}"
        )
    return [int(size) for size in row_pointer[::out].long().diff().tolist()]


def touched(grad: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Which groups have a gradient at all: any entry that is not 0.

    An expert that is masked, or that no sample used, has none, and its values, its momentum and its count of steps
    stay as they are: neither decay nor an old momentum moves what had nothing to learn from.
    """
    lengths = torch.tensor(list(sizes), device=grad.device)
    seen = torch.segment_reduce((grad != 0).float(), "max", lengths=lengths, initial=0.0)
    return seen > 0


def group_of_entries(sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """The group of every entry, int32 [entries], without waiting for the device."""
    numbers = torch.arange(len(sizes), dtype=torch.int32, device=device)
    return numbers.repeat_interleave(torch.tensor(sizes, device=device), output_size=sum(sizes))


@dataclass(frozen=True)
class Run:
    """Neighbouring groups that are updated together.

    Attributes
    ----------
    groups : list of int
    sizes : list of int
        Entries of each of them.
    entries : slice
    """

    groups: list[int]
    sizes: list[int]
    entries: slice


def runs(live: Sequence[bool], sizes: Sequence[int]) -> list[Run]:
    """Stretches of neighbouring groups that are live, so that few large slices are worked on."""
    found: list[Run] = []
    place = 0
    for group, (alive, size) in enumerate(zip(live, sizes, strict=True)):
        start, place = place, place + size
        if not alive or not size:
            continue
        if found and found[-1].entries.stop == start:
            last = found.pop()
            start = last.entries.start
            found.append(Run([*last.groups, group], [*last.sizes, size], slice(start, place)))
        else:
            found.append(Run([group], [size], slice(start, place)))
    return found


class SparseAdamW(ValuesOptimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) that counts the steps of every group of values apart.

    Parameters
    ----------
    layers : iterable of (name, ExpertLinear)
    lr, weight_decay, eps : float
    betas : (float, float)
    """

    def __init__(
        self,
        layers: Iterable[Named],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(layers, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(
        self, values: nn.Parameter, grad: torch.Tensor, sizes: list[int], group: dict[str, Any]
    ) -> None:
        state = self.state[values]
        if not state:
            state["step"] = torch.zeros(len(sizes), dtype=torch.float32, device=values.device)
            state["exp_avg"] = torch.zeros_like(values)
            state["exp_avg_sq"] = torch.zeros_like(values)
        (update_together if values.is_cuda else update_runs)(values, grad, sizes, state, group)


def update_runs(
    values: torch.Tensor, grad: torch.Tensor, sizes: list[int], state: dict[str, Any], group: dict[str, Any]
) -> None:
    """A step of the groups that have a gradient, by slices: nothing else is read."""
    live = touched(grad, sizes).tolist()
    count_G = state["step"]
    count_G += torch.tensor(live, dtype=torch.float32)
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    for run in runs(live, sizes):
        w, g = values[run.entries], grad[run.entries].to(values.dtype)
        m, v = state["exp_avg"][run.entries], state["exp_avg_sq"][run.entries]
        w.mul_(1 - lr * group["weight_decay"])
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        count = count_G[run.groups].double()
        below = v.sqrt().div_(_by_entry((1 - beta2**count).sqrt(), run, v)).add_(group["eps"])
        w.sub_(m.div(below).mul_(_by_entry(lr / (1 - beta1**count), run, v)))


def update_together(
    values: torch.Tensor, grad: torch.Tensor, sizes: list[int], state: dict[str, Any], group: dict[str, Any]
) -> None:
    """The same step of all groups at once, for a GPU: launching run after run takes longer than their work.

    Nothing waits for the device. Holds 21 bytes an entry of the layer meanwhile.
    """
    live_G = touched(grad, sizes)
    count_G = state["step"] = state["step"].to(values.device).add_(live_G)
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    count = count_G.double()
    below_G = torch.where(live_G, (1 - beta2**count).sqrt(), 1).to(values.dtype)
    rate_G = torch.where(live_G, lr / (1 - beta1**count), 0).to(values.dtype)
    group_E = group_of_entries(sizes, values.device)
    live_E = live_G[group_E]
    w, m, v, g = values, state["exp_avg"], state["exp_avg_sq"], grad.to(values.dtype)
    torch.where(live_E, m.lerp(g, 1 - beta1), m, out=m)
    torch.where(live_E, v.mul(beta2).addcmul_(g, g, value=1 - beta2), v, out=v)
    step = m.div(v.sqrt().div_(below_G[group_E]).add_(group["eps"])).mul_(rate_G[group_E])
    torch.where(live_E, w.mul(1 - lr * group["weight_decay"]).sub_(step), w, out=w)


def _by_entry(factors: torch.Tensor, run: Run, like: torch.Tensor) -> torch.Tensor:
    """A factor of each group for each entry; one alone if all are the same."""
    known = factors.to(like)
    if bool((factors == factors[0]).all()):
        return known[:1]
    return known.repeat_interleave(torch.tensor(run.sizes, device=like.device), output_size=len(like))


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST = 1e-7


def orthogonalised(M_OI: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U V^T of M = U S V^T, roughly."""
    try:
        from torch.optim._muon import _zeropower_via_newtonschulz as of_torch
    except ImportError:
        return iterated(M_OI, steps)
    result: torch.Tensor = of_torch(M_OI, COEFFICIENTS, steps, SMALLEST)
    return result


def iterated(M_OI: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The same without Torch's function."""
    a, b, c = COEFFICIENTS
    tall = M_OI.shape[0] > M_OI.shape[1]
    X = (M_OI.T if tall else M_OI).bfloat16()
    X = X / X.norm().clamp(min=SMALLEST)
    for _ in range(steps):
        A = X @ X.T
        B = torch.addmm(A, A, A, beta=b, alpha=c)  # rounded to bfloat16 once, as Torch's is
        X = torch.addmm(X, B, X, beta=a)
    result: torch.Tensor = X.T if tall else X
    return result


class SparseMuon(ValuesOptimizer):
    """Muon for sparse matrices: the momentum of the entries, as a dense matrix, orthogonalised and read at the entries.

        B <- momentum B + (1 - momentum) G,   U = NS(G + momentum (B - G)) at the entries that are updated, 0 elsewhere
        W <- (1 - lr * weight_decay) W - lr * 0.2 sqrt(max(out, in) * n / (out * in)) U

    for the n entries that are updated. Muon: Jordan et al. 2024; 0.2 sqrt(max(out, in)), by which AdamW's learning
    rates can be used: Liu et al. 2025, Muon is Scalable, section 2.2. Orthogonalising spreads a fixed norm over the
    entries, so the fewer are updated the larger each update were; sqrt(n / (out * in)) holds its rms at about 0.2 lr.
    With every entry kept it is `torch.optim.Muon` with ``adjust_lr_fn="match_rms_adamw"``.

    Parameters
    ----------
    layers : iterable of (name, ExpertLinear)
    lr, momentum, weight_decay : float
    nesterov : bool
    ns_steps : int
    """

    def __init__(
        self,
        layers: Iterable[Named],
        lr: float = 1e-4,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
        }
        super().__init__(layers, defaults)

    def _update(
        self, values: nn.Parameter, grad: torch.Tensor, sizes: list[int], group: dict[str, Any]
    ) -> None:
        state = self.state[values]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(values)
        if values.is_cuda:
            self.update_together(values, grad, sizes, group)
        else:
            self.update_runs(values, grad, sizes, group)

    def update_runs(
        self, values: nn.Parameter, grad: torch.Tensor, sizes: list[int], group: dict[str, Any]
    ) -> None:
        """A step of the groups that have a gradient, by slices."""
        layer, momenta = self._layers[values], self.state[values]["momentum_buffer"]
        parts = [run.entries for run in runs(touched(grad, sizes).tolist(), sizes)]
        if not parts:
            return
        lr, momentum = float(group["lr"]), group["momentum"]
        places = _places(layer)
        dense = values.new_zeros(layer.out_features * layer.in_features)
        for part in parts:
            buffer, g = momenta[part], grad[part].to(values.dtype)
            buffer.lerp_(g, 1 - momentum)
            dense[places[part]] = g.lerp(buffer, momentum) if group["nesterov"] else buffer
        U_OI = orthogonalised(dense.view(layer.out_features, layer.in_features), group["ns_steps"])
        updated = sum(part.stop - part.start for part in parts)
        size = 0.2 * math.sqrt(updated / min(layer.out_features, layer.in_features))
        for part in parts:
            values[part].mul_(1 - lr * group["weight_decay"])
            values[part].add_(U_OI.reshape(-1)[places[part]].to(values.dtype), alpha=-lr * size)

    def update_together(
        self, values: nn.Parameter, grad: torch.Tensor, sizes: list[int], group: dict[str, Any]
    ) -> None:
        """The same step of all groups at once, for a GPU: see `update_together`."""
        layer, buffer = self._layers[values], self.state[values]["momentum_buffer"]
        lr, momentum = float(group["lr"]), group["momentum"]
        live_G = touched(grad, sizes)
        live_E = live_G[group_of_entries(sizes, values.device)]
        g = grad.to(values.dtype)
        torch.where(live_E, buffer.lerp(g, 1 - momentum), buffer, out=buffer)
        moved = torch.where(live_E, g.lerp(buffer, momentum) if group["nesterov"] else buffer, 0)
        places = _places(layer)
        dense = values.new_zeros(layer.out_features * layer.in_features).index_copy_(0, places, moved)
        U_OI = orthogonalised(dense.view(layer.out_features, layer.in_features), group["ns_steps"])
        updated = (live_G * torch.tensor(sizes, device=values.device)).sum()
        size = 0.2 * (updated / min(layer.out_features, layer.in_features)).sqrt()
        step = U_OI.reshape(-1)[places].to(values.dtype).mul_(lr * size)
        torch.where(live_E, values.mul(1 - lr * group["weight_decay"]).sub_(step), values, out=values)


def _places(layer: ExpertLinear) -> torch.Tensor:
    """Where every entry lies in the dense weight, row by row, int64 [entries]."""
    counts = layer.row_pointer.long().diff()
    rows = torch.arange(layer.out_features, device=counts.device).repeat(layer.groups)
    starts = rows.mul_(layer.in_features).repeat_interleave(counts, output_size=layer.values.numel())
    return starts.add_(layer.columns.to(torch.int64))
