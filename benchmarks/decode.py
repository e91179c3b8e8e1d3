"""Decoding with few active weights beside the dense model and sparse peers: one token, layers of Qwen1.5-4B's shape.

    python benchmarks/decode.py [--rounds 9] [--threads 2] [--tokens 1] [--json]

All linear weights of `--layers` layers (1.1 GB of dense BF16 for 7) are read once a turn; the ways take turns, and
before each a buffer larger than the last cache is read, so that every weight comes from RAM as in a model of 40 layers.
Ours is the default path: what the cost model picks. Peers hold float32 values with int32 columns, the narrowest that
both multiply, of two layers. Tokens per second are those of 40 layers without attention and head, by the fastest
layer, since the load of others only ever adds; medians stand beside. With one thread its CPU time counts, from which a
busy machine takes little. The roofline is the bytes at the best speed of the buffer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from drawn import random_matrix
from report import Goal, at_least, finish
from scipy.sparse import csr_matrix
from torch.nn import functional

from tinyonn.model.sparse_tinyonn import Merged, merge, sparse_linear

SHARES = (0.01, 0.03, 0.1, 0.31, 1.0)
MODEL_LAYERS = 40
PEER_LAYERS = 2
WAYS = ("dense", "torch CSR", "SciPy CSR", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES)
    parser.add_argument("--small", action="store_true", help="toy sizes: that it runs, not how fast")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hidden, middle, flushed = (2560, 6912, 1 << 29) if not options.small else (256, 704, 1 << 20)
    if options.small:
        options.rounds, options.layers = 2, 2
    shapes = {(hidden, hidden): 4, (middle, hidden): 2, (hidden, middle): 1}
    one = {shape: torch.randn(shape).bfloat16() for shape in shapes}
    dense = [
        [one[shape].clone() for shape, n in shapes.items() for _ in range(n)] for _ in range(options.layers)
    ]
    buffer = torch.ones(flushed // 4)
    rows: list[list[object]] = []
    goals: list[Goal] = []
    figures: dict[str, Any] = {"tokens": options.tokens, "shares": {}}
    for share in options.shares:
        found = compare(share, shapes, dense, buffer, options)
        figures["shares"][str(share)] = found
        rows += table(share, found)
        goals += judge(share, found, options.tokens)
    columns = [
        "active",
        "way",
        "form",
        "tokens/s",
        "GB a token",
        "roofline",
        "to dense",
        "medians",
        "median tokens/s",
    ]
    finish("decode", columns, rows, goals, options.json, figures)


Layer = list[Any]


def compare(
    share: float, shapes: dict[tuple[int, int], int], dense: list[list[torch.Tensor]], buffer: torch.Tensor,
    options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Seconds a layer of every way, by turns, with bytes and the measured bandwidth."""
    torch.manual_seed(int(share * 100))
    merged: list[Layer] = [[] for _ in dense]
    peers: list[Layer] = [[] for _ in dense[:PEER_LAYERS]]
    tokens: list[torch.Tensor] = []
    for shape, count in shapes.items():
        matrix = random_matrix(shape, share)
        one = merge(matrix, torch.ones(1))
        pointer, column, value = matrix.row_pointer, matrix.columns.int(), matrix.values.float()
        for _ in range(count):
            tokens.append(torch.randn(options.tokens, shape[1]).bfloat16())
            for layer in merged:
                layer.append(copied(one))
            for layer in peers:
                layer.append((pointer.clone(), column.clone(), value.clone(), shape))
        del matrix, one, pointer, column, value
    wide = [X_TI.float().T.contiguous() for X_TI in tokens]
    if options.tokens == 1:
        wide = [x.reshape(-1) for x in wide]
    torch.sparse.check_sparse_tensor_invariants.disable()
    torch_csr = [[torch.sparse_csr_tensor(p, c, v, shape) for p, c, v, shape in layer] for layer in peers]
    scipy_csr = [
        [csr_matrix((v.numpy(), c.numpy(), p.numpy()), shape) for p, c, v, shape in layer] for layer in peers
    ]
    narrow = [x.numpy() for x in wide]
    ways: dict[str, Callable[[], list[float]]] = {
        "dense": partial(each, functional.linear, tokens, dense),
        "torch CSR": partial(each, lambda x, A: A @ x, wide, torch_csr),
        "SciPy CSR": partial(each, lambda x, A: A @ x, narrow, scipy_csr),
        "ours": partial(each, sparse_linear, tokens, merged),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    reads: list[float] = []
    with torch.inference_mode():
        for turn in range(options.rounds + 1):
            for way, run in ways.items():
                started = clock()
                buffer.sum()
                read = clock() - started
                found = run()
                if turn:  # the first is a warm-up
                    reads.append(buffer.nbytes / read)
                    seconds[way] += found
    entries = sum(part.entries for part in merged[0])
    weights = sum(part.out * part.inputs for part in merged[0])
    peer_bytes = 8 * entries + 4 * sum(part.out + 1 for part in merged[0])
    return {
        "seconds": dict(seconds),
        "bytes": dict(
            zip(WAYS, (2 * weights, peer_bytes, peer_bytes, sum(m.bytes for m in merged[0])), strict=True)
        ),
        "forms": sorted({part.form for part in merged[0]}),
        "bandwidth": max(reads),
    }


def copied(merged: Merged) -> Merged:
    """The same in other memory."""
    return replace(
        merged, values=merged.values.clone(), places=merged.places.clone(), starts=merged.starts.clone()
    )


def clock() -> float:
    """Wall time, or a lone thread's CPU time."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def each(product: Callable[[Any, Any], Any], inputs: list[Any], layers: list[Layer]) -> list[float]:
    """Seconds of each layer."""
    seconds = []
    for layer in layers:
        started = clock()
        for x, weight in zip(inputs, layer, strict=True):
            product(x, weight)
        seconds.append(clock() - started)
    return seconds


def ratio(found: dict[str, Any], way: str, to: str, of: Callable[[list[float]], float] = min) -> float:
    """How many times as fast `way` is, by its fastest layer: the load of others only ever adds."""
    return of(found["seconds"][to]) / of(found["seconds"][way])


def table(share: float, found: dict[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for way in WAYS:
        size = MODEL_LAYERS * found["bytes"][way]
        best, middle = (1 / (MODEL_LAYERS * of(found["seconds"][way])) for of in (min, statistics.median))
        ratios = [ratio(found, way, "dense", of) for of in (min, statistics.median)]
        form = " ".join(found["forms"]) if way == "ours" else ""
        numbers = (best, size / 1e9, found["bandwidth"] / size, *ratios, middle)
        rows.append([f"{share:.0%}", way, form, *(f"{number:.2f}" for number in numbers)])
    return rows


def judge(share: float, found: dict[str, Any], tokens: int) -> list[Goal]:
    wanted = {0.1: 3.0, 0.31: 1.3}.get(share, 0.97) if tokens == 1 else 0.97
    peer = min(ratio(found, "ours", way) for way in WAYS[1:3])
    name = f"{share:.0%} active"
    return [
        at_least(f"{name}: times dense", ratio(found, "ours", "dense"), wanted),
        at_least(f"{name}: times the best peer", peer, 1.0),
    ]


if __name__ == "__main__":
    main()
