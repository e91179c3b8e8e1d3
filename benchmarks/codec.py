"""Ratio and speed of the store's codec and of its rivals, one thread.

    python -m benchmarks.codec [STORE]

Without a store: simulated records. With one: all matrices of its first segment, each packed by itself.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from numcodecs import Blosc, blosc

from benchmarks.simulated import codebooks_of, encode, segment_means
from tinyonn.store.records import UInt16
from tinyonn.store.repository import Store


def simulated() -> UInt16:
    """8 MiB of records of a segment of 16 samples."""
    means, _ = segment_means(2048, 2048, 1, 16)
    return encode(means[0], codebooks_of(means[0]), 1)


def stored(location: str) -> list[UInt16]:
    """Records of every matrix of the first segment that has samples."""
    store = Store.open(location)
    segment = next(segment for segment in store.segments() if segment.samples)
    names = [parameter.name for parameter in store.manifest.parameters if len(parameter.shape) > 1]
    return [np.asarray(store.records(segment, name)[...]).ravel() for name in names]


def best_seconds(action: object, *arguments: object) -> float:
    """Least of five."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        action(*arguments)  # type: ignore[operator]
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    """Print one line per codec."""
    blosc.use_threads = False
    tensors = stored(sys.argv[1]) if len(sys.argv) > 1 else [simulated()]
    size = sum(records.nbytes for records in tensors) / 1e6
    bits = sum(entropy(records) * records.nbytes / 1e6 for records in tensors) / size
    print(f"{size:.1f} MB of records, entropy of a record {bits:.2f} bits of 12")
    for name, level in (("lz4", 1), ("lz4", 5), ("zstd", 1), ("zstd", 3), ("zstd", 5)):
        for shuffle, label in (
            (Blosc.BITSHUFFLE, "bitshuffle"),
            (Blosc.SHUFFLE, "byteshuffle"),
            (Blosc.NOSHUFFLE, "none"),
        ):
            codec = Blosc(cname=name, clevel=level, shuffle=shuffle)
            packed = [codec.encode(records) for records in tensors]
            writing = sum(best_seconds(codec.encode, records) for records in tensors)
            reading = sum(best_seconds(codec.decode, data) for data in packed)
            print(
                f"{name:4s} {level} {label:11s} ratio {size * 1e6 / sum(map(len, packed)):5.2f}  "
                f"encode {size / writing:6.0f} MB/s  decode {size / reading:6.0f} MB/s"
            )


def entropy(records: UInt16) -> float:
    """Entropy of the distribution of whole records, in bits."""
    share = np.bincount(records >> 4, minlength=4096) / records.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


if __name__ == "__main__":
    main()
