"""Which kernels a tensor takes: Numba's on the host, Triton's on a GPU, plain Torch on a GPU without Triton."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch

# Triton's interpreter plays the GPU: the same code on a CPU, slowly. A module's own name, so that a caller can turn it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def on_host(tensor: torch.Tensor) -> bool:
    """Whether the CPU's own kernels take it."""
    return not tensor.is_cuda and not INTERPRETED


def gpu_kernels(tensor: torch.Tensor) -> ModuleType | None:
    """`tinyonn.record.kernels_triton` if the tensor lies on a GPU and Triton is there."""
    return None if on_host(tensor) else _triton()


@cache
def _triton() -> ModuleType | None:
    try:
        from tinyonn.record import kernels_triton
    except ImportError:  # Triton is optional: plain Torch gives the same bits, more slowly
        return None
    return kernels_triton
