"""Held-out loss of a real model cut by published methods and by ours, with 95 % intervals over documents.

    python benchmarks/baselines.py storage/baselines --data DATA --model MODEL [--methods default wanda] [--json]

DATA holds four public files (`FILES`): rows of even numbers may be recorded, rows of odd ones are held out. The run is
recorded (128 samples) and scored if it is not there; then every method is evaluated on the test split of the held-out
documents. Methods that need samples take recorded ones. Allocation is one cut of |W · g| through all tensors,
or the same share in every tensor (``+uniform``); nothing was chosen on these documents. A killed call goes on.
`python benchmarks/report.py benchmarks/baselines.py ...` stores the table, which `make results` prints.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality import record, tell
from benchmarks.report import finish
from tinyonn.config import Config
from tinyonn.evaluate.intervals import RESAMPLES
from tinyonn.evaluate.report import DENSE, ORIGINAL, EvaluateReport
from tinyonn.evaluate.stage import EvaluateOptions, evaluate_run
from tinyonn.score.scores import name_of
from tinyonn.score.stage import score_run
from tinyonn.select.selection import select_options
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import EngineOptions

FILES = {
    "chinese": "alpaca_zh_demo.json.gz",
    "english": "alpaca_en_demo.json.gz",
    "maths": "gsm8k_train_2000.jsonl.gz",
    "tools": "glaive_toolcall_en_demo.json.gz",
}
RECORDED, HELD_OUT = 32, 36  # samples of each kind; about half of the latter lie in the test split
BUDGETS = (0.7, 0.5, 0.315)
METHODS = {  # what each is, as its row says
    "default": "default: |W| · rms^½ · g^¾ of the records, a core, our shares",
    "default+uniform": "the same, one share in every tensor",
    "magnitude+uniform": "magnitude as published",
    "wanda-float+uniform": "Wanda as published",
    "sparsegpt+uniform": "SparseGPT as published",
    "root": "|W| · √g of the records, our shares",
    "wg": "|W · g| of the records, our shares",
    "wanda": "Wanda's score of the records, our shares",
    "wanda-float": "Wanda, float inputs, within rows, our shares",
    "sparsegpt": "SparseGPT, our shares",
    "root-float-8": "|W| · √g, float gradients of 8 samples, our shares",
    "root-float-32": "|W| · √g, float gradients of 32 samples, our shares",
    "magnitude": "magnitude, our shares",
    "root-float-128": "|W| · √g, float gradients of 128 samples, our shares",
    "default+update": "default, values updated as SparseGPT does",
}


def rows_of(path: Path) -> list[Any]:
    """Of a JSON list or JSON Lines, compressed."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines()]


def divide(data: Path, folder: Path) -> None:
    """Write what may be recorded and what is held out, a file of each kind of text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in FILES.items():
        rows = rows_of(data / file)
        for what, some in (("recorded", rows[::2]), ("heldout", rows[1::2])):
            path = folder / f"{name}.{what}.jsonl"
            if not path.exists():
                path.write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")


def config_of(model: str, folder: Path, max_tokens: int) -> Config:
    """Of the run."""

    def sources(what: str, samples: int) -> Iterator[dict[str, Any]]:
        for name in FILES:
            yield {"path": str(folder / f"{name}.{what}.jsonl"), "slice_name": name, "samples": samples}

    return Config.model_validate(
        {
            "model": {"path": model},
            "data": {"sources": list(sources("recorded", RECORDED)), "max_tokens": max_tokens},
            "evaluate": {
                "data": {"sources": list(sources("heldout", HELD_OUT)), "max_tokens": max_tokens},
                "samples": None,
            },
        }
    )


def prepared(run: Path, config: Config, threads: int) -> None:
    """Record and score, as far as that is not done."""
    if not Store.exists(run / "store"):
        record(run, config, threads)
    score_run(str(run), config, EngineOptions("threads", threads))


def rows_of_table(report: EvaluateReport, budgets: Sequence[float]) -> Iterator[list[str]]:
    """Of each method its loss, and what it is behind the default on the same documents, at every budget."""
    pairs = list(zip(report.lines, report.spreads, strict=True))
    measured = {line.method for line in report.lines}
    for method, name in ((ORIGINAL, "original"), (DENSE, "NF4"), *METHODS.items()):
        if method not in measured:
            continue
        cells = []
        for budget in budgets:
            whole = method in (ORIGINAL, DENSE)
            at = [(x, s) for x, s in pairs if x.method == method and (whole or x.share == budget)]
            if not at:
                cells += ["not measured", ""]
                continue
            line, spread = at[0]
            nats = f"{line.losses.mean:.3f}"
            if (own := spread.interval) is not None:
                nats += f" [{own.low:.3f}, {own.high:.3f}]"
            behind = ""
            if spread.behind is not None and (own := spread.behind_interval) is not None and spread.behind:
                behind = f"{spread.behind:+.3f} [{own.low:+.3f}, {own.high:+.3f}]"
            cells += [nats, behind]
        yield [name, *cells]


def main() -> None:
    """Parse and carry out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=Path("storage/baselines"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the public files")
    parser.add_argument("--model", required=True, help="as of the option model.path")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS), metavar="METHOD")
    parser.add_argument("--calibration", type=int, default=64, help="recorded samples for updates and inputs")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a sample")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    folder = options.run.with_name(f"{options.run.name}-data")
    divide(options.data, folder)
    config = config_of(options.model, folder, options.max_tokens)
    prepared(options.run, config, options.threads)
    report = evaluate_run(
        str(options.run),
        config,
        EvaluateOptions(
            methods=tuple(options.methods),
            budgets=tuple(options.budgets),
            data=config.evaluate.data,
            samples=None,
            calibration=options.calibration,
            selection=select_options(config.experts, name_of(config.score.exponents)),
        ),
        tell,
    )
    budgets = sorted(options.budgets, reverse=True)
    columns = ["nats a token [95 %], kept:"]
    for budget in budgets:
        columns += [f"{100 * budget:g} %", "behind the default"]
    figures = {**report.figures(), "seeds": [0], "resamples": RESAMPLES, "recorded": RECORDED * len(FILES)}
    finish("baselines", columns, rows_of_table(report, budgets), [], options.json, figures)


if __name__ == "__main__":
    main()
