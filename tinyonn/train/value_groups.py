"""Where the groups of a sparse layer's values lie, and which of them an update may touch.

Values are sorted by group, so a group is one stretch of the vector and everything here is slices: what is outside of
them is never written.

Shape suffixes: G groups (experts and, last, the core).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tinyonn.model.linear_tinyonn import ExpertLinear


def expert_layers(model: nn.Module) -> Iterator[tuple[str, ExpertLinear]]:
    """Every sparse layer of a model, each once, and its name."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            yield name, module


def group_sizes(row_pointer: torch.Tensor, out: int, groups: int) -> list[int]:
    """Entries of each group.

    Parameters
    ----------
    row_pointer : int32 [groups * out + 1]
    out, groups : int

    Returns
    -------
    list of int, [groups]

    Raises
    ------
    ValueError
        A pointer of other sizes.
    """
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

    Parameters
    ----------
    grad : float [entries]
    sizes : sequence of int, [G]

    Returns
    -------
    bool [G], on the gradient's device
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
    """Stretches of neighbouring groups that are live, so that few large slices are worked on.

    Parameters
    ----------
    live : sequence of bool, [G]
    sizes : sequence of int, [G]

    Returns
    -------
    list of Run
        In order; no group without entries is in one.
    """
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
