"""Sentences with measured figures on pages that people write, and the stored results that give their numbers.

`faults` refuses a figure that is in no stored result: every claim must stand on its page as its results have it, and
every figure of the prose (a decimal, a percentage, "N times", a number of nats, bytes, seconds or tokens a second)
must lie in a claim, or in `CONSTANTS` if nobody measured it. Code, addresses and versions are no figures. Not looked at
are docs/results.md and docs/configuration.md, which programs write, and decisions, which are dated history.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.stored import Stored
from tinyonn.errors import InputError

Results = Mapping[str, Stored]
OTHERS = ("docs/results.md", "docs/configuration.md")  # written by programs
UNITS = r"(?:times|nats|tokens/s|[KMGT]i?B|ms|s|seconds|minutes|hours)\b"
FIGURE = re.compile(rf"(?<![\w.])\d[\d,]*(?:\.\d+(?!\d|\.\d)|(?= ?%)|(?= {UNITS}))")
NAMES = "Python|Ray|Dask|PyTorch|Torch|CUDA|`?bitsandbytes`?|Icechunk|Qwen|GLM|ERNIE|EXAONE"
VERSION = re.compile(rf"(?:{NAMES}) \d+(?:\.\d+)*(?: to \d+(?:\.\d+)*)?")
FENCE = re.compile(
    r"^```.*?^```$|<!--.*?-->|(?:(?<=\n\n) {4}\S.*\n(?: {4}.*\n|\n)*)", re.MULTILINE | re.DOTALL
)
CODE = re.compile(r"`[^`]+`|\]\([^)]*\)|https?://\S+")


@dataclass(frozen=True)
class Claim:
    """A sentence, or a part of one, with places for figures.

    Attributes
    ----------
    page : str
    text : str
        A format; white space is as good as any other.
    numbers : callable
        From the stored results to what stands in the places.
    """

    page: str
    text: str
    numbers: Callable[[Results], tuple[float, ...]]

    def said(self, results: Results) -> str:
        """As it must stand on the page."""
        try:
            return " ".join(self.text.format(*self.numbers(results)).split())
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(
                f"{self.page}: no stored result gives the figures of {self.text[:60]!r} any more ({error!r}); "
                "write the sentence anew, and its claim in benchmarks/claims.py"
            ) from None


def number(text: str) -> float:
    """The first number of a printed cell: ``2.363 ± 0.001``, ``31.5 %``."""
    return float(text.split()[0].rstrip("%").replace(",", ""))


def lost(results: Results) -> tuple[float, ...]:
    """Nats that cutting to 31.5 % loses: default and Wanda with searched shares, and without."""
    quality = results["quality"]
    dense = quality.figures["original"]
    ours, wanda = (number(quality.cell(row, "31.5 %")) for row in (OURS, "Wanda"))
    uniform, one_cut = (
        number(quality.cell(row, "31.5 %", 1))
        for row in ("Wanda, one share in every tensor", "root, one cut of |W · g| through all tensors")
    )
    return ours - dense, one_cut - dense, wanda - dense, uniform - dense


OURS = "root: |W| · √g, in cells with a core: the default then"


def lost_by_a_real_model(results: Results) -> tuple[float, ...]:
    """Nats of SmolLM2 as it is, and with 31.5 % kept by the default, by what was published, and by the one before."""
    chosen, published = results["baselines/balanced"], results["baselines"]
    rows = ("Wanda as published", "SparseGPT as published", FORMER_DEFAULT)
    others = (number(published.cell(row, "31.5 %", 1)) for row in rows)
    return (*(number(chosen.cell(row, "31.5 %")) for row in ("original", DEFAULT_OF_RECORDS)), *others)


def lost_with_most_kept(results: Results) -> tuple[float, ...]:
    """The same with 70 and 50 % kept: by the default and by what was published."""
    chosen, published = results["baselines/balanced"], results["baselines"]
    rows = ("Wanda as published", "SparseGPT as published")
    return tuple(
        number(found.cell(row, share))
        for share in ("70 %", "50 %")
        for found, row in ((chosen, DEFAULT_OF_RECORDS), *((published, row) for row in rows))
    )


DEFAULT_OF_RECORDS = "default: |W| · rms^½ · g^¾ of the records, a core, our shares"
FORMER_DEFAULT = "|W| · √g of the records, a core, our shares: the default then"


def asked(results: Results) -> tuple[float, ...]:
    """SmolLM2: perplexity of WikiText-2 with 31.5 % kept, as it is, trained, and with 50 %; share of PIQA right."""
    tasks = results["tasks/smollm2"]
    columns = ("31.5 % kept", "original", "31.5 %, trained", "50 % kept")
    perplexities = (number(tasks.cell("wikitext2 2048, perplexity", column)) for column in columns)
    return (*perplexities, *(number(tasks.cell("piqa, acc", column)) for column in columns[:2]))


def learned(results: Results) -> tuple[float, ...]:
    """Nats of the dense model before and after training, and perplexity of the routed one to it, by teacher."""
    teacher = results["routing/teacher"]
    rows = ("the dense model as it is", "the dense model after 1,200 steps")
    nats = [number(teacher.cell(row, "nats of the teacher")) for row in rows]
    ratios = [number(teacher.cell(row, "x its perplexity after 1,200 steps")) for row in rows]
    return (*nats, *ratios)


def newest_gpu(results: Results) -> Stored:
    """Of all cards."""
    return max(
        (one for name, one in results.items() if name.startswith("gpu/")),
        key=lambda one: (one.date, one.name),
    )


def weighed(results: Results) -> tuple[float, ...]:
    """GB of a 4B model's linear weights: as saved, in NF4, in BF16, merged for a prompt."""
    weights = results["weights"]
    rows = ("ours, 31.5% kept, as saved", "NF4", "BF16", "ours, merged, 10% on")
    return tuple(number(weights.cell(row, "GB")) for row in rows)


