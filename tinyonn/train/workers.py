"""What several workers do together; with one, or without ``torch.distributed``, nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Workers:
    """The process group that this process belongs to.

    Attributes
    ----------
    rank, world : int
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def found(cls) -> Workers:
        """The initialised process group, or this process alone."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum each tensor over all workers, in place."""
        if self.world > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def agree(self, value: int, device: torch.device) -> bool:
        """Whether all have the same number."""
        if self.world == 1:
            return True
        ends = torch.tensor([value, -value], device=device)
        distributed.all_reduce(ends, distributed.ReduceOp.MAX)
        return int(ends[0]) == -int(ends[1])

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            distributed.barrier()
