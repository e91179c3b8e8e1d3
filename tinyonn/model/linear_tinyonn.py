"""The linear layer whose weight is a sum of sparse experts; saved beside exported models."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from .gates_tinyonn import Active, Pattern, Switch
from .matrix_tinyonn import DenseWeight, matrix_fault, on_gpu
from .sparse_tinyonn import (
    ExpertMatrix,
    Form,
    Merged,
    batched_linear,
    choose_path,
    costs,
    dense_of,
    gated_linear,
    gpu_costs,
    merge,
    sparse_linear,
)

KEPT_PATTERNS = 2  # or as many as a batch has
KEPT_DENSE = 4  # and no more bytes than so many dense weights
FEW_TOKENS = 64  # making a weight dense for one call costs more than these save


class Kept(NamedTuple):
    """What inference keeps of a pattern while its gates stay.

    Attributes
    ----------
    entries : int
        Weights that are on.
    form : Merged or tensor, optional
        The groups that are on in one compressed matrix, or the dense weight as the base's own layer holds it.
    """

    entries: int
    form: Merged | torch.Tensor | None

    @property
    def bytes(self) -> int:
        """That it takes."""
        if isinstance(self.form, torch.Tensor):
            return self.form.nbytes
        return 0 if self.form is None else self.form.bytes

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense weight."""
        return isinstance(self.form, torch.Tensor)