def costs(results: Results) -> tuple[float, ...]:
    """SmolLM2 after a prompt of 256 tokens: tokens a second times dense BF16, merging in ms, and llama.cpp's."""
    efficiency, after_256 = results["efficiency/smollm2"], 1
    columns = ("x BF16", "merging, ms")  # of two columns of that name the first, of tokens a second
    cells = [(row, column) for row in ("ours, 10 experts on", "ours, all experts on") for column in columns]
    cells.append(("llama.cpp Q4", "x BF16"))
    return tuple(number(efficiency.cell(row, column, after_256)) for row, column in cells)


def faster(results: Results) -> tuple[float, ...]:
    """Decoding at 3, 10 and 31 % of the weights, times dense."""
    return tuple(
        number(results["decode"].cell(row, "speed, x dense BF16")) for row in ("3 %", "10 %", "31 %")
    )


CLAIMS = (
    Claim(
        "README.md",
        "By |W| · √g, g the size of its gradient, that loses before any training {:.2f} nats a token with shares of "
        "the tensors that `tinyonn evaluate --allocate` searched, {:.2f} with one cut through all tensors, which costs "
        "no search; Wanda loses {:.2f} with those same shares and {:.2f} with one share in every tensor.",
        lost,
    ),
    Claim(
        "README.md",
        "without training it goes from {:.3f} nats to {:.3f}, Wanda as it was published to {:.3f}, SparseGPT to "
        "{:.3f}, and |W| · √g to {:.3f}",
        lost_by_a_real_model,
    ),
    Claim(
        "README.md",
        "Its perplexity on ten windows of WikiText-2 is then {:.0f} in place of {:.1f} and {:.0f} after forty steps of "
        "training, with 50 % kept {:.0f} without any; of 300 questions of PIQA it has a share of {:.2f} right in place "
        "of {:.2f}, where guessing has half.",
        asked,
    ),
    Claim(
        "README.md",
        "With 70 % kept the loss is {:.3f} (Wanda {:.3f}, SparseGPT {:.3f}), with 50 % {:.3f} ({:.3f}, {:.3f}).",
        lost_with_most_kept,
    ),
    Claim(
        "README.md",
        "the dense model goes from {:.3f} to {:.3f} nats, and the routed one with all experts on has {:.2f} times the "
        "perplexity of that dense model, or {:.2f} if it is taught by it",
        learned,
    ),
    Claim(
        "README.md",
        "as saved, 31.5 % of Qwen1.5-4B's linear weights take {:.2f} GB, all of them in NF4 or Q4_K {:.2f} GB, in BF16 "
        "{:.2f} GB; merged for a prompt with a tenth of the weights on, they take {:.2f} GB",
        weighed,
    ),
    Claim(
        "README.md",
        "with 10 of 100 experts on it writes {:.2f} times as many tokens a second as dense BF16 after {:.0f} ms of "
        "merging for each prompt, with all on {:.2f} times after {:.0f} ms; llama.cpp's Q4 of the same model writes "
        "{:.2f} times as many",
        costs,
    ),
    Claim(
        "README.md",
        "or one apart at {:.0f} weights in a million",
        lambda results: (1e6 * newest_gpu(results).goal("model: share of levels off by one"),),
    ),
    Claim(
        "README.md",
        "a sparse layer decodes {:.1f} times as fast as a dense one at 10 % active",
        lambda results: (newest_gpu(results).goal("decode, 10% active: times dense"),),
    ),
    Claim(
        "docs/stages.md",
        "{:.1f} times as fast as dense BF16 with 3 % of the weights active, {:.1f} times with 10 % and {:.1f} times "
        "with 31 %",
        faster,
    ),
)

