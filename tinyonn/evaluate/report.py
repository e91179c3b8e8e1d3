"""Evaluated lines, kept in a file so that a killed evaluation goes on; a table, JSON values and a picture of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tinyonn.checks import UNIFORM
from tinyonn.errors import InputError
from tinyonn.evaluate.intervals import Interval, interval_of, resampled
from tinyonn.evaluate.loss import Losses
from tinyonn.files import damaged, read_derived, read_json, write_json
from tinyonn.score.source import digest
from tinyonn.show.escape import picture
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_seconds

VERSION = 2  # 1 had no documents
REMEDY = "delete it and evaluate again"


@dataclass(frozen=True)
class Line:
    """One evaluated model.

    Attributes
    ----------
    method : str
        ``original``, ``dense``, or what chose (and updated) the weights.
    share : float
        Of the linear weights that are kept.
    weights : int
        How many those are.
    losses : Losses
    """

    method: str
    share: float
    weights: int
    losses: Losses

    def tree(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "mean": self.losses.mean, "perplexity": self.losses.perplexity}

    def brief(self) -> dict[str, Any]:
        """The same without the documents' losses."""
        tree = self.tree()
        del tree["losses"]["documents"]
        return tree

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Line:
        """From `tree`."""
        return cls(tree["method"], tree["share"], tree["weights"], Losses(**tree["losses"]))


@dataclass(frozen=True)
class Spread:
    """How sure a line is.

    Attributes
    ----------
    interval : Interval or None
        Of its mean loss; None where it is not known.
    behind : float or None
        Its mean loss less the default's of the same share, nats.
    behind_interval : Interval or None
        Of that, paired by documents.
    """

    interval: Interval | None = None
    behind: float | None = None
    behind_interval: Interval | None = None

    def tree(self) -> dict[str, Any]:
        """JSON values; an interval as its two ends."""
        return {
            "interval": self.interval and self.interval.tree(),
            "behind": self.behind,
            "behind_interval": self.behind_interval and self.behind_interval.tree(),
        }


class Results:
    """A file of lines, JSON objects, by a digest of what decides them.

    Parameters
    ----------
    path : Path
    version : int
        Of the lines; a file of another one is begun anew.
    check : callable
        Raises ValueError, KeyError or TypeError for what is no such line.
    """

    def __init__(self, path: Path, version: int, check: Callable[[dict[str, Any]], object]) -> None:
        self.path, self.version = path, version
        self._lines: dict[str, dict[str, Any]] = {}
        if path.exists():
            tree = read_json(path, REMEDY)
            try:
                self._lines = dict(tree["lines"]) if tree["version"] == version else {}
                for line in self._lines.values():
                    check(line)
            except (ValueError, KeyError, TypeError) as error:
                raise damaged(path, repr(error), REMEDY) from None

    def get(self, decided_by: Any) -> dict[str, Any] | None:
        """The line that was measured from the same, if there is one."""
        return self._lines.get(digest(decided_by))

    def put(self, decided_by: Any, line: dict[str, Any]) -> None:
        """Keep a line: on the disk when this returns."""
        self._lines[digest(decided_by)] = json.loads(json.dumps(line))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"version": self.version, "lines": self._lines})


CARDS = "cards.json"  # in the run's evaluate/: figures for model cards
ORIGINAL, DENSE, DEFAULT = "original", "dense", "default"
PNG_DPI = 130


