"""``tinyonn evaluate``: held-out loss of the dense model and of what each way to choose weights leaves of it.

Data flow: a split of the held-out corpus → batches; run and base model → a selection for every method and budget, all
with the same allocation across tensors → the dense model with these weights cut, evaluated → one line, on the disk at
once. A line whose inputs have not changed is not evaluated again, so a killed call goes on and another method costs
only itself.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn.config import PRESETS, Config, DataConfig, EvaluateConfig
from tinyonn.corpus.corpus import Corpus, prepare_corpus
from tinyonn.corpus.file import Sample
from tinyonn.dense.load import load_model, load_tokenizer
from tinyonn.errors import InputError
from tinyonn.evaluate.baselines import Recipe, counts_of, cut, recipe_of
from tinyonn.evaluate.demand import Work, evaluate_needs, state
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.loss import Batch, Losses, batches_of, losses
from tinyonn.evaluate.report import (
    CARDS,
    DENSE,
    ORIGINAL,
    VERSION,
    EvaluateReport,
    Line,
    Results,
    plot_lines,
)
from tinyonn.files import write_json
from tinyonn.places import local_folder
from tinyonn.plan.facts import describe_model
from tinyonn.record.identity import check_base, recorded_corpus
from tinyonn.run import Run, open_run
from tinyonn.score.scores import name_of
from tinyonn.score.source import RunSource, digest, score_of
from tinyonn.select.select import select_bytes
from tinyonn.select.selection import SelectOptions, select_options, stored_shares
from tinyonn.show.progress import Bar
from tinyonn.store.lock import evaluating

LOG = logging.getLogger(__name__)
SAMPLES_EFFORT = 2.0  # of a line that needs calibration samples, in those of one that only cuts
DEFAULT = EvaluateConfig()
HELD_OUT = "heldout"  # split of the reference corpus
ALL = "all"
SPLITS = {"development": 4, "test": 2, "final": 4, ALL: 1}  # of how many held-out documents it has one
SCRATCH = "gradients."  # begin of a folder's name in the run's evaluate/


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated.

    Attributes
    ----------
    methods : tuple of str
        ``default``, scores, ``sparsegpt``, and ``default+update``; see `tinyonn.evaluate.baselines`.
    budgets : tuple of float
        As ``SelectOptions.budget``.
    data : DataConfig or None
        Held-out data; None takes the held-out split of the reference corpus, if that is what was recorded.
    samples : int or None
        Held-out samples, evenly over the slices, of all splits together; None takes all.
    split : str
        Which of them are measured: ``development`` (for choices), ``test``, ``final`` (once per release), or ``all``;
        see `split_of`.
    calibration : int
        Recorded samples for methods that need some, in turns from the slices.
    selection : SelectOptions
        What ``default`` is, and the allocation of all methods.
    shares : mapping
        By budget: shares by tensor, in place of the selection's allocation.
    plot : bool
        Draw ``loss.png`` in the run's folder.
    """

    methods: tuple[str, ...] = DEFAULT.methods
    budgets: tuple[float, ...] = DEFAULT.budgets
    data: DataConfig | None = None
    samples: int | None = DEFAULT.samples
    split: str = "test"
    calibration: int = DEFAULT.calibration
    selection: SelectOptions = field(default_factory=SelectOptions)
    shares: Mapping[float, Mapping[str, float]] = field(default_factory=dict)
    plot: bool = False


def evaluate_options(
    location: str, config: Config, plot: bool = False, split: str = "test"
) -> EvaluateOptions:
    """What the configuration asks for, with about so many samples of the split; budgets whose allocation was searched
    take what was found.
    """
    wanted = config.evaluate
    scored = open_run(location).store.reader().stage("rows")
    searched = config.experts.allocation == "auto" and scored is not None
    score = name_of(PRESETS["balanced"] if scored is None else score_of(scored, location))
    return EvaluateOptions(
        methods=wanted.methods,
        budgets=wanted.budgets,
        data=wanted.data,
        samples=None if wanted.samples is None else wanted.samples * parts_of(split),
        split=split,
        calibration=wanted.calibration,
        selection=select_options(config.experts, score),
        shares=stored_shares(local_folder(location), scored) if searched else {},
        plot=plot,
    )


def evaluate_run(
    location: str,
    config: Config,
    options: EvaluateOptions,
    tell: Callable[[str], None] = lambda line: None,
) -> EvaluateReport:
    """Evaluate a scored run; may be killed at any moment and called again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : Config
        As the run was recorded.
    options : EvaluateOptions
    tell : callable
        Called with a line of text as each model is evaluated.

    Raises
    ------
    InputError
        The run is not scored; the model is not the recorded one; no held-out data; an unknown method or a budget out of
        range.
    CapacityError
        It does not fit.
    StoreBusyError
        Another process changes or evaluates the run.
    """
    run = open_run(location)
    with evaluating(location):
        return _Evaluation(run, location, config, options, tell).carry_out()