class ExpertLinear(nn.Linear):
    """Takes the place of ``nn.Linear`` or of ``Conv1D``, whose weight is transposed.

    Other programs, such as peft, find a linear layer in it: with ``in_features``, ``out_features``, a bias and, to be
    read, a weight.

    Attributes
    ----------
    weight : DenseWeight [out, in]
        Of all groups with gate 1.
    values : Parameter [entries]
    columns : uint16 [entries], int32 where there are more than 65,536 inputs
    row_pointer : int32 [groups * out + 1]
    bias : Parameter [out] or None
    name : str
        In the base.
    """

    values: nn.Parameter
    columns: torch.Tensor
    row_pointer: torch.Tensor
    _is_hf_initialized = True  # transformers draws no random weight

    def __init__(
        self,
        out_features: int,
        in_features: int,
        entries: int,
        groups: int,
        switch: Switch,
        bias: nn.Parameter | None = None,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # there is no dense weight to make
        self.out_features, self.in_features, self.groups = out_features, in_features, groups
        self.switch, self.transposed = switch, transposed
        self.values = nn.Parameter(torch.empty(entries, dtype=dtype))
        number = torch.uint16 if in_features <= 65536 else torch.int32
        self.register_buffer("columns", torch.empty(entries, dtype=number))
        self.register_buffer("row_pointer", torch.empty(groups * out_features + 1, dtype=torch.int32))
        self.bias = bias  # type: ignore[assignment]
        self.name = "a sparse layer"
        self._checked = False
        self._kept: dict[bytes, Kept] = {}
        self._stamp: tuple[Any, ...] = ()

    def reset_parameters(self) -> None:
        """Zeros, all of them in the core, until weights are loaded."""
        entries, out = self.values.numel(), self.out_features
        with torch.no_grad():
            self.values.zero_()
            if self.bias is not None:
                self.bias.zero_()
        row_starts, columns = _places(entries, out, self.values.device)
        self.columns = columns.to(self.columns.dtype)
        self.row_pointer = functional.pad(row_starts, ((self.groups - 1) * out, 0)).int()

    @property
    def weight(self) -> DenseWeight:  # type: ignore[override]
        """The dense weight, to be read; within a pass only if all groups are on for all of it."""
        return DenseWeight(self.matrix, self._all_on)

    def _all_on(self) -> bool:
        active = self.switch.now
        return active is None or bool((active.gates_RG == 1).all())

    @property
    def matrix(self) -> ExpertMatrix:
        """The compressed weight, as the kernels take it."""
        return ExpertMatrix(self.values, self.columns, self.row_pointer, self.out_features, self.in_features)

    def check(self) -> None:
        """Raise ValueError, naming the layer, if its entries do not lie in its matrix; once, and at the first pass.

        What loads a model in another way than ``from_pretrained`` may leave out buffers.
        """
        if self.values.is_meta or self.columns.is_meta or self.row_pointer.is_meta:
            return
        if fault := matrix_fault(self.matrix):
            raise ValueError(f"{self.name}: {fault}; the shard is damaged, fetch or assemble it again")
        if self._is_unread():
            raise ValueError(
                f"{self.name}: values were loaded but columns and row_pointer, its buffers, were not; load the model "
                "with from_pretrained(), or give accelerate offload_buffers=True"
            )
        self._checked = True

    def _is_unread(self) -> bool:
        """Whether values were loaded, but not where they belong: all lie where `reset_parameters` puts them."""
        experts, entries, out = self.groups - 1, self.values.numel(), self.out_features
        if not experts or not entries or entries == out * self.in_features or self.row_pointer[experts * out]:
            return False
        row_starts, columns = _places(entries, out, self.values.device)
        same = torch.equal(self.row_pointer[experts * out :].long(), row_starts)
        same = same and torch.equal(self.columns.int(), columns.int())
        return same and bool(self.values.detach().any())

    def forget(self) -> None:
        """Drop what is kept for inference."""
        self._kept.clear()

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """X [batch, tokens, in] -> [batch, tokens, out], with the gates of the pass that is run."""
        Y: torch.Tensor = self._uncompiled(X) if torch.compiler.is_compiling() else self._run(X)
        return Y

    @torch.compiler.disable
    def _uncompiled(self, X: torch.Tensor) -> torch.Tensor:
        return self._run(X)

    def _run(self, X: torch.Tensor) -> torch.Tensor:
        if not self._checked:
            self.check()
        active = self.switch.active(X.device)
        batch = not active.per_token and (not active.patterns or self._makes_dense(X, active.gates_RG))
        if batch:
            return self._batched(X, active)
        if active.uniform:
            return self._linear(X, active.patterns[0], active)
        X_R = X.flatten(0, 1) if active.per_token else X
        self._check_rows(X, len(X_R), len(active.gates_RG))
        Y_R = self._mixed(X_R, active) if not active.patterns else self._by_pattern(X_R, active)
        return Y_R.unflatten(0, X.shape[:2]) if active.per_token else Y_R

    def _check_rows(self, X: torch.Tensor, found: int, rows: int) -> None:
        if found != rows:
            raise ValueError(
                f"an input of shape {list(X.shape)} has not the {rows} rows that gates are for; "
                "run the whole model, or give gates of one dimension"
            )

    def _makes_dense(self, X: torch.Tensor, gates: torch.Tensor) -> bool:
        """Whether weights are made dense for the call: in training, and under autocast, which keeps none."""
        learned = X.requires_grad or self.values.requires_grad or gates.requires_grad
        if torch.is_grad_enabled() and learned:
            if self.switch.path == "sparse":
                raise ValueError(
                    "the sparse path has no gradients; run it under torch.no_grad(), or set_path('auto')"
                )
            return True
        return torch.is_autocast_enabled(X.device.type)

    def _batched(self, X: torch.Tensor, active: Active) -> torch.Tensor:
        gates_RG = active.patterns[0].gates_G[None] if active.uniform else active.gates_RG
        value_gates_RG = active.value_gates_RG
        rows = max(len(gates_RG), 1 if value_gates_RG is None else len(value_gates_RG))
        gates_RG = gates_RG.to(X.device).expand(rows, -1)
        if value_gates_RG is not None:
            value_gates_RG = value_gates_RG.to(X.device).expand(rows, -1)
        if rows == 1:  # whatever the shape of the input
            return batched_linear(X[None], self.matrix, gates_RG, self.bias, value_gates_RG)[0]
        self._check_rows(X, len(X), rows)
        return batched_linear(X, self.matrix, gates_RG, self.bias, value_gates_RG)

    def _by_pattern(self, X_R: torch.Tensor, active: Active) -> torch.Tensor:
        parts, order = [], []
        for pattern, rows in zip(active.patterns, active.rows, strict=True):
            rows = rows.to(X_R.device)
            parts.append(self._linear(X_R.index_select(0, rows), pattern, active))
            order.append(rows)
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())

    def _mixed(self, X_R: torch.Tensor, active: Active) -> torch.Tensor:
        """Sum over groups of gate times the group's own output: for more patterns than groups."""
        gates_RG = active.gates_RG.to(X_R.device)
        Y_R = X_R.new_zeros(*X_R.shape[:-1], self.out_features)
        for group in gates_RG.detach().any(0).nonzero().flatten().tolist():
            alone = torch.zeros(self.groups, device=X_R.device)
            alone[group] = 1
            gate_R = gates_RG[:, group].to(X_R.dtype).view(-1, *[1] * (X_R.dim() - 1))
            Y_R = Y_R + gate_R * gated_linear(X_R, self.matrix, alone)
        return Y_R if self.bias is None else Y_R + self.bias

    def _linear(self, X: torch.Tensor, pattern: Pattern, active: Active) -> torch.Tensor:
        gates_G = pattern.gates_G.to(X.device)
        if self._makes_dense(X, gates_G):
            return gated_linear(X, self.matrix, gates_G, self.bias)
        form = self._form(pattern, gates_G, X.numel() // self.in_features, active)
        if isinstance(form, Merged):
            return sparse_linear(X, form, self.bias)
        if not self.transposed or self.bias is None:
            return functional.linear(X, form.T if self.transposed else form, self.bias)
        Y = torch.addmm(self.bias, X.reshape(-1, self.in_features), form)  # as Conv1D does, to the bit
        return Y.view(*X.shape[:-1], self.out_features)

    def _form(
        self, pattern: Pattern, gates_G: torch.Tensor, tokens: int, active: Active
    ) -> Merged | torch.Tensor:
        key = pattern.key if pattern.key is not None else b""
        kept = self._recall(key)
        if kept is None:
            sizes_G = self.row_pointer[:: self.out_features].long().diff()
            kept = Kept(int(sizes_G[gates_G != 0].sum()), None)
        path: str = self.switch.path
        if path == "auto":
            shape, gpu = (self.out_features, self.in_features), on_gpu(self.values)
            path = choose_path(*shape, kept.entries, tokens, False, gpu)
            if path == "dense" and not active.uniform and tokens <= FEW_TOKENS:
                path = "decode"
        form = kept.form
        if form is not None and isinstance(form, Merged) != (path == "dense"):
            return form
        if path == "dense":
            form = dense_of(self.matrix, gates_G).detach()
            form = form.T.contiguous() if self.transposed else form
            if not active.uniform:  # a dense model for each pattern of a batch would not fit
                return form
        else:
            form = self._merged(gates_G, kept.entries) if path == "sparse" else merge(self.matrix, gates_G)
        if pattern.key is not None and (active.uniform or not active.once):
            self._keep(key, Kept(kept.entries, form), active)
        return form

    def _merged(self, gates_G: torch.Tensor, entries: int) -> Merged:
        """Compressed even where dense is quicker, if this machine has a kernel at all."""
        known = self._costs(entries)
        forms: list[Form] = ["rows", "masks"]
        for form in sorted(forms, key=lambda one: known[one]):
            with contextlib.suppress(ValueError):  # no kernel for it
                return merge(self.matrix, gates_G, form)
        return merge(self.matrix, gates_G)

    def _costs(self, entries: int) -> dict[str, float]:
        shape, itemsize = (self.out_features, self.in_features), self.values.itemsize
        if on_gpu(self.values):
            return gpu_costs(*shape, entries, itemsize)
        return costs(*shape, entries, 1, itemsize)

    def _recall(self, key: bytes) -> Kept | None:
        version = 0 if self.values.is_inference() else self.values._version
        stamp = (self.values.data_ptr(), version, self.values.dtype, self.columns.data_ptr())
        if stamp != self._stamp:
            self.forget()
            self._stamp = stamp
        return self._kept.get(key)

    def _keep(self, key: bytes, kept: Kept, active: Active) -> None:
        """Keep a form, in the place of older ones, but never at the cost of others of the same pass."""
        current = {pattern.key for pattern in active.patterns}
        self._kept.pop(key, None)
        limit = KEPT_DENSE * self.out_features * self.in_features * self.values.itemsize
        for old, other in [item for item in list(self._kept.items()) if item[0] not in current]:
            full = len(self._kept) >= max(KEPT_PATTERNS, len(current)) or self._bytes() + kept.bytes > limit
            if full or (kept.is_dense and other.is_dense):
                self._kept.pop(old, None)  # another thread may have been quicker
        if not self._kept or self._bytes() + kept.bytes <= limit:
            self._kept[key] = kept

    def _bytes(self) -> int:
        return sum(kept.bytes for kept in list(self._kept.values()))

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"entries={self.values.numel()}, groups={self.groups}, bias={self.bias is not None}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_stamp": ()}


