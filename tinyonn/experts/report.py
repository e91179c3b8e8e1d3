"""What `tinyonn assemble` shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinyonn.sheet import Sheet, whole
from tinyonn.sizes import format_seconds, format_size


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