# What nobody measured: budgets, limits, settings, formulas. A part of the page's prose each, which must stand there.
CONSTANTS: dict[str, tuple[str, ...]] = {
    "README.md": ("31.5 % are kept", "keeps 31.5 % of", "within 8 GiB for a 4B model as planned"),
    "docs/architecture.md": (
        "2 MiB on a CPU, 256 MiB on a GPU",
        "per input 8 KiB, one tensor at a time",
        "600, 340 and 420 MiB, as `tinyonn plan` prints",
        "about 1.25 per record each",
        "left behind after 8 seconds",
        "notices within 2 seconds",
        "waits 30 seconds",
    ),
    "docs/cluster.md": (
        "Ray refuses more than 512 MiB",
        "256 MiB. Only tokens",
        "Ray takes 30 % of the RAM",
        "looks every 10 seconds",
    ),
    "docs/data.md": ("over 5 % of them end the run",),
    "docs/stages.md": ("Every loss has a 95 % interval",),
    "docs/format.md": ("bands of whole rows, 4 to 8 MiB",),
}


def faults(root: Path, results: Results) -> list[str]:
    """What pages say that no stored result does, a line each.

    Parameters
    ----------
    root : Path
        Of the project, or of a copy of its pages.
    results : mapping of str to Stored
    """
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    names = {path.relative_to(root).as_posix(): path for path in pages}
    return [
        line
        for name, path in names.items()
        if name not in OTHERS
        for line in _faults(name, path.read_text("utf-8"), results)
    ]


def _faults(page: str, text: str, results: Results) -> Iterator[str]:
    """Of one page."""
    prose = " ".join(FENCE.sub("\n", text).split())
    spans: list[tuple[int, int]] = [match.span() for match in VERSION.finditer(prose)]
    for claim in CLAIMS:
        if claim.page != page:
            continue
        said = claim.said(results)
        if said not in prose:
            yield f"{page} does not say what the stored results say: {said}"
        spans += occurrences(said, prose)
    for constant in CONSTANTS.get(page, ()):
        if constant not in prose:
            yield f"{page} does not say {constant!r} any more: take it out of CONSTANTS in benchmarks/claims.py"
        spans += occurrences(constant, prose)
    for start, end in figures_in(prose):
        if not any(first <= start and end <= last for first, last in spans):
            yield (
                f"{page}: {prose[start:end]!r} in {prose[max(0, start - 50) : end + 30]!r} is in no stored result; "
                "store it and write a claim in benchmarks/claims.py, or leave it out"
            )


def figures_in(prose: str) -> list[tuple[int, int]]:
    """Where figures stand in prose, outside of code and addresses."""
    plain = CODE.sub(lambda match: " " * len(match.group()), prose)
    return [match.span() for match in FIGURE.finditer(plain)]


def occurrences(part: str, text: str) -> list[tuple[int, int]]:
    """All spans of a part in a text."""
    return [match.span() for match in re.finditer(re.escape(part), text)]
