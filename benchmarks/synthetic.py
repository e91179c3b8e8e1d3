"""A run of a large model's exact tensor shapes, with records drawn from a small run's own joint statistics.

Every weight of the large model is given the records of a random weight of the small run's tensor of the same kind at
the same relative depth, in all slices at once, so that the joint distribution of the statistics and of the slices is
the small run's. Codebooks and bases are taken over.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.run import Run, open_run
from tinyonn.store.arrays import SegmentWriter, bands
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.records import UInt16, dither_bits, dither_seed
from tinyonn.store.repository import Store

SAMPLES = 1024  # that each slice claims


def recorded(run: Path, **options: Any) -> Path:
    """The run, recorded and merged with the demo's configuration and these options of ``record`` if it is not there."""
    from tinyonn.cli import CONFIGS
    from tinyonn.config import load_config
    from tinyonn.record.driver import record
    from tinyonn.run import merge_run

    if not Store.exists(run / "store"):
        config = load_config(CONFIGS / "demo-full.yaml")
        changed = config.model_copy(update={"record": config.record.model_copy(update=options)})
        record(str(run), changed, progress=False)
        merge_run(str(run))
    return run


def synthesise(
    reference: Path, parameters: tuple[Parameter, ...], slices: int, location: Path, threads: int
) -> int:
    """Write a store; bytes of its records, uncompressed.

    Parameters
    ----------
    reference : Path
        A recorded and merged run of a small model with the same kinds of modules.
    parameters : tuple of Parameter
        Of the large model.
    slices : int
        How many of the small run's slices to take, evenly spread.
    location : Path
        Of the new store.
    threads : int
    """
    run = open_run(reference)
    live = {segment.slice: segment for segment in run.segments if segment.samples}
    if len(live) < slices or len(live) != len(run.segments):
        raise SystemExit(
            f"{reference}: needs at least {slices} slices, one segment each; run `tinyonn merge` first"
        )
    names = [list(live)[i * len(live) // slices] for i in range(slices)]
    twins = {parameter.name: _twin(parameter, parameters, run) for parameter in parameters}
    # No fingerprint of a model: any base of the same shape will do.
    manifest = Manifest({}, {}, {}, dict.fromkeys(names, SAMPLES), SAMPLES, parameters)
    store = Store.create(location, manifest)
    store.commit_calibration({name: run.calibration[twin.name] for name, twin in twins.items()})
    reader = run.store.reader()
    for name in names:
        started = time.perf_counter()
        segment = Segment(name, 0, SAMPLES, SAMPLES)
        fork = store.begin(segment)
        writer = SegmentWriter(fork, *name_and_range(segment))
        pool = {
            twin.name: np.asarray(reader.array(live[name], twin.name)).reshape(-1)
            for twin in set(twins.values())
        }

        def write(
            parameter: Parameter,
            writer: SegmentWriter = writer,
            pool: dict[str, UInt16] = pool,
            name: str = name,
        ) -> None:
            twin = twins[parameter.name]
            writer.write(
                parameter.name,
                parameter.shape,
                run.calibration[twin.name],
                reader.codebooks(live[name], twin.name),
                drawn_bands(parameter, pool[twin.name]),
            )

        with ThreadPoolExecutor(threads) as workers:
            list(workers.map(write, sorted(parameters, key=lambda p: -p.size)))
        store.commit(fork, segment)
        print(f"slice {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return 2 * slices * sum(parameter.size for parameter in parameters)


def name_and_range(segment: Segment) -> tuple[str, int, int]:
    """Slice, first and last."""
    return segment.slice, segment.first, segment.last


def _twin(parameter: Parameter, parameters: tuple[Parameter, ...], run: Run) -> Parameter:
    """The small run's tensor of the same kind, at the same relative depth."""
    depth, its_depth = (_layers(list(every)) for every in (parameters, run.parameters))
    layer = None if parameter.layer is None else round(parameter.layer * (its_depth - 1) / max(depth - 1, 1))
    kinds = [kind_of(parameter)]
    if len(parameter.shape) == 1:  # a family without biases has norms
        kinds += sorted({kind_of(p) for p in run.parameters if len(p.shape) == 1})
    there = [[p for p in run.parameters if kind_of(p) == kind and p.layer == layer] for kind in kinds]
    alike = next(filter(None, there), [])
    same_place = [p for p in alike if _place(p) == _place(parameter)]
    if not alike:
        raise SystemExit(f"the small run has no tensor like {parameter.name}")
    return (same_place or alike)[0]


def _layers(parameters: list[Parameter]) -> int:
    return 1 + max((p.layer or 0 for p in parameters), default=0)


def _place(parameter: Parameter) -> str:
    """Its name without the layer's number."""
    return ".".join(part for part in parameter.name.split(".") if not part.isdigit())


def drawn_bands(parameter: Parameter, pool: UInt16) -> Iterator[tuple[int, UInt16]]:
    """Records of random weights of the pool; the same weights in every slice."""
    seed = np.uint64(dither_seed(0, "synthetic", parameter.name))
    width = parameter.size // parameter.shape[0]
    for first, last in bands(parameter.shape):
        out = np.empty((last - first, *parameter.shape[1:]), np.uint16)
        _draw(pool, seed, np.uint64(first * width), out.reshape(-1))
        yield first, out


@njit(nogil=True, cache=True)
def _draw(pool: Any, seed: Any, offset: Any, out: Any) -> None:
    size = np.uint64(pool.size)
    for i in range(out.size):
        bits = dither_bits(seed, offset + np.uint64(i)) >> np.uint64(32)
        out[i] = pool[(bits * size) >> np.uint64(32)]
