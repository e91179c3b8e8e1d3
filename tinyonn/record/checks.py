"""What was not finite in a sample, asked once at its end: on a GPU every question before would wait for the device."""

from __future__ import annotations

import torch

from tinyonn.record.levels import FINITE_HALF_OCTAVES

BLOCK = 1024  # slots
NOT_FINITE = 511  # half octave of a NaN


class Checks:
    """An int32 slot for each thing that may be not finite, for the largest half octave (``bits >> 22``) seen of it.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[torch.Tensor] = []
        self._names: list[str] = []

    def slot(self, name: str) -> torch.Tensor:
        """A new slot, int32 [1], holding 0; kernels and `raise_top` raise it."""
        block, place = divmod(len(self._names), BLOCK)
        if block == len(self._blocks):
            self._blocks.append(torch.zeros(BLOCK, dtype=torch.int32, device=self._device))
        self._names.append(name)
        return self._blocks[block][place : place + 1]

    def add(self, name: str, finite: bool | torch.Tensor) -> None:
        """Note whether something was finite; a tensor stays where it is."""
        if isinstance(finite, torch.Tensor):
            raise_top(self.slot(name), (~finite).int() * NOT_FINITE)
        else:
            raise_top(self.slot(name), NOT_FINITE * (not finite))

    def first(self) -> str | None:
        """Name of the first slot that holds a value that is not finite. Waits for the device."""
        used = (len(self._names) + BLOCK - 1) // BLOCK
        tops = torch.cat(self._blocks[:used]).cpu()[: len(self._names)] if used else torch.zeros(0)
        wrong = (tops >= FINITE_HALF_OCTAVES).nonzero()
        return self._names[int(wrong[0])] if len(wrong) else None

    def clear(self) -> None:
        """Begin a new sample."""
        for block in self._blocks:
            block.zero_()
        self._names.clear()


def raise_top(top: torch.Tensor, seen: int | torch.Tensor) -> None:
    """Raise a slot, int32 [1], to a half octave."""
    if isinstance(seen, torch.Tensor):
        torch.maximum(top, seen.reshape(1).to(torch.int32), out=top)
    elif seen:
        top.clamp_(min=seen)