def _places(entries: int, out: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row starts [out + 1] and columns [entries], int64, of entries dealt evenly to rows, from the left."""
    row_starts = torch.arange(out + 1, device=device) * entries // max(out, 1)
    places = torch.arange(entries, device=device)
    rows = torch.searchsorted(row_starts, places, right=True) - 1
    return row_starts, places - row_starts[rows]


def swap(base: nn.Module, layers: dict[str, dict[str, int]], groups: int, switch: Switch) -> None:
    """Put sparse layers in the place of the base's linear ones, in place.

    Parameters
    ----------
    base : module
    layers : dict
        Module name -> ``{"out", "in", "entries"}``.
    groups : int
    switch : Switch

    Raises
    ------
    ValueError
        No such layer, not a linear one, or of another shape.
    """
    for name, sizes in layers.items():
        parent_name, _, own = name.rpartition(".")
        try:
            parent = base.get_submodule(parent_name)
            layer = getattr(parent, own)
        except AttributeError:
            raise ValueError(
                f"sparse_layers names {name!r}, which {type(base).__name__} does not have; "
                "base_config and sparse_layers belong to different models"
            ) from None
        transposed = isinstance(layer, Conv1D)
        if not transposed and type(layer) is not nn.Linear:
            raise ValueError(
                f"sparse_layers names {name!r}, a {type(layer).__name__}; it must be a linear layer"
            )
        out, inputs = layer.weight.shape[::-1] if transposed else layer.weight.shape
        if (out, inputs) != (sizes["out"], sizes["in"]):
            raise ValueError(
                f"sparse_layers[{name!r}] is {sizes['out']} x {sizes['in']} but the base's layer is "
                f"{out} x {inputs}; base_config and sparse_layers belong to different models"
            )
        sparse = ExpertLinear(
            out, inputs, sizes["entries"], groups, switch, layer.bias, transposed, layer.weight.dtype
        )
        sparse.name = name
        setattr(parent, own, sparse)


class TinyONNExpert:
    """One expert of a model, or its core, for a look inside.

    Parameters
    ----------
    model : TinyONNForCausalLM
    number : int
        From 0; the core has the number k.
    """

    def __init__(self, model: Any, number: int) -> None:
        self.model, self.number = model, number

    @property
    def is_core(self) -> bool:
        """Whether this one is always on."""
        return self.number == int(self.model.config.experts)

    @property
    def sizes(self) -> dict[str, int]:
        """Weights in each layer."""
        return {name: self._range(layer)[1] for name, layer in self.model.sparse_layers.items()}

    @property
    def size(self) -> int:
        """Weights in all layers."""
        return sum(self.sizes.values())

    def entries(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows int64, columns int64 and values of its weights in a layer, sorted by row and column."""
        layer = self._layer(name)
        first, count = self._range(layer)
        start = self.number * layer.out_features
        lengths = layer.row_pointer[start : start + layer.out_features + 1].long().diff()
        rows = torch.arange(layer.out_features, device=lengths.device).repeat_interleave(lengths)
        part = slice(first, first + count)
        return rows, layer.columns[part].long(), layer.values.detach()[part]

    def dense(self, name: str) -> torch.Tensor:
        """What it adds to a layer's weight, [out, in]."""
        layer = self._layer(name)
        alone = torch.zeros(layer.groups, device=layer.values.device)
        alone[self.number] = 1
        return dense_of(layer.matrix, alone).detach()

    def _layer(self, name: str) -> ExpertLinear:
        layers: dict[str, ExpertLinear] = self.model.sparse_layers
        if name not in layers:
            raise ValueError(
                f"no sparse layer {name!r}; there are {len(layers)}, {next(iter(layers), None)} first"
            )
        return layers[name]

    def _range(self, layer: ExpertLinear) -> tuple[int, int]:
        start = self.number * layer.out_features
        first, last = layer.row_pointer[[start, start + layer.out_features]].tolist()
        return first, last - first

    def __repr__(self) -> str:
        kind = "core" if self.is_core else f"expert {self.number}"
        return f"<{kind} of {self.size} weights in {sum(map(bool, self.sizes.values()))} layers>"
