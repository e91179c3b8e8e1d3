"""Memory and speed of a recorder that meets ever new lengths of samples, with the settings of `tinyonn.machine` or not.

    python benchmarks/lengths.py [--model PATH] [--lengths 300] [--tokens 512] [--sweep [NAME ...]] [--json]

A process for each setting, which take turns at the same samples, so that both are timed on the same machine at the same
moment. Private memory after 30 and after all lengths, CPU seconds of a sample (median of the ratios of its pairs), and
a digest of all sums, which must be the same. With ``--sweep`` other settings are compared too.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import Goal, at_most, finish

FEW = 30
SHORTEST = 20  # tokens
WITHOUT, OURS = "without", "ours"


def capacity(entries: int) -> dict[str, str]:
    return {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(entries), "LRU_CACHE_CAPACITY": str(entries)}


def heap(threshold: int, top: int = 0) -> dict[str, str]:
    size = str(threshold)
    return {"MALLOC_MMAP_THRESHOLD_": size, "MALLOC_TRIM_THRESHOLD_": size, "MALLOC_TOP_PAD_": str(top)}


SWEEP: dict[str, dict[str, str] | None] = {  # variables of the environment; None: what the program sets
    WITHOUT: {},
    OURS: None,
    "8 and 1 MiB": capacity(8) | heap(1 << 20),
    "16 and 1 MiB": capacity(16) | heap(1 << 20),
    "64 and 1 MiB": capacity(64) | heap(1 << 20),
    "64": capacity(64),
    "32": capacity(32),
    "1 MiB": heap(1 << 20),
    "64 and 16 MiB": capacity(64) | heap(16 << 20),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="reference")
    parser.add_argument("--lengths", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=512, help="of the longest sample")
    parser.add_argument("--sweep", nargs="*", help="settings to compare, all if none is named")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(options.model, options.plain)
        return
    compare(options)


def compare(options: Any) -> None:
    names = [WITHOUT, OURS] if options.sweep is None else options.sweep or SWEEP
    settings = {name: SWEEP[name] for name in names}
    lengths = np.linspace(SHORTEST, options.tokens, options.lengths).astype(int)
    assert len(set(lengths)) == len(lengths), "more lengths than there are tokens"
    lengths = np.random.default_rng(0).permutation(lengths)
    children = {name: Child(options.model, setting) for name, setting in settings.items()}
    for child in children.values():
        child.answer()
    seconds: dict[str, list[float]] = {name: [] for name in children}
    private: dict[str, list[int]] = {name: [] for name in children}
    for index, tokens in enumerate(lengths):
        order = list(children)
        for name in order if index % 2 else order[::-1]:
            answer = children[name].ask({"index": index, "tokens": int(tokens)})
            seconds[name].append(answer["seconds"])
            private[name].append(answer["private"])
        if index % 10 == 9:
            line = ", ".join(f"{name} {private[name][-1] >> 20} MiB" for name in children)
            print(f"{index + 1} lengths: {line}", file=sys.stderr, flush=True)
    ends = {name: child.ask({}) for name, child in children.items()}
    tell(options, settings, seconds, private, ends)


def tell(options: Any, settings: Any, seconds: Any, private: Any, ends: Any) -> None:
    rows: list[list[object]] = []
    goals: list[Goal] = []
    first = next(iter(settings))
    figures: dict[str, Any] = {"lengths": options.lengths, "tokens": options.tokens}
    for name in settings:
        few, many = private[name][FEW - 1], private[name][-1]
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True))
        same = ends[name]["digest"] == ends[first]["digest"]
        each = (many - few) / (options.lengths - FEW) / 2**20
        rows.append(
            [name, few >> 20, many >> 20, f"{each:.2f}", ends[name]["trimmed"] >> 20, f"{ratio:.3f}", same]
        )
        figures[name] = {
            "few_bytes": few, "many_bytes": many, "trimmed_bytes": ends[name]["trimmed"], "seconds_ratio": ratio,
            "median_seconds": statistics.median(seconds[name]), "same_bits": same,
        }  # fmt: skip
        if name != first:
            goals += [
                at_most(f"{name}: private memory, all lengths / {FEW}", many / few, 1.10),
                at_most(f"{name}: seconds of a sample, to {first}", ratio, 1.03),
                Goal(f"{name}: same sums", float(same), "1", same),
            ]
    columns = ["settings", f"MiB after {FEW}", "after all", "a length", "trimmed", "seconds", "same bits"]
    finish("lengths", columns, rows, goals, options.json, figures)


class Child:
    """A recorder in a process with its own environment."""

    def __init__(self, model: str, setting: dict[str, str] | None) -> None:
        command = [sys.executable, __file__, "--child", "--model", model]
        command += [] if setting is None else ["--plain"]
        unset = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"}
        env = {
            name: value for name, value in os.environ.items() if name not in unset and "MALLOC_" not in name
        }
        self._process = subprocess.Popen(
            command, env=env | {"OMP_NUM_THREADS": "1"} | (setting or {}), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next; the first says that it is ready."""
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))


def serve(path: str, plain: bool) -> None:
    """Answer questions on standard input: record a sample, or tell the digest of all sums."""
    from tinyonn import machine as runtime
    from tinyonn.config import ModelConfig
    from tinyonn.corpus.file import Sample
    from tinyonn.dense.load import load_model
    from tinyonn.record.recorder import Recorder
    from tinyonn.record.worker import calibrate

    if plain:
        runtime.bound_caches = runtime.return_freed_memory = lambda: None
    config = ModelConfig(path=path, quantization="nf4", dtype="bfloat16", device="cpu")
    recorder = Recorder(load_model(config), threads=1)
    most = recorder.model.config.vocab_size
    rng = np.random.default_rng(0)

    def sample(index: int, tokens: int) -> Sample:
        ids = rng.integers(0, most, tokens).astype(np.int32)
        return Sample(index, "x", ids, ids)

    recorder.open(calibrate(recorder, [sample(-1, SHORTEST)], [list(recorder.sites)]), spills=True)
    answer: dict[str, Any] = {"ready": True}
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if question:
            started = time.process_time()
            bad = recorder.record([sample(question["index"], question["tokens"])])
            assert not bad, bad
            answer = {"seconds": time.process_time() - started, "private": private_memory()}
        else:
            answer = {"digest": digest(recorder), "trimmed": trimmed()}
        print(json.dumps(answer), flush=True)


def private_memory() -> int:
    status = Path("/proc/self/status").read_text("utf-8")
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


def trimmed() -> int:
    """Private memory once the C library has given back all that is free."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return private_memory()


def digest(recorder: Any) -> str:
    found = hashlib.sha256()
    for name, site in sorted(recorder.sites.items()):
        for part in ("grad_total", "act_total", "freq_total", "histograms"):
            values = getattr(site, part)
            if values is not None:
                found.update(f"{name} {part}".encode())
                found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
