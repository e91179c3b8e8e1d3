"""Assembling a run of billions of weights as the default does it, beside the same bytes alone; see `four_billion.py`.

Alone means: the files of the base model and the chunks of rows and labels are read, compressed as they are, and as many
bytes as the assembled model has are written and synced, with as many threads; nothing is done with them. Before each
part the files leave the page cache.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from benchmarks.large_run import (
    FILE_BLOCK,
    Measured,
    PeakWatch,
    chunk_keys,
    disk_bytes,
    leave_the_cache,
    run_stage,
    with_base,
)
from benchmarks.report import at_most, finish
from tinyonn.dense.parameters import Parameter
from tinyonn.score.source import tensors_outside
from tinyonn.show.sizes import GiB
from tinyonn.store.repository import Store


def assemble(options: Any) -> None:
    """Assemble, and the same reading and writing alone."""
    store = Store.open(options.run / "store")
    parameters = store.manifest.parameters
    base, config = with_base(options, parameters)
    target = options.run / "experts"
    shutil.rmtree(target, ignore_errors=True)
    own = run_stage("assemble", options, ["--config", str(config)])
    written = disk_bytes(target)
    alone = input_output(options, tensors_outside(parameters), base, written)
    figures = own.figures
    rows = [
        ["tinyonn assemble", f"{own.seconds:.1f}", *_rates(own.seconds, alone), f"{own.peak / GiB:.2f}"],
        [
            "input and output alone",
            f"{alone.seconds:.1f}",
            *_rates(alone.seconds, alone),
            f"{alone.peak / GiB:.2f}",
        ],
    ]
    print(
        f"{figures['budget']:,} of {figures['linear']:,} weights; selecting {figures['select_seconds']:.1f} s, "
        f"writing {figures['write_seconds']:.1f} s; read {alone.read / 1e9:.2f} GB, wrote {written / 1e9:.2f} GB"
    )
    goals = [
        at_most("assemble: seconds over input and output alone", own.seconds / alone.seconds, 2),
        at_most("assemble: peak RSS of all processes, GiB", own.peak / GiB, 4),
        at_most(
            "bytes on disk over the format's arithmetic", figures["bytes"] / figures["planned_bytes"], 1.05
        ),
    ]
    seconds = {name: figures[f"{name}_seconds"] for name in ("select", "write")}
    finish(
        "four_billion assemble",
        ("", "seconds", "GB/s", "peak GiB"),
        rows,
        goals,
        options.json,
        {
            "seconds": {**seconds, "all": own.seconds, "alone": alone.seconds},
            "read": alone.read,
            "written": written,
        },
    )


def input_output(options: Any, parameters: Sequence[Parameter], base: Path, size: int) -> Measured:
    """Read what assembly reads and write as much as it writes."""
    store = Store.open(options.run / "store")
    reading: Any = store.reader()._store
    leave_the_cache(options.run)
    watch = PeakWatch(os.getpid())
    files = sorted(base.glob("*.safetensors"))
    started = time.perf_counter()

    def work(number: int) -> int:
        read = 0
        for path in files[number :: options.workers]:
            with path.open("rb", buffering=0) as stream:
                while block := stream.read(FILE_BLOCK):
                    read += len(block)
        for parameter in parameters[number :: options.workers]:
            for key in chunk_keys(parameter):
                for group in ("rows", "labels"):
                    found = sync(reading.get(f"{group}/{parameter.name}/{key}", default_buffer_prototype()))
                    read += 0 if found is None else len(found.to_bytes())
        target = options.run / f"alone-{number}"
        block = os.urandom(FILE_BLOCK)
        with target.open("wb", buffering=0) as stream:
            for _ in range(size // options.workers // FILE_BLOCK):
                stream.write(block)
            os.fsync(stream.fileno())
        target.unlink()
        return read

    with ThreadPoolExecutor(options.workers) as pool:
        read = sum(pool.map(work, range(options.workers)))
    return Measured(time.perf_counter() - started, watch.stop(), read, size, {})


def _rates(seconds: float, alone: Measured) -> list[str]:
    return [f"{(alone.read + alone.written) / seconds / 1e9:.2f}"]
