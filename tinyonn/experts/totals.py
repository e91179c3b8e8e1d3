"""What a selection keeps: with and without the trunk, by kind, by layer, by tensor and by expert."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.experts.options import Selection
from tinyonn.sheet import Sheet
from tinyonn.sizes import format_count


@dataclass(frozen=True)
class Kept:
    """Of a set of weights, how many are kept.

    Attributes
    ----------
    kept, weights : int
    core : int
        Of the kept.
    """

    kept: int
    weights: int
    core: int

    @property
    def share(self) -> float:
        """Kept of all."""
        return self.kept / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Totals:
    """Sums over a selection.

    Attributes
    ----------
    linear : Kept
        Weights outside the trunk, which are cut.
    trunk : int
        Weights that stay whole.
    kinds, layers, tensors : dict of str to Kept
        Of what is cut: by kind of module, by layer ("none" outside the layers), by name.
    experts : tuple of int
        Weights of every expert, the core last.
    empty : tuple of int
        Numbers of experts without a weight.
    """

    linear: Kept
    trunk: int
    kinds: dict[str, Kept]
    layers: dict[str, Kept]
    tensors: dict[str, Kept]
    experts: tuple[int, ...]
    empty: tuple[int, ...]

    @property
    def whole(self) -> Kept:
        """With the trunk, which is kept."""
        return Kept(self.linear.kept + self.trunk, self.linear.weights + self.trunk, self.linear.core)

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "whole": asdict(self.whole)}

    def table(self) -> Sheet:
        """For people."""
        title = (
            f"kept {format_count(self.linear.kept)} of {format_count(self.linear.weights)} weights outside the trunk; "
            f"with the trunk {format_count(self.whole.kept)} of {format_count(self.whole.weights)}"
        )
        sheet = Sheet(title, self._notes()).text("").number("weights", "kept", "share", "core")
        _section(sheet, [("outside the trunk", self.linear), ("with the trunk", self.whole)])
        _section(sheet, self.kinds.items())
        _section(sheet, [(f"layer {name}", kept) for name, kept in self.layers.items()])
        return sheet

    def _notes(self) -> list[str]:
        *experts, core = self.experts
        filled = sorted(size for size in experts if size)
        sizes = (
            f"{len(filled)} experts of {filled[0]:,} to {filled[-1]:,} weights, median {filled[len(filled) // 2]:,}"
            if filled
            else "no expert has a weight"
        )
        lines = [f"{sizes}; core {core:,}"]
        if self.empty:
            lines.append(f"warning: {len(self.empty)} experts are empty: {', '.join(map(str, self.empty))}")
        return lines


def totals(selection: Selection, parameters: Collection[Parameter]) -> Totals:
    """Sum a selection up.

    Parameters
    ----------
    selection : Selection
    parameters : collection of Parameter
        All of the model.
    """
    cut = [parameter for parameter in parameters if parameter.name in selection.tensors]
    tensors = {}
    for parameter in cut:
        kept = selection.tensors[parameter.name].kept
        tensors[parameter.name] = Kept(int(kept.sum()), parameter.size, int(kept[-1]))
    return Totals(
        _sum(tensors.values()),
        sum(parameter.size for parameter in parameters) - sum(parameter.size for parameter in cut),
        _by(cut, tensors, [kind_of(parameter) for parameter in cut]),
        _by(cut, tensors, ["none" if parameter.layer is None else str(parameter.layer) for parameter in cut]),
        tensors,
        tuple(selection.group_sizes),
        tuple(selection.empty_experts),
    )


def _by(cut: list[Parameter], tensors: dict[str, Kept], keys: list[str]) -> dict[str, Kept]:
    return {
        key: _sum(tensors[parameter.name] for parameter, its in zip(cut, keys, strict=True) if its == key)
        for key in dict.fromkeys(keys)
    }


def _sum(parts: Iterable[Kept]) -> Kept:
    found = list(parts)
    return Kept(*(sum(getattr(part, field) for part in found) for field in ("kept", "weights", "core")))


def _section(sheet: Sheet, rows: Iterable[tuple[str, Kept]]) -> None:
    for name, kept in rows:
        sheet.add(name, f"{kept.weights:,}", f"{kept.kept:,}", f"{kept.share:.1%}", f"{kept.core:,}")
    sheet.section()
