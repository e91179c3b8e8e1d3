"""Assembling a run of billions of weights as the default does it, beside the same bytes alone; see `four_billion.py`.

The base model is a checkpoint of random BF16 weights of the same shape, made if it is not there. Alone means: the files
of the base model and the chunks of rows and of every slice's segments are read, compressed as they are, and as many
bytes as the assembled model has are written and synced, with as many threads; nothing is done with them. Before each
part the files leave the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from benchmarks.large_run import Measured, PeakWatch, chunk_keys, disk_bytes, leave_the_cache, run_stage
from benchmarks.report import at_most, finish
from tinyonn.dense.parameters import Parameter
from tinyonn.experts.shards import plan_shards, write_tensors
from tinyonn.show.sizes import GiB
from tinyonn.store.repository import Store

BLOCK = 1 << 23


def assemble(options: Any) -> None:
    """Assemble, and the same reading and writing alone."""
    store = Store.open(options.run / "store")
    parameters = store.manifest.parameters
    base = options.run / "base"
    make_base(options.shape, base, parameters)
    target = options.run / "experts"
    shutil.rmtree(target, ignore_errors=True)
    config = options.run / "assemble.yaml"
    config.write_text(
        f"model: {{path: {base.absolute()}, quantization: nf4}}\nexperts: {{budget: {options.budget:g}}}\n"
    )
    own = run_stage("assemble", options, ["--config", str(config)])
    written = disk_bytes(target)
    alone = input_output(options, [p for p in parameters if p.kind == "linear"], base, written)
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


def make_base(shape: Path, folder: Path, parameters: Sequence[Parameter]) -> None:
    """A checkpoint of random weights, a shard for each layer."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    files = {}
    for shard in plan_shards(folder, parameters, [], []):
        tensors = {
            name: torch.randn(size, generator=generator).mul_(0.02).bfloat16()
            for name, size in ((p.name, p.shape) for p in parameters if p.name in shard.whole)
        }
        write_tensors(shard.path, tensors, {"format": "pt"})
        files.update(dict.fromkeys(tensors, shard.path.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    shutil.copyfile(shape / "config.json", folder / "config.json")


def input_output(options: Any, parameters: Sequence[Parameter], base: Path, size: int) -> Measured:
    """Read what assembly reads and write as much as it writes."""
    store = Store.open(options.run / "store")
    reading: Any = store.reader()._store
    groups = ["rows", *(segment.path for segment in store.segments() if segment.samples)]
    leave_the_cache(options.run)
    watch = PeakWatch(os.getpid())
    files = sorted(base.glob("*.safetensors"))
    started = time.perf_counter()

    def work(number: int) -> int:
        read = 0
        for path in files[number :: options.workers]:
            with path.open("rb", buffering=0) as stream:
                while block := stream.read(BLOCK):
                    read += len(block)
        for parameter in parameters[number :: options.workers]:
            for key in chunk_keys(parameter):
                for group in groups:
                    found = sync(reading.get(f"{group}/{parameter.name}/{key}", default_buffer_prototype()))
                    read += 0 if found is None else len(found.to_bytes())
        target = options.run / f"alone-{number}"
        block = os.urandom(BLOCK)
        with target.open("wb", buffering=0) as stream:
            for _ in range(size // options.workers // BLOCK):
                stream.write(block)
            os.fsync(stream.fileno())
        target.unlink()
        return read

    with ThreadPoolExecutor(options.workers) as pool:
        read = sum(pool.map(work, range(options.workers)))
    return Measured(time.perf_counter() - started, watch.stop(), read, size, {})


def _rates(seconds: float, alone: Measured) -> list[str]:
    return [f"{(alone.read + alone.written) / seconds / 1e9:.2f}"]
