"""Reads a run without Tiny-ONN, from Zarr's API and the arrays' attributes alone.

python tests/store/independent_reader.py STORE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import zarr


def read(location: Path) -> dict[str, Any]:
    """Mean act and grad level and freq of every weight, averaged over all segments by samples.

    Returns
    -------
    dict
        ``samples``: int; ``means``: dict of tensor name to float64 [3, *shape].
    """
    storage = icechunk.local_filesystem_storage(str(location))
    root: Any = zarr.open_group(icechunk.Repository.open(storage).readonly_session("main").store, mode="r")
    sums: dict[str, Any] = {}
    samples = 0
    for _, slice_group in root["segments"].groups():
        for _, segment in slice_group.groups():
            weight = int(segment.attrs["samples"])
            samples += weight
            for name, array in segment.arrays():
                records = array[...]
                fields = array.attrs["fields"]
                means = [
                    np.asarray(fields[key]["codebook"])[(records >> fields[key]["shift"]) & 15]
                    for key in ("act", "grad", "freq")
                ]
                sums[name] = sums.get(name, 0) + weight * np.stack(means)
    return {"samples": samples, "means": {name: total / samples for name, total in sums.items()}}


if __name__ == "__main__":
    found = read(Path(sys.argv[1]))
    print(f"{found['samples']} samples")
    for tensor, mean in found["means"].items():
        print(tensor, *(f"{value:.4f}" for value in mean.reshape(3, -1).mean(axis=1)))
