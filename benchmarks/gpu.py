"""Proof of the GPU path: what runs, whether its bits are right, how fast it is. One script, on a bare machine.

    python benchmarks/gpu.py [bits model record memory decode train profile] [--output results/gpu] [--json]
    python benchmarks/gpu.py --device cpu --tiny        every part in Triton's interpreter, toy sizes
    python benchmarks/gpu.py --device cpu               real shapes, one layer each, by the CPU's own kernels

It needs PyTorch, transformers, safetensors, NumPy, Numba and, for the kernels, Triton; nothing else of the project's
packages, no installation, no network: weights are those of the shipped model, or drawn. Each part is a process with a
limit of its own (together eight minutes), so that one that fails or hangs costs the others nothing. A part ends in one
line of JSON with its goals; all of them go to `<output>/<card>-<date>.json`.

See these files: `gpu_record.py` (bits, model, record, memory, profile), `gpu_experts.py` (decode, train),
`gpu_models.py` (what they run on).
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30

# Part, its limit in seconds, and the GiB of device memory that it needs.
PARTS = {
    "bits": (45, 2.0),
    "model": (70, 2.0),
    "record": (75, 8.0),
    "memory": (70, 7.9),
    "decode": (75, 14.0),
    "train": (100, 16.0),
    "profile": (45, 2.0),
}
CPU_LIMIT = 8  # times a part's limit on a CPU
# A forked process has the imports already, but CUDA does not survive a fork once anything has asked for it.
START = {"cuda": "spawn", "cpu": "fork"}
NEEDED = {"torch": "2.9", "transformers": "5.0", "numpy": "2.1", "numba": "0.61", "safetensors": "0.5"}
TRITON = "3.2"
OF_TRITON = ("div_rn", "sqrt_rn", "trans", "dot", "static_range", "atomic_max")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: that it runs, not how fast")
    parser.add_argument("--rounds", type=int, help="of every timing; 7, on a CPU 2, toy 1")
    parser.add_argument(
        "--output", type=Path, help="folder of the summary; results/gpu, with --device cpu none"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if wrong := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no part is called {wrong[0]!r}; choose of {', '.join(PARTS)}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if options.tiny:
            os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path.insert(0, str(ROOT))
    missing = lacking()
    if missing:
        print(f"gpu: {missing}", file=sys.stderr)
        sys.exit(2)
    about = facts(options.device, options.tiny)
    if options.device == "cuda" and not about["card"]:
        print(
            f"gpu: no GPU: nvidia-smi lists none on {platform.node()}; run this on a machine with an NVIDIA card and "
            "its driver, or try the script itself with --device cpu --tiny",
            file=sys.stderr,
        )
        sys.exit(2)
    print(json.dumps(about), flush=True)
    parts = options.parts or list(PARTS)
    rounds = options.rounds or (1 if options.tiny else 7 if options.device == "cuda" else 2)
    if START[options.device] == "fork":
        load(parts)
    found = [run(part, options.device, options.tiny, rounds) for part in parts]
    report(found, about, options)


def lacking() -> str | None:
    """What a package lacks that the parts need; Triton may be missing, not too old."""
    from importlib.metadata import PackageNotFoundError, version

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)[:2]]

    for name, least in NEEDED.items():
        try:
            have = version(name)
        except PackageNotFoundError:
            return f"{name} is not installed; install {name} >= {least}"
        if numbers(have) < numbers(least):
            return f"{name} {have} is too old; install {name} >= {least}"
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None
    names = [name for name in OF_TRITON if not hasattr(tl, name)]
    if names:
        return f"triton {triton.__version__} lacks triton.language.{names[0]}; install triton >= {TRITON}"
    return None


def facts(device: str, tiny: bool) -> dict[str, Any]:
    """Card and versions; by nvidia-smi, so that this process holds no memory of the card."""
    from importlib.metadata import PackageNotFoundError, version

    from tinyonn.machine import gpus

    cards = gpus() if device == "cuda" else []
    versions: dict[str, str | None] = {}
    for name in (*NEEDED, "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "card": cards[0].name if cards else "" if device == "cuda" else "interpreter" if tiny else "cpu",
        "memory": cards[0].total if cards else 0,
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "machine": cards[0].name if cards else f"{device}, no card",
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip()


def load(parts: list[str]) -> None:
    """Import once what the parts' processes then share."""
    for part in parts:
        work(part)


