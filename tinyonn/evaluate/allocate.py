"""``tinyonn evaluate --allocate``: search how a budget is best spread over the tensors, and keep what was found.

Starts: one cut through all tensors (``global``), what measured curves predict, and the geometric mean of the two, which
is mostly the best: the first sees all weights but no loss, the second the loss but one group of tensors at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyonn.config import Config
from tinyonn.errors import InputError
from tinyonn.evaluate.baselines import kept_by_tensor
from tinyonn.evaluate.demand import allocate_needs, state
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.loss import batches_of
from tinyonn.evaluate.sensitivity import (
    DEPTHS,
    ROUNDS,
    SHARES,
    Curve,
    Found,
    Trials,
    groups_by_depth,
    measure,
    most_passes_of_search,
    passes_of_measuring,
    predicted,
    search,
)
from tinyonn.files import write_json
from tinyonn.places import local_folder
from tinyonn.plan.facts import describe_model
from tinyonn.record.identity import check_base, recorded_corpus
from tinyonn.run import Run, open_run
from tinyonn.score.source import RunSource, digest
from tinyonn.select.select import select, select_bytes
from tinyonn.select.selection import ALLOCATION, SelectOptions, read_allocation
from tinyonn.show.progress import Bar
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_seconds
from tinyonn.store.lock import evaluating

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AllocateOptions:
    """What is searched.

    Attributes
    ----------
    budgets : tuple of float
        Shares of the linear weights.
    samples : int
        Recorded samples, in turns from the slices; the held-out ones are not seen.
    score : str
        That decides which of a tensor's weights are kept.
    depths : int
        Groups of layers.
    rounds : int
        Of the coordinate descent at each budget; 0 takes the best start.
    selection : SelectOptions
        Its seed counts.
    """

    budgets: tuple[float, ...] = (0.315,)
    samples: int = 56
    score: str = "wg"
    depths: int = DEPTHS
    rounds: int = ROUNDS
    selection: SelectOptions = field(default_factory=SelectOptions)


@dataclass(frozen=True)
class AllocateReport:
    """What a call of `allocate_run` found: by budget, shares by tensor and the loss on the recorded samples."""

    location: str
    found: dict[float, Found]
    dense: float
    samples: int
    passes: int
    allocate_seconds: float
    fresh: bool
    planned_rss_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "found": {f"{b:g}": asdict(found) for b, found in self.found.items()}}

    def table(self) -> Sheet:
        """For people: shares by kind, the loss before and after the search."""
        what = f"{self.passes:,} passes over {self.samples} recorded samples"
        note = f"dense {self.dense:.4f} nats; " + (
            f"{what} in {format_seconds(self.allocate_seconds)}"
            if self.fresh
            else "nothing to do: searched already"
        )
        kinds = list(dict.fromkeys(n.split(".")[-2] for found in self.found.values() for n in found.shares))
        sheet = Sheet(f"allocation of {whole(self.location)}", [note])
        sheet.number("budget", "start", "searched", *kinds)
        for budget, found in self.found.items():
            spans = []
            for kind in kinds:
                its = [share for name, share in found.shares.items() if name.split(".")[-2] == kind]
                spans.append(f"{min(its):.0%}–{max(its):.0%}")
            sheet.add(f"{budget:.1%}", f"{found.start:.4f}", f"{found.loss:.4f}", *spans)
        return sheet


def allocate_run(
    location: str,
    config: Config,
    options: AllocateOptions,
    tell: Callable[[str], None] = lambda line: None,
) -> AllocateReport:
    """Search the allocation of a scored run for some budgets; what was measured and found before is taken over.

    Parameters
    ----------
    location : str
    config : Config
        As the run was recorded.
    options : AllocateOptions
    tell : callable
        Called with a line of text: first how many passes this takes, then what is found.

    Raises
    ------
    InputError
        The run is not scored, the model is not the recorded one, or a budget is no share.
    CapacityError
        It does not fit.
    StoreBusyError
        Another process changes or evaluates the run.
    """
    wrong = [budget for budget in options.budgets if not 0 < budget < 1]
    if wrong:
        raise InputError(f"a budget of {wrong[0]:g} is no share of the linear weights; give one in (0, 1)")
    run = open_run(location)
    with evaluating(location):
        return _allocated(run, location, config, options, tell)


def _allocated(
    run: Run, location: str, config: Config, options: AllocateOptions, tell: Callable[[str], None]
) -> AllocateReport:
    started = time.monotonic()
    folder = local_folder(location)
    fingerprint = check_base(run.store, location, config.model)
    scored = run.store.reader().stage("rows")
    if scored is None:
        raise InputError(f"{location} is not scored yet; run `tinyonn score` first")
    corpus = recorded_corpus(folder, config, run.manifest)
    samples = corpus.calibration(options.samples)
    made_of = [fingerprint, scored, corpus.fingerprint, options.samples, options.score, options.depths]
    kept = _Kept(folder / ALLOCATION, digest(made_of), digest(scored))
    wanted = [b for b in options.budgets if (b, options.rounds) not in kept.found]
    passes, planned = 0, 0
    if wanted:
        parameters, model = describe_model(config.model)
        plain = RunSource(run, None, frozenset(), labels=False)
        needs = allocate_needs(parameters, model, corpus.longest, select_bytes(plain))
        planned = state("searching the allocation", config.model, needs)
        dense = DenseWeights(config.model)
        source = RunSource(run, dense.rows, dense.transposed, labels=False)
        trials = Trials(dense, source, options.score, batches_of(samples))
        groups = groups_by_depth(dense.parameters, options.depths)
        measuring = 0 if kept.curves else passes_of_measuring(groups)
        most = measuring + len(wanted) * most_passes_of_search(groups, 3, options.rounds)
        tell(f"{len(groups)} groups of tensors: at most {most} passes over {len(samples)} samples")
        with Bar("searching", most, "passes") as bar:
            if not kept.curves:
                kept.put_curves(measure(trials, groups, SHARES, bar.add))
            for budget in wanted:
                by_score = _global_shares(source, options.selection, budget)
                by_loss = predicted(kept.curves, trials.sizes, budget)
                between = {name: (by_score[name] * by_loss[name]) ** 0.5 for name in by_score}
                starts = [by_score, by_loss, between]
                found = search(trials, groups, starts, budget, options.rounds, bar.add)
                kept.put(budget, options.rounds, found)
                tell(f"{budget:.1%}: {found.start:.4f} → {found.loss:.4f} nats, {found.passes} passes")
        passes = trials.passes
    return AllocateReport(
        location,
        {budget: kept.found[budget, options.rounds] for budget in options.budgets},
        kept.curves[0].losses[-1],
        len(samples),
        passes,
        time.monotonic() - started,
        bool(wanted),
        planned,
    )


def _global_shares(source: RunSource, selection: SelectOptions, budget: float) -> Mapping[str, float]:
    options = replace(selection, allocation="global", shares={}, budget=budget, core=0.0)
    sizes = {parameter.name: parameter.size for parameter in source.parameters}
    kept = kept_by_tensor(select(source, options))
    return {name: max(count, 1) / sizes[name] for name, count in kept.items()}


class _Kept:
    """Curves and what was found, on the disk; dropped once they were made of something else."""

    def __init__(self, path: Path, made_of: str, scored: str) -> None:
        self.path, self._made_of, self._scored = path, made_of, scored
        tree = read_allocation(path) if path.exists() else {}
        if tree.get("made_of") != made_of:
            tree = {}
        self.curves = [
            Curve(tuple(c["tensors"]), tuple(c["shares"]), tuple(c["losses"])) for c in tree.get("curves", [])
        ]
        self.found = {
            (item["budget"], item["rounds"]): Found(**item["found"]) for item in tree.get("found", [])
        }

    def put_curves(self, curves: list[Curve]) -> None:
        self.curves = curves
        self._write()

    def put(self, budget: float, rounds: int, found: Found) -> None:
        self.found[budget, rounds] = found
        self._write()

    def _write(self) -> None:
        items = [{"budget": b, "rounds": r, "found": asdict(found)} for (b, r), found in self.found.items()]
        curves = [asdict(curve) for curve in self.curves]
        tree = {"made_of": self._made_of, "scored": self._scored, "curves": curves, "found": items}
        write_json(self.path, tree)
