"""What a selection keeps, and what `tinyonn assemble` shows of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.select.selection import Selection
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_count, format_seconds, format_size


@dataclass(frozen=True)
class AssembleReport:
    """What a call of `assemble_run` did.

    Attributes
    ----------
    budget, linear, trunk : int
        Weights kept, weights that could be, and weights that stay whole.
    sizes : list of int
        Of the experts, the core last.
    kinds : dict of str to (int, int)
        Kept and all weights by kind of module.
    empty : list of int
        Experts without a weight.
    bytes, planned_bytes : int
        Of the matrices on disk, and what the format's arithmetic gives.
    planned_rss_bytes : int
        RAM that was said to be needed.
    """

    location: str
    folder: str
    assembly: str
    budget: int
    linear: int
    trunk: int
    sizes: list[int]
    kinds: dict[str, tuple[int, int]]
    empty: list[int]
    bytes: int
    planned_bytes: int
    files: int
    workers: int
    select_seconds: float
    write_seconds: float
    fresh: bool
    planned_rss_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> Sheet:
        """For people."""
        core, experts = self.sizes[-1], np.array(self.sizes[:-1])
        every, kept = self.linear + self.trunk, self.budget + self.trunk
        sizes = f"{experts.min():,} to {experts.max():,}, median {int(np.median(experts)):,}"
        lines = [
            f"{self.budget:,} of {self.linear:,} linear weights kept ({self.budget / self.linear:.1%})",
            f"with the trunk {kept:,} of {every:,} ({kept / every:.1%})",
            f"core {core:,}; {experts.size} experts of {sizes}",
            f"matrices {format_size(self.bytes)} on disk, {format_size(self.planned_bytes)} by arithmetic",
        ]
        if self.empty:
            lines.append(f"warning: experts {', '.join(map(str, self.empty))} are empty")
        if not self.fresh:
            lines.append("nothing to do: assembled already")
        else:
            lines.append(
                f"selected in {format_seconds(self.select_seconds)}, written in {format_seconds(self.write_seconds)}"
            )
        sheet = (
            Sheet(f"assembled {whole(self.folder)}", lines).text("kind").number("weights", "kept", "share")
        )
        for kind, (kept, every) in self.kinds.items():
            sheet.add(kind, f"{every:,}", f"{kept:,}", f"{kept / every:.1%}")
        return sheet


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
