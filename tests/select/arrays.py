"""A source in memory: small tensors with many equal records, labels and weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyonn.dense.parameters import Parameter
from tinyonn.score.source import ArraySource

CELLS = 5
SHAPES = {"q_proj": (24, 16), "up_proj": (40, 16), "down_proj": (16, 40)}


def attributes(seed: int = 0) -> dict[str, Any]:
    """As of a tensor's rows."""
    rng = np.random.default_rng(seed)
    fields: dict[str, Any] = {}
    for name, top in (("act", 15.0), ("grad", 15.0), ("freq", 1.0)):
        fields[name] = {"codebook": np.sort(rng.uniform(0, top, 16)).tolist()}
    fields["act"]["base"], fields["grad"]["base"] = 240, 200
    return {"fields": fields}


def arrays(shape: tuple[int, int], seed: int, cells: int = CELLS) -> dict[str, np.ndarray]:
    """Records with few distinct codes, so that many weights tie."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (3, *shape)) & np.array([14, 12, 8])[:, None, None]
    return {
        "records": (codes[0] << 12 | codes[1] << 8 | codes[2] << 4).astype(np.uint16),
        "labels": rng.integers(0, cells, shape).astype(np.uint8),
        "weights": np.round(rng.normal(0, 1, shape), 1).astype(np.float32),
    }


def make_source(layers: int = 2, cells: int = CELLS, transposed: bool = False) -> ArraySource:
    """Layers of three matrices, an embedding, norms and a head."""
    parameters = [Parameter("embed.weight", (50, 16), None, "embedding")]
    for layer in range(layers):
        parameters += [Parameter(f"l.{layer}.{k}.weight", s, layer, "linear") for k, s in SHAPES.items()]
        parameters.append(Parameter(f"l.{layer}.norm.weight", (16,), layer, "norm"))
    parameters.append(Parameter("head.weight", (50, 16), None, "linear"))
    found = [p for p in parameters if p.kind == "linear"]
    return ArraySource(
        tuple(parameters),
        {p.name: arrays((p.shape[0], p.shape[1]), i) for i, p in enumerate(found)},
        {p.name: attributes(i) for i, p in enumerate(found)},
        cells=cells,
        slices=3,
        transposed=frozenset(p.name for p in found) if transposed else frozenset(),
    )
