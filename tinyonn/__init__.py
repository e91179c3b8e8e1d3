"""Tiny-ONN: take a dense language model apart while it works, weight by weight.

Shape suffixes of tensor names: ``T`` tokens of a sample, ``I`` inputs of a linear layer, ``O`` its outputs,
``V`` vocabulary, ``B`` histogram bins. ``X_TI`` is a layer's input, ``G_TO`` the gradient of its output,
``W_OI`` its weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyonn.run import Run, open_run
    from tinyonn.store.records import pack, unpack

__all__ = ["Run", "open_run", "pack", "unpack"]

_HOMES = {
    "Run": "tinyonn.run",
    "open_run": "tinyonn.run",
    "pack": "tinyonn.store.records",
    "unpack": "tinyonn.store.records",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import tinyonn` and the command line's help are quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