def work(part: str) -> Callable[[Any], Any]:
    """The function of a part."""
    if part in ("decode", "train"):
        import gpu_experts

        found: Callable[[Any], Any] = getattr(gpu_experts, part)
    else:
        import gpu_record

        found = getattr(gpu_record, part)
    return found


def run(part: str, device: str, tiny: bool, rounds: int) -> dict[str, Any]:
    """Run a part in a process of its own, for so long as it may; prints its line."""
    limit, need = PARTS[part]
    limit *= 1 if device == "cuda" else CPU_LIMIT
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context: Any = multiprocessing.get_context(START[device])
    process = context.Process(target=child, args=(theirs, part, device, tiny, rounds, need), daemon=True)
    started = time.perf_counter()
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(limit) else {"error": f"still running after its limit of {limit} s"}
    except EOFError:
        process.join()
        found = {"error": f"ended by signal or exit code {process.exitcode}"}
    if process.is_alive():
        process.join(1)
        process.kill()
    process.join()
    line = {"part": part, "seconds": round(time.perf_counter() - started, 1), **found}
    print(json.dumps(line), flush=True)
    return line


def child(pipe: Any, part: str, device: str, tiny: bool, rounds: int, need: float) -> None:
    """A part's own process."""
    import transformers

    transformers.logging.disable_progress_bar()
    pipe.send(attempt(part, device, tiny, rounds, need))
    pipe.close()


def attempt(part: str, device: str, tiny: bool, rounds: int, need: float) -> dict[str, Any]:
    """What a part gives: goals and figures, or why there are none."""
    import torch
    from gpu_models import Setting

    setting = Setting(torch.device(device), tiny, rounds)
    try:
        if setting.on_gpu:
            free = torch.cuda.mem_get_info()[0] / GIB
            if free < need:
                return {
                    "skipped": f"needs {need:g} GiB of device memory, {free:.1f} GiB are free; "
                    "end what else runs on the card, or take a larger one"
                }
        elif tiny:
            torch.set_num_threads(1)
        found = work(part)(setting)
    except torch.cuda.OutOfMemoryError as error:
        return {"error": f"out of device memory: {str(error).splitlines()[0]}"}
    except Exception as error:
        return {
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc().splitlines()[-12:],
        }
    return {"goals": [asdict(goal) for goal in found.goals], "figures": found.figures}


def report(found: list[dict[str, Any]], about: dict[str, Any], options: Any) -> None:
    """A table of all goals, the summary on disk, and with --json one last line. Ends with 1 if a part failed."""
    from report import show

    goals = [goal for line in found for goal in line.get("goals", [])]
    rows: list[tuple[object, ...]] = [
        (goal["name"], goal["value"], goal["goal"], "met" if goal["met"] else "MISSED") for goal in goals
    ]
    rows += [
        (line["part"], why[:90], "", "FAILED" if "error" in line else "skipped")
        for line in found
        if (why := line.get("error") or line.get("skipped"))
    ]
    show(f"GPU: {about['card']}", ("goal", "value", "wanted", ""), rows)
    tree = {"benchmark": "gpu", **about, "tiny": options.tiny, "parts": found}
    folder = options.output or (None if options.device == "cpu" else ROOT / "results" / "gpu")
    if folder is not None:
        card = re.sub(r"[^a-z0-9]+", "-", about["card"].lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{card}-{about['date']}.json"
        path.write_text(json.dumps(tree, indent=1) + "\n", "utf-8")
        print(f"written: {path}")
    if options.json:
        print(json.dumps({"benchmark": "gpu", "goals": goals, "figures": {"parts": found}}), flush=True)
    if any("error" in line for line in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