@dataclass(frozen=True)
class EvaluateReport:
    """What a call of `evaluate_run` found.

    Attributes
    ----------
    lines : tuple of Line
        ``original`` and ``dense`` first, then methods and budgets as given.
    samples, tokens : int
        Held-out samples of the split, and their labelled tokens.
    evaluated : int
        Lines that were not there from an earlier call.
    plot : str or None
        Path of the picture.
    split : str
        Of the held-out samples.
    calibration : int
        Recorded samples that methods which need some took; 0 where none did.
    """

    location: str
    lines: tuple[Line, ...]
    samples: int
    tokens: int
    evaluated: int
    evaluate_seconds: float
    plot: str | None = None
    planned_rss_bytes: int = 0
    split: str = "test"
    calibration: int = 0

    @cached_property
    def spreads(self) -> list[Spread]:
        """Of every line: its 95 % interval, its difference to the default of the same share, and that one's."""
        means = resampled([line.losses for line in self.lines])
        if means is None:
            return [Spread() for _ in self.lines]
        defaults = {line.share: n for n, line in enumerate(self.lines) if line.method == DEFAULT}
        found = []
        for number, line in enumerate(self.lines):
            other = defaults.get(line.share)
            if other is None or line.method in (ORIGINAL, DENSE):
                found.append(Spread(interval_of(means[number])))
                continue
            behind = line.losses.mean - self.lines[other].losses.mean
            found.append(
                Spread(interval_of(means[number]), behind, interval_of(means[number] - means[other]))
            )
        return found

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        pairs = zip(self.lines, self.spreads, strict=True)
        return {
            "location": self.location,
            "split": self.split,
            "samples": self.samples,
            "tokens": self.tokens,
            "calibration": self.calibration,
            "evaluated": self.evaluated,
            "evaluate_seconds": self.evaluate_seconds,
            "lines": [{**line.brief(), **spread.tree()} for line, spread in pairs],
            "plot": self.plot,
            "planned_rss_bytes": self.planned_rss_bytes,
        }

    def table(self) -> Sheet:
        """For people: a row per method, a column per kept share; mean loss in nats, perplexity and intervals."""
        dense = {line.method: line for line in self.lines if line.method in (ORIGINAL, DENSE)}
        cut = [line for line in self.lines if line.method not in dense]
        spreads = {(line.method, line.share): s for line, s in zip(self.lines, self.spreads, strict=True)}
        shares = sorted({line.share for line in cut}, reverse=True)
        sheet = Sheet(f"evaluated {whole(self.location)}", self._notes(dense)).text(
            "kept of the linear weights"
        )
        sheet.number(*(f"{share:.3g}" if share < 0.001 else f"{share:.1%}" for share in shares))
        for method in dict.fromkeys(line.method for line in cut):
            found = {line.share: line for line in cut if line.method == method}
            sheet.add(
                whole(method),
                *(cell_of(found.get(share), spreads.get((method, share))) for share in shares),
            )
        return sheet

    def _notes(self, dense: dict[str, Line]) -> list[str]:
        found = [
            f"{what}: {line.losses.mean:.4f} nats, perplexity {line.losses.perplexity:,.2f}"
            for what, line in (
                ("original", dense.get(ORIGINAL)),
                ("dense, as recorded", dense.get(DENSE)),
            )
            if line is not None
        ]
        slices = len(self.lines[0].losses.by_slice) if self.lines else 0
        found.append(
            f"nats per held-out token (perplexity), mean over {slices} slices; "
            f"{self.samples:,} samples of the split {self.split}, {self.tokens:,} labelled tokens"
        )
        if any(spread.interval for spread in self.spreads):
            found.append(
                "[ ]: 95 % of the resamples of these documents; Δ: from the default, on the same documents"
            )
        if any(line.method.endswith(UNIFORM) for line in self.lines):
            found.append(
                f"{UNIFORM}: the same share in every tensor; the others keep of each tensor what default does"
            )
        if self.calibration:
            found.append(f"methods that need samples took {self.calibration:,} recorded ones")
        what = (
            f"{self.evaluated} lines in {format_seconds(self.evaluate_seconds)}"
            if self.evaluated
            else "nothing to do: evaluated already"
        )
        return [*found, what, *([f"picture: {whole(self.plot)}"] if self.plot else [])]


def cell_of(line: Line | None, spread: Spread | None = None) -> str:
    """Loss and perplexity of a line, its interval and how far it is from the default, for a table."""
    if line is None:
        return ""
    perplexity = line.losses.perplexity
    text = f"{line.losses.mean:.4f} ({perplexity:,.2f})" if perplexity < 1e5 else f"{line.losses.mean:.4f}"
    if spread is not None and spread.interval is not None:
        text += f"\n[{spread.interval.low:.3f}, {spread.interval.high:.3f}]"
    if spread is not None and spread.behind and spread.behind_interval is not None:
        low, high = spread.behind_interval.low, spread.behind_interval.high
        text += f"\nΔ {spread.behind:+.3f} [{low:+.3f}, {high:+.3f}]"
    return text


def plot_lines(lines: Sequence[Line], path: Path) -> None:
    """Draw mean loss against kept share, one curve per method, the dense loss as a level."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs the package matplotlib: pip install 'tiny-onn[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    methods = dict.fromkeys(line.method for line in lines if line.method not in (ORIGINAL, DENSE))
    for number, method in enumerate(methods):
        points = sorted((100 * line.share, line.losses.mean) for line in lines if line.method == method)
        emphasis = {"linewidth": 2.5, "color": "black"} if method == "default" else {"linewidth": 1.2}
        axes.plot(
            *zip(*points, strict=True),
            label=picture(method),
            marker="osD^v<>pX*hP"[number % 12],
            markersize=4,
            **emphasis,
        )
    for line in lines:
        if line.method == DENSE:
            axes.axhline(line.losses.mean, color="grey", linestyle=":", label="dense")
    axes.set_xscale("log")
    axes.set_yscale("log")  # else random's curve takes the picture
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    ticks = sorted({100 * line.share for line in lines})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("kept linear weights, %")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=PNG_DPI)
    pyplot.close(figure)


def card_figures(folder: Path, selection: Any) -> dict[str, dict[str, float]] | None:
    """Losses for a model's card, by line and slice; None if this selection was not evaluated.

    Parameters
    ----------
    folder : Path
        Of the run.
    selection : dict
        As in the assembled model's configuration.
    """
    path = folder / "evaluate" / CARDS
    try:
        earlier = json.loads(path.read_text("utf-8"))  # an earlier version wrote the list alone
    except (OSError, ValueError):
        earlier = None  # not there, or damaged, of which `read_derived` warns
    try:
        cards = earlier if isinstance(earlier, list) else (read_derived(path) or {}).get("cards", [])
        lines = next((card["lines"] for card in cards if card["selection"] == selection), None)
    except (KeyError, TypeError):
        return None
    if lines is None:
        return None
    names = {ORIGINAL: "dense, BF16", DENSE: "dense, as recorded"}
    return {
        names.get(line["method"], f"this model ({line['share']:.1%} kept)"): {
            **line["losses"]["by_slice"],
            "mean": line["mean"],
        }
        for line in lines
    }
