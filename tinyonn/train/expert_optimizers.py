"""Optimizers of the values of sparse layers, of which a step may touch some groups and must not touch the others.

A group is updated if its gradient has any entry that is not 0. All others keep their values, moments and counts of
steps bit for bit: no decay, no old momentum. So an expert that was masked or unused goes on later where it was left.
Values are sorted by group, so a group is one stretch of the vector: a CPU works on slices and reads nothing else.
On a GPU launching stretch after stretch takes longer than their work: it updates all at once, and waits for nothing.

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
    """Steps of sparse layers one after another; a subclass updates one, in either way.

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
        self._lengths_G = {
            layer.values: group_sizes(layer.row_pointer, layer.out_features, layer.groups)
            for _, layer in known
        }
        self._sizes = {values: lengths_G.tolist() for values, lengths_G in self._lengths_G.items()}
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
                    update = self.update_together if values.is_cuda else self.update_runs
                    update(values, values.grad, group)
        return loss

    def update_runs(self, values: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """Update the groups of a layer that have a gradient, run after run."""
        raise NotImplementedError

    def update_together(self, values: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """The same, all groups at once."""
        raise NotImplementedError


def expert_layers(model: nn.Module) -> Iterator[tuple[str, ExpertLinear]]:
    """Every sparse layer of a model, each once, and its name."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            yield name, module


def group_sizes(row_pointer: torch.Tensor, out: int, groups: int) -> torch.Tensor:
    """Entries of each group, int64 [G], where the row pointer lies."""
    if row_pointer.numel() != groups * out + 1:
        raise ValueError(
            f"a row pointer of {row_pointer.numel()} numbers does not fit {groups} groups of {out} rows; it "
            f"has {groups * out + 1}"
        )
    return row_pointer[::out].long().diff()


def touched(grad: torch.Tensor, lengths_G: torch.Tensor) -> torch.Tensor:
    """Which groups have a gradient at all: any entry that is not 0.

    An expert that is masked, or that no sample used, has none, and its values, its momentum and its count of steps
    stay as they are: neither decay nor an old momentum moves what had nothing to learn from.
    """
    # unsafe: the check of the lengths, which are right, would wait for a GPU
    return torch.segment_reduce((grad != 0).float(), "max", lengths=lengths_G, initial=0.0, unsafe=True) > 0


def group_of_entries(lengths_G: torch.Tensor, entries: int) -> torch.Tensor:
    """The group of every entry, int32 [entries]."""
    numbers = torch.arange(len(lengths_G), dtype=torch.int32, device=lengths_G.device)
    return numbers.repeat_interleave(lengths_G, output_size=entries)


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

    def _moments(self, values: nn.Parameter) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[values]
        if not state:
            groups = len(self._sizes[values])
            state["step"] = torch.zeros(groups, dtype=torch.float32, device=values.device)
            state["exp_avg"] = torch.zeros_like(values)
            state["exp_avg_sq"] = torch.zeros_like(values)
        return state

    def update_runs(self, values: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """See `ValuesOptimizer`."""
        state = self._moments(values)
        live = touched(grad, self._lengths_G[values]).tolist()
        count_G = state["step"]
        count_G += torch.tensor(live, dtype=torch.float32)
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        for run in runs(live, self._sizes[values]):
            w, g = values[run.entries], grad[run.entries].to(values.dtype)
            m, v = state["exp_avg"][run.entries], state["exp_avg_sq"][run.entries]
            w.mul_(1 - lr * group["weight_decay"])
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            count = count_G[run.groups].double()
            below = v.sqrt().div_(_by_entry((1 - beta2**count).sqrt(), run, v)).add_(group["eps"])
            w.sub_(m.div(below).mul_(_by_entry(lr / (1 - beta1**count), run, v)))

    def update_together(self, values: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """See `ValuesOptimizer`. Holds 21 bytes an entry of the layer meanwhile."""
        state, lengths_G = self._moments(values), self._lengths_G[values]
        live_G = touched(grad, lengths_G)
        count_G = state["step"] = state["step"].to(values.device).add_(live_G)
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        count = count_G.double()
        below_G = torch.where(live_G, (1 - beta2**count).sqrt(), 1).to(values.dtype)
        rate_G = torch.where(live_G, lr / (1 - beta1**count), 0).to(values.dtype)
        group_E = group_of_entries(lengths_G, len(values))
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

    def _momentum(self, values: nn.Parameter) -> torch.Tensor:
        state: dict[str, torch.Tensor] = self.state[values]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(values)
        return state["momentum_buffer"]

    def update_runs(self, values: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """See `ValuesOptimizer`."""
        layer, momenta = self._layers[values], self._momentum(values)
        live = touched(grad, self._lengths_G[values]).tolist()
        parts = [run.entries for run in runs(live, self._sizes[values])]
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

    def update_together(self, values: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """See `ValuesOptimizer`."""
        layer, buffer, lengths_G = self._layers[values], self._momentum(values), self._lengths_G[values]
        lr, momentum = float(group["lr"]), group["momentum"]
        live_G = touched(grad, lengths_G)
        live_E = live_G[group_of_entries(lengths_G, len(values))]
        g = grad.to(values.dtype)
        torch.where(live_E, buffer.lerp(g, 1 - momentum), buffer, out=buffer)
        moved = torch.where(live_E, g.lerp(buffer, momentum) if group["nesterov"] else buffer, 0)
        places = _places(layer)
        dense = values.new_zeros(layer.out_features * layer.in_features).index_copy_(0, places, moved)
        U_OI = orthogonalised(dense.view(layer.out_features, layer.in_features), group["ns_steps"])
        updated = (live_G * lengths_G).sum()
        size = 0.2 * (updated / min(layer.out_features, layer.in_features)).sqrt()
        step = U_OI.reshape(-1)[places].to(values.dtype).mul_(lr * size)
        torch.where(live_E, values.mul(1 - lr * group["weight_decay"]).sub_(step), values, out=values)


def _places(layer: ExpertLinear) -> torch.Tensor:
    """Where every entry lies in the dense weight, row by row, int64 [entries]."""
    counts = layer.row_pointer.long().diff()
    rows = torch.arange(layer.out_features, device=counts.device).repeat(layer.groups)
    starts = rows.mul_(layer.in_features).repeat_interleave(counts, output_size=layer.values.numel())
    return starts.add_(layer.columns.to(torch.int64))