def held_out_corpus(config: Config, options: EvaluateOptions, folder: Path) -> Corpus:
    """Tokenise the held-out data, or open what was tokenised before.

    Raises
    ------
    InputError
        There are none, or they are what was recorded.
    """
    data = options.data
    if data is None:
        if config.data.path != "reference" or config.data.split == HELD_OUT or config.data.sources:
            raise InputError(
                f"there are no held-out data for data.path = {config.data.told!r}; give some as evaluate.data, "
                "for instance evaluate: {data: {path: heldout.jsonl}}"
            )
        data = config.data.model_copy(update={"split": HELD_OUT})
    if options.samples is not None:
        data = data.model_copy(update={"samples": options.samples})
    recorded = {(origin.path, origin.name, origin.split) for origin in config.data.origins()}
    for origin in data.origins():
        if (origin.path, origin.name, origin.split) in recorded:
            raise InputError(
                f"evaluate.data is what was recorded ({origin.path}, split {origin.split}); "
                "give data that were held out"
            )
    settings = config.model_copy(update={"data": data})
    return prepare_corpus(settings, load_tokenizer(config.model), folder / "heldout.arrow")


def samples_of(corpus: Corpus, split: str = ALL) -> list[Sample]:
    """The samples of a corpus, or those that lie in a split.

    Raises
    ------
    InputError
        There is no such split, or none lies in it.
    """
    parts_of(split)
    every = [sample for name, count in corpus.slices.items() for sample in corpus.range(name, 0, count)]
    samples = [sample for sample in every if split in (ALL, split_of(sample))]
    if not samples:
        raise InputError(
            f"none of the {len(every)} held-out samples lies in the {split} split; give more of them, or --split {ALL}"
        )
    return samples


def split_of(sample: Sample) -> str:
    """The split of a held-out document, from a hash of its tokens: the same wherever and among whatever it lies."""
    first = hashlib.blake2b(sample.input_ids.astype("<i4").tobytes(), digest_size=1).digest()[0]
    return ("development", "test", "test", "final")[first % 4]


def parts_of(split: str) -> int:
    """Of how many held-out documents a split has one, about.

    Raises
    ------
    InputError
        There is no such split.
    """
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    return SPLITS[split]


def effort_of(recipe: Recipe) -> float:
    """Of a line, in those of one that only cuts."""
    return SAMPLES_EFFORT if recipe.samples(1) else 1.0


