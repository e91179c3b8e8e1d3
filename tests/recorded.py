"""A small recorded run, without a model: structured records of a few layers in three slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinyonn.config import ScoreConfig
from tinyonn.dense.parameters import Parameter
from tinyonn.score.source import Float32, tensors_outside
from tinyonn.score.stage import ScoreReport, score_store
from tinyonn.store.arrays import BandWriter, SegmentWriter
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.records import (
    Float64,
    TensorCalibration,
    UInt16,
    codebook_of,
    dither_seed,
    positions,
    round_positions,
)
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import THREADS, EngineOptions

LAYERS = 3
SLICES = {"code": 40, "prose": 30, "sums": 20}


def parameters() -> tuple[Parameter, ...]:
    """Embedding, three layers of two matrices and a norm, head."""
    found = [Parameter("embed_tokens.weight", (60, 32), None, "embedding")]
    for layer in range(LAYERS):
        found += [
            Parameter(f"layers.{layer}.attn.q_proj.weight", (32, 32), layer, "linear"),
            Parameter(f"layers.{layer}.mlp.up_proj.weight", (80, 32), layer, "linear"),
            Parameter(f"layers.{layer}.norm.weight", (32,), layer, "norm"),
        ]
    return (*found, Parameter("lm_head.weight", (60, 32), None, "linear"))


def means_of(slice: str, parameter: Parameter, part: int = 0) -> Float64:
    """Mean act level, grad level and share of every weight on a slice, float64 [3, *shape]; a little else in each part.

    All slices share most of it; in each slice some rows of every matrix stand out.
    """
    shared = np.random.default_rng(dither_seed(0, "all", parameter.name))
    own = np.random.default_rng(dither_seed(1, slice, parameter.name))
    noise = np.random.default_rng(dither_seed(2, f"{slice}{part}", parameter.name))
    act = shared.normal(7, 2, parameter.shape)
    special = own.random(parameter.shape[0]) < 0.2
    act[special] += 2.5
    act += noise.normal(0, 0.1, parameter.shape)
    grad = 0.5 * act + shared.normal(4, 1.5, parameter.shape) + noise.normal(0, 0.2, parameter.shape)
    freq = 1 / (1 + np.exp(-(act - 7)))
    return np.stack([np.clip(act, 0, 15), np.clip(grad, 0, 15), freq])


def segment_of(slice: str, parameter: Parameter, part: int = 0) -> tuple[Float64, UInt16]:
    """Codebooks and dithered records of `means_of`."""
    means = means_of(slice, parameter, part)
    books = np.stack([codebook_of(*_counted(means[s].reshape(-1)), share=s == 2) for s in range(3)])
    placed = [positions(means[s].reshape(-1), books[s]) for s in range(3)]
    out = np.empty(placed[0].size, np.uint16)
    seed = np.uint64(dither_seed(3, f"{slice}{part}", parameter.name))
    round_positions(*placed, seed, np.uint64(0), out)
    return books, out.reshape(parameter.shape)


def _counted(values: Float64) -> tuple[Float64, Float64]:
    found, counts = np.unique(values, return_counts=True)
    return found, counts.astype(np.float64)


def calibration() -> dict[str, TensorCalibration]:
    """Of every tensor."""
    return {p.name: TensorCalibration(200 + i, 190, -3) for i, p in enumerate(parameters())}


def make_run(folder: Path, slices: dict[str, int] = SLICES, parts: int = 1) -> Path:
    """Write a run of so many segments to a slice, all of them committed; returns its folder."""
    store = make_store(folder, slices, parts)
    for name in slices:
        for part in range(len(store.manifest.leaves(name))):
            commit_part(store, name, part)
    return folder


def make_store(folder: Path, slices: dict[str, int] = SLICES, parts: int = 1) -> Store:
    """The same with nothing committed yet."""
    size = max(slices.values()) // parts
    manifest = Manifest({"weights": "m"}, {}, {}, dict(slices), size, parameters(), 5, max(parts, 3))
    store = Store.create(folder / "store", manifest)
    store.commit_calibration(calibration())
    return store


def commit_part(store: Store, slice: str, part: int) -> None:
    """Commit one leaf of a slice."""
    leaf = store.manifest.leaves(slice)[part]
    segment = Segment(leaf.slice, leaf.first, leaf.last, leaf.last - leaf.first)
    fork = store.begin(segment)
    writer = SegmentWriter(fork, segment.slice, segment.first, segment.last)
    for parameter in store.manifest.parameters:
        books, records = segment_of(slice, parameter, part)
        writer.write(parameter.name, parameter.shape, calibration()[parameter.name], books, [(0, records)])
    assert store.commit(fork, segment)


def write_labels(folder: Path | str, cells: int) -> None:
    """Commit a cell for every weight of the linear layers, drawn at random, as the clustering of a model would."""
    store = Store.open(Path(folder) / "store", read_only=False)
    (fork,) = store.begin_stage("cluster", 1)
    for parameter in store.manifest.parameters:
        labels = np.full(parameter.shape, 255, np.uint8)
        if parameter in tensors_outside(store.manifest.parameters):
            generator = np.random.default_rng(dither_seed(4, "labels", parameter.name))
            labels = generator.integers(0, cells, parameter.shape, np.uint8)
        BandWriter(fork, f"labels/{parameter.name}", parameter.shape, "uint8", {}).write(0, labels)
    described = {"config": {"cells": cells}, "scored": store.reader().stage("rows")}
    store.commit_stage("cluster", {"labels": {"described": described, "means": [], "cells": []}}, [fork])
    store.drop_stage("cluster")


def weights(name: str, first: int, last: int) -> Float32:
    """Rows of a tensor of the model that there is not."""
    shape = next(parameter.shape for parameter in parameters() if parameter.name == name)
    drawn = np.random.default_rng(dither_seed(5, "weights", name)).normal(0, 0.1, shape)
    return drawn.astype(np.float32)[first:last]


def score(
    folder: Path | str, config: ScoreConfig | None = None, options: EngineOptions = THREADS
) -> ScoreReport:
    """Score a run with these weights."""
    return score_store(str(folder), config or ScoreConfig(), (weights, frozenset()), options)
