"""docs/results.md, from the stored results alone: python -m benchmarks.results (`make results`)

Every table has above it the command that measured it, the commit, the day and the machine. A stored result that no
section names stands under *Other*. Nothing here holds a figure: what is printed comes from the files, so the same files
give the same bytes. Sentences with figures on other pages are in claims.py, and this script ends with an error where
one of them says something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.claims import faults
from benchmarks.stored import Stored, Table, read_results
from tinyonn.errors import InputError
from tinyonn.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
CLOSE = 1.15  # planned over measured memory; what is above is listed
INTRODUCTION = """\
# Results

Written by `make results` from the files of [results](../results), each of which is linked beside its command; change
those, not this page. `python benchmarks/report.py BENCHMARK` measures again and stores what it finds. Ratios hold
better than absolutes. What was tried besides and failed: [decisions](decisions/README.md).
"""
KEPT = """\
How many weights each tensor keeps matters as much as which. One cut of |W · g| through all tensors costs no pass over
data and is what you get without `--allocate`; on a real model one share in every tensor was better for |W| · √g where
half or more was kept, and is no longer for the default ([note 030](decisions/030-one-score-for-two-models.md)).
The seed of the idea, high activation and *low* gradient, loses the most.
SparseGPT changes the values of what is kept; `default+update` is its update of ours, and not what `assemble` writes
([note 012](decisions/012-quality.md)).
"""
ROUTER = """\
With the same number of weights at work, choosing them by the prompt is worth it after training; it was not, as long as
the router learned from the experts' gradients and kept moving ([note 017](decisions/017-a-held-router.md)). Norms learn
too ([note 018](decisions/018-norms-learn-too.md)), and a dense model that has learned may teach
([note 019](decisions/019-a-teacher-that-learned.md)).
"""
GPU = """\
The newest run; earlier ones, and what was wrong with them: [results/gpu](../results/gpu/README.md),
[note 020](decisions/020-the-gpu-path.md).
"""
MEMORY = """\
MiB that each stage said it would need, and that all its processes held together at one time. *Planned* is what the
plans said then, with constants that were set after some of the runs.
"""
ABOVE = """\
The rest is close. What lies above it: training and evaluation are planned for batches that these few samples do not
fill; constants of small processes hold what a first run takes to compile its kernels, and what larger models bring with
them. Recording differed from run to run until all of a worker's work was done in one thread
([note 023](decisions/023-memory-that-does-not-grow.md)).
"""


@dataclass(frozen=True)
class Section:
    """A heading, the stored results below it (patterns of names), how they are printed, and words without figures."""

    title: str
    names: tuple[str, ...]
    print: Callable[[Sequence[Stored]], str]
    words: str = ""


def page(results: Mapping[str, Stored]) -> str:
    """The whole page.

    Parameters
    ----------
    results : mapping of str to Stored
        As `stored.read_results` gives them.
    """
    left = dict(sorted(results.items()))
    parts = [INTRODUCTION]
    for section in SECTIONS:
        own = [name for pattern in section.names for name in left if fnmatchcase(name, pattern)]
        some = [left.pop(name) for name in dict.fromkeys(own)]
        if some:
            words = f"{section.words}\n" if section.words else ""
            parts.append(f"## {section.title}\n\n{words}{section.print(some)}")
    return "\n".join(parts)


def every(some: Sequence[Stored]) -> str:
    """All tables of some results as they were printed; of one without tables its goals."""
    return "\n".join(
        f"{origin(one)}\n" + "\n".join(table(part) for part in one.tables or goals_of(one)) for one in some
    )


def gpu(some: Sequence[Stored]) -> str:
    """The goals of the newest run."""
    newest = max(some, key=lambda one: (one.date, one.name))
    return every([newest])


def memory(some: Sequence[Stored]) -> str:
    """Planned and measured memory of all models in one table, and how far they are apart."""
    stages = list(dict.fromkeys(row[0] for one in some for row in one.tables[0].rows))
    columns = ["stage"]
    rows = [[stage] for stage in stages]
    over, above = [], []
    for one in some:
        model = str(one.figures["model"])
        columns += [f"{model}: planned", "measured"]
        have = {row[0] for row in one.tables[0].rows}
        for row in rows:
            if row[0] not in have:
                row += ["", ""]
                continue
            texts = [one.cell(row[0], column) for column in ("planned MiB", "measured MiB")]
            planned, measured = (float(text.replace(",", "")) for text in texts)
            row += texts
            if measured > planned:
                over.append(f"{row[0]} of {model}")
            elif planned > CLOSE * measured:
                above.append(f"{row[0]} of {model} ({planned / measured:.2f})")
    text = "Nothing took more than is planned." if not over else f"More than planned took {'; '.join(over)}."
    text += f" Planned over measured is above {CLOSE} for {'; '.join(above)}." if above else ""
    whole = Table("", tuple(columns), tuple(map(tuple, rows)))
    return "\n".join([*map(origin, some), table(whole), f"{text}\n", ABOVE])


def origin(one: Stored) -> str:
    """Command, commit, day and machine, and what is measured."""
    seeds = f"; seed{'s' * (len(one.seeds) > 1)} {', '.join(map(str, one.seeds))}" if one.seeds else ""
    source = f"; {one.source}" if one.source else ""
    link = f"[{one.name}](../results/{one.name}.json)"
    line = f"{link}: `{one.command}`, {one.commit}, {one.date}, {safe(one.machine)}{seeds}{safe(source)}.\n"
    return line + (f"\n{safe(one.about)}\n" if one.about else "")


def table(one: Table) -> str:
    """As Markdown."""
    title = f"*{safe(one.title)}*\n\n" if one.title else ""
    head, *lines = (f"| {' | '.join(map(cell, line))} |\n" for line in (one.columns, *one.rows))
    return "".join([title, head, "|---" * len(one.columns) + "|\n", *lines])


def goals_of(one: Stored) -> list[Table]:
    """Its goals as a table, or nothing."""
    rows = [
        (goal["name"], f"{goal['value']:.4g}", goal["goal"], "met" if goal["met"] else "missed")
        for goal in one.goals
    ]
    return [Table("", ("goal", "value", "wanted", ""), tuple(rows))] if rows else []


def safe(text: str) -> str:
    """Text that no browser takes for more."""
    return " ".join(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text).split())


def cell(text: str) -> str:
    """Text in a table."""
    return safe(text).replace("|", "\\|")


SECTIONS = (
    Section("Recording", ("record*", "fidelity*"), every),
    Section(
        "Scores and cells",
        ("cells/*", "targets/*", "bits/*", "kmeans*", "incremental*", "four_billion*"),
        every,
    ),
    Section("What is kept, before any training", ("quality*", "baselines*", "baselines/*"), every, KEPT),
    Section("A real model, every stage", ("pipeline*",), every),
    Section("Tasks", ("tasks*", "tasks/*"), every),
    Section("With a router", ("routing/200*", "routing/1200*", "routing*", "routing/*"), every, ROUTER),
    Section(
        "What it costs to run",
        ("decode*", "efficiency*", "weights*", "train_step*", "decode/*", "efficiency/*"),
        every,
    ),
    Section("On a GPU", ("gpu/*",), gpu, GPU),
    Section("Memory, planned and measured", ("memory_plan/reference", "memory_plan/*"), memory, MEMORY),
    Section("Other", ("*",), every),
)


def main() -> None:
    """Write the page, and say what other pages say besides."""
    try:
        results = read_results()
        write_whole(PAGE, page(results))
    except InputError as error:
        raise SystemExit(f"results: {error}") from None
    print(f"written: {PAGE.relative_to(ROOT)}, from {len(results)} stored results")
    if wrong := faults(ROOT, results):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