class _Evaluation:
    """One call, line by line."""

    def __init__(
        self, run: Run, location: str, config: Config, options: EvaluateOptions, tell: Callable[[str], None]
    ) -> None:
        self.run, self.location, self.config, self.options, self.tell = run, location, config, options, tell
        self.folder = local_folder(location)
        self.corpus = held_out_corpus(config, options, self.folder)
        self.fingerprint = check_base(run.store, location, config.model)
        self.results = Results(self.folder / "evaluate" / "lines.json", VERSION, Line.from_tree)
        self.evaluated = 0
        self.counts: dict[str, Mapping[str, int]] = {}
        self.samples = samples_of(self.corpus, options.split)
        self.batches: list[Batch] = batches_of(self.samples)
        model = {"model": self.fingerprint, **config.model.model_dump(include={"quantization", "dtype"})}
        whole = self.corpus.fingerprint
        heldout = whole if options.split == ALL else [whole, options.split]
        self.common = {"heldout": heldout, "model": model}
        self.recipes = [
            recipe_of(method, options.selection, budget, options.shares.get(budget, {}))
            for budget in options.budgets
            for method in options.methods
        ]

    @cached_property
    def dense(self) -> DenseWeights:
        """Loaded once something is to be evaluated."""
        return DenseWeights(self.config.model)

    @cached_property
    def source(self) -> RunSource:
        """Without labels: which expert a weight is in changes nothing while all are on."""
        return RunSource(self.run, self.rows, self.transposed, labels=False)

    @property
    def transposed(self) -> frozenset[str]:
        """Of the loaded model."""
        return self.dense.transposed

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows of the loaded model's matrix."""
        return self.dense.rows(name, first, last)

    @cached_property
    def recorded(self) -> Corpus:
        """What calibration samples are from."""
        return recorded_corpus(self.folder, self.config, self.run.manifest)

    def calibration(self, recipe: Recipe) -> list[Sample]:
        """Recorded samples that a recipe takes."""
        return self.recorded.calibration(recipe.samples(self.options.calibration))

    def _state(self) -> int:
        """What it needs of RAM, or a refusal."""
        parameters, model = describe_model(self.config.model)
        source = RunSource(self.run, None, frozenset(), labels=False)
        select = select_bytes(source) if self.recipes else 0
        needs = evaluate_needs(parameters, model, self.corpus.longest, select, self._work(model.quantization))
        return state("evaluating", self.config.model, needs)

    def _work(self, quantization: str) -> Work:
        calibration = self.options.calibration
        calibrated = [r for r in self.recipes if r.samples(1)]
        layerwise = [r for r in calibrated if r.updates or not r.differentiates]
        return Work(
            max((r.samples(calibration) for r in layerwise), default=0),
            max((r.samples(calibration) for r in layerwise if r.updates), default=0),
            max((r.samples(calibration) for r in calibrated if r.differentiates), default=0),
            self.recorded.longest if calibrated else 0,
            quantization != "none",
        )

    def carry_out(self) -> EvaluateReport:
        """All lines, then the picture and the report."""
        self.planned = self._state()
        count = 2 + len(self.recipes)
        own = self.folder / "evaluate"
        own.mkdir(parents=True, exist_ok=True)
        for left in own.glob(f"{SCRATCH}*"):  # of a call that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=own) as scratch:
            self.scratch = Path(scratch)
            return self._with_bar(count)

    def _with_bar(self, count: int) -> EvaluateReport:
        with Bar("evaluating", self._effort(count), "lines", count=count) as self.bar:
            return self._evaluate()

    def _effort(self, lines: int) -> float:
        """Of so many lines, in those of one that only cuts."""
        return lines + sum(effort_of(recipe) - 1 for recipe in self.recipes)

    def _evaluate(self) -> EvaluateReport:
        started = time.monotonic()
        lines = [*self._whole(), *(self._line(recipe) for recipe in self.recipes)]
        self._remember(lines)
        plot = self.folder / "evaluate" / "loss.png" if self.options.plot else None
        if plot is not None:
            plot_lines(lines, plot)
        tokens = sum(lines[0].losses.tokens.values())
        calibrated = [recipe for recipe in self.recipes if recipe.samples(1) and not recipe.differentiates]
        return EvaluateReport(
            *(self.location, tuple(lines), len(self.samples), tokens, self.evaluated),
            *(time.monotonic() - started, None if plot is None else str(plot), self.planned),
            split=self.options.split,
            calibration=max((len(self.calibration(recipe)) for recipe in calibrated), default=0),
        )

    def _remember(self, lines: list[Line]) -> None:
        """Keep what an exported model's card shows: the losses of each default selection beside the dense model's."""
        whole = [line for line in lines if line.method in (ORIGINAL, DENSE)]
        cards = [
            {"selection": recipe.options.tree(), "lines": [line.brief() for line in (*whole, kept)]}
            for recipe, kept in zip(self.recipes, lines[len(whole) :], strict=False)
            if recipe.method == "default"
        ]
        path = self.folder / "evaluate" / CARDS
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"cards": cards})

    def _whole(self) -> Iterator[Line]:
        """The model as it was published, and as it was recorded."""
        model = self.config.model

        def original() -> Losses:
            if model.quantization == "none":
                return losses(self.dense.model, self.batches)
            plain = load_model(model.model_copy(update={"quantization": "none"}))
            found = losses(plain.model, self.batches)
            del plain
            gc.collect()
            return found

        total = sum(p.size for p in self.run.parameters if p.kind == "linear" and p.layer is not None)
        yield self._kept([ORIGINAL], lambda: Line(ORIGINAL, 1.0, total, original()))
        yield self._kept([DENSE], lambda: Line(DENSE, 1.0, total, losses(self.dense.model, self.batches)))

    def _line(self, recipe: Recipe) -> Line:
        key: list[Any] = [recipe.method, recipe.options.tree(), self._statistics()]
        samples = self.calibration(recipe) if recipe.samples(1) else []
        if samples:
            key.append([sample.index for sample in samples])

        def evaluate() -> Line:
            counts = self._counts(self.source, recipe.options)
            with cut(self.dense, recipe, self.source, counts, samples, self.scratch) as kept:
                found = losses(self.dense.model, self.batches)
            return Line(recipe.method, _share(recipe.options.budget, kept, self.source), kept, found)

        return self._kept(key, evaluate, effort_of(recipe))

    def _counts(self, source: RunSource, options: SelectOptions) -> Mapping[str, int]:
        """Weights of every tensor: the allocation is found once for all methods that share it."""
        key = digest([options.budget, options.allocation, dict(options.shares)])
        if key not in self.counts:
            self.counts[key] = counts_of(source, options)
        return self.counts[key]

    def _statistics(self) -> Any:
        """What the run's part in a line is."""
        scored = self.run.store.reader().stage("rows")
        if scored is None:
            raise InputError(f"{self.location} is not scored yet; run `tinyonn score` first")
        return [scored, None]

    def _kept(self, key: list[Any], evaluate: Callable[[], Line], effort: float = 1.0) -> Line:
        decided_by = [*key, self.common]
        tree = self.results.get(decided_by)
        line = None if tree is None else Line.from_tree(tree)
        if line is None:
            started = time.monotonic()
            line = evaluate()
            self.results.put(decided_by, line.tree())
            self.evaluated += 1
            text = f"{line.method} at {line.share:.1%}: {line.losses.mean:.4f} nats"
            LOG.debug("%s in %.1f s", text, time.monotonic() - started)
            self.tell(text)
            self.bar.add(effort, 1)
        else:
            self.bar.skip(effort)
        return line


def _share(budget: float, kept: int, source: Any) -> float:
    if budget <= 1:
        return float(budget)
    total = sum(p.size for p in source.parameters if p.kind == "linear" and p.layer is not None)
    return float(kept / total)
