"""``tinyonn tune``: search the training's options with Optuna, over short runs.

Every trial is a training of its own, of a few steps, from the same assembled model over the same batches. Objective:
cross entropy per counted token, mean over the last third of the steps, each taken *before* the step has learnt from the
batch. As long as no sample comes twice that is a loss on unseen text, whatever weights and temperatures a trial gives
its losses. Trials that stand badly are given up; the study lies in ``<run>/tune/train.log`` and goes on.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyonn.config import Config
from tinyonn.corpus.file import Corpus
from tinyonn.errors import InputError
from tinyonn.files import read_json, write_json
from tinyonn.places import local_folder
from tinyonn.show.progress import Bar
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_seconds
from tinyonn.store.lock import RunLock
from tinyonn.train.checkpoint import without_removed
from tinyonn.train.options import option_of, with_options
from tinyonn.train.plan import TrainStageOptions, make_spec, plan_disk, plan_training
from tinyonn.train.search import Found, Range, Report, SearchOptions, begin, found, open_study, search
from tinyonn.train.spec import Spec
from tinyonn.train.trainer import TrainingDivergedError
from tinyonn.train.worker import build_trainer
from tinyonn.workers.ray import Places, take_places

STUDY = "train"
JOURNAL = "train.log"
REPORTS = 10  # looks at a trial
LAST = 3  # the last third of the steps counts
RANGES: dict[str, Range] = {
    "warm_start_lr": Range(3e-4, 3e-2, log=True),
    "optimizers.experts_lr": Range(1e-4, 1e-2, log=True),
    "weights.ce": Range(0.01, 1.0, log=True),
    "weights.hidden": Range(0.01, 1.0, log=True),
}

Tell = Callable[[str], None]


@dataclass(frozen=True)
class TuneOptions:
    """A call of `tune_train`.

    Attributes
    ----------
    trials : int
        Of the study in all.
    steps : int
        Of a trial.
    ranges : mapping of str to Range
        By dotted names of `TrainOptions`.
    workers : int or None
        Trials at a time; None is one in this process, or on a cluster as many as it holds.
    seed : int
    """

    trials: int = 20
    steps: int = 60
    ranges: Mapping[str, Range] = field(default_factory=lambda: dict(RANGES))
    workers: int | None = None
    seed: int = 0


def tune_train(
    location: str,
    config: Config,
    train: TrainStageOptions,
    options: TuneOptions = TuneOptions(),
    tell: Tell = lambda line: None,
) -> TuneReport:
    """Search until the study has so many trials; may be killed at any moment and called again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : Config
    train : TrainStageOptions
        What is varied; its options are the first trial.
    options : TuneOptions
    tell : callable
        Gets a line for each trial.

    Raises
    ------
    InputError
        Optuna is not installed; an option that there is not; the study was begun with other ones; as of `train_run`.
    CapacityError
        It does not fit.
    StoreBusyError
        Another process tunes the run, or changes it.
    """
    started = time.monotonic()
    folder = (local_folder(location) / "tune").absolute()
    first = {name: float(option_of(train.train, name)) for name in options.ranges}
    with RunLock(local_folder(location), shared=True, what="tune"), RunLock(folder, what="tune"):
        short = replace(
            train.train, steps=options.steps, checkpoint_every=options.steps + train.train.warm_start
        )
        base = replace(train, train=short, folder=folder / "trials" / "0", output=folder / "trials" / "model")
        spec = make_spec(location, config, base)
        _check_study(folder, spec, options)
        samples = len(Corpus(Path(spec.corpus)))
        if options.steps * short.batch > samples:
            tell(
                f"{options.steps} steps of {short.batch} samples go over {samples} samples more than once, so that the "
                "loss is not on unseen text only; fewer steps are fairer"
            )
        study = open_study(folder / JOURNAL, STUDY, _search(options))
        begin(study, first, options.ranges)
        with ExitStack() as stack:
            asked = train.address, options.workers, train.threads
            places = take_places(*asked, config, stack, options.trials, lambda: "the trials that ended stay")
            spec = replace(spec, device=places.device, threads=places.threads)
            plan_training(spec, places, train.memory)
            plan_disk(spec, model=False, checkpoints=places.workers)  # one of each trial, removed at its end
            if places.address is None and places.workers == 1:
                take_part(spec, options, str(folder), 0, tell)
            else:
                _in_tasks(spec, options, folder, places)
        shutil.rmtree(folder / "trials", ignore_errors=True)
        best = found(study, str(folder / JOURNAL))
    return _report(location, study, best, options, first, time.monotonic() - started)


def take_part(
    spec: Spec, options: TuneOptions, folder: str, part: int, tell: Tell = lambda line: None
) -> None:
    """Run trials until the study has enough; one of several that do."""
    study = open_study(Path(folder) / JOURNAL, STUDY, _search(options), part)
    finished = len([trial for trial in study.trials if trial.state.is_finished()])
    bar = Bar("tuning", max(0, options.trials - finished), "trials", count=options.trials, before=finished)

    def objective(values: Mapping[str, float], number: int, report: Report) -> float:
        place = Path(folder) / "trials" / str(number)
        shutil.rmtree(place, ignore_errors=True)
        trial = replace(spec, train=with_options(spec.train, values), folder=str(place))
        try:
            loss = short_run(trial, report)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        tell(f"trial {number}: {f'{loss:.4f} nats' if math.isfinite(loss) else 'given up'} ({shown})")
        bar.add()
        return loss

    with bar:
        search(study, options.ranges, objective, options.trials)


class _GivenUp(Exception):
    """Ends a run from within."""


def short_run(spec: Spec, report: Report) -> float:
    """Train and give the objective; infinite if the trial was given up or a loss was not a number."""
    trainer = build_trainer(spec)
    losses: list[float] = []
    steps = spec.train.steps
    every = max(1, steps // REPORTS)

    def observe(line: Mapping[str, Any]) -> None:
        if line["values"]["stage"] == 0:  # the warm start
            return
        losses.append(line["values"]["ce"])
        recent = losses[-max(1, steps // LAST) :]
        if len(losses) % every == 0 and report(len(losses), math.fsum(recent) / len(recent)):
            raise _GivenUp

    trainer.observe = observe
    try:
        trainer.run()
    except (_GivenUp, TrainingDivergedError):
        return math.inf
    last = losses[-max(1, steps // LAST) :]
    return math.fsum(last) / len(last)


def _search(options: TuneOptions) -> SearchOptions:
    return SearchOptions(options.trials, warm_steps=options.steps // LAST, seed=options.seed)


def _check_study(folder: Path, spec: Spec, options: TuneOptions) -> None:
    """Refuse to go on with a study of other ranges, other steps or another training."""
    fixed = {name: value for name, value in spec.train.deciding().items() if name not in options.ranges}
    ranges = {name: vars(range_) for name, range_ in options.ranges.items()}
    about = json.loads(json.dumps({**spec.identity, **fixed, "ranges": ranges}))
    path = folder / "study.json"
    if path.is_file() and (folder / JOURNAL).is_file():
        before = without_removed(read_json(path, f"remove {folder} to search anew"))
        for name in sorted({*before, *about}):
            if before.get(name) != about.get(name):
                raise InputError(
                    f"{folder / JOURNAL} was begun with {name} = {before.get(name)!r}, now it is {about.get(name)!r}; "
                    "give the same, or remove the folder to search anew"
                )
    write_json(path, about)


def _in_tasks(spec: Spec, options: TuneOptions, folder: Path, places: Places) -> None:
    """Run trials in tasks of the connected Ray, which all reach the folder."""
    from tinyonn.workers.crew import run_tasks

    calls = [(spec, options, str(folder), part + 1) for part in range(places.workers)]
    run_tasks(take_part, calls, places.device, places.threads)


def _report(
    location: str, study: Any, best: Found, options: TuneOptions, first: Mapping[str, float], seconds: float
) -> TuneReport:
    given = [
        trial.value
        for trial in study.get_trials(deepcopy=False)
        if trial.value is not None
        and all(math.isclose(trial.params[name], first[name], rel_tol=1e-9) for name in first)
    ]
    return TuneReport(
        location,
        best.values,
        best.objective,
        float(given[0]) if given else None,
        best.finished,
        best.pruned,
        options.steps,
        seconds,
    )


@dataclass(frozen=True)
class TuneReport:
    """What a search found.

    Attributes
    ----------
    best : dict of str to float
        By dotted names of `TrainOptions`.
    loss, first_loss : float
        Of the best trial, and of the options as they were given (NaN if they are out of range or were given up), nats.
    finished, pruned : int
        Trials.
    """

    location: str
    best: dict[str, float]
    loss: float
    first_loss: float | None
    finished: int
    pruned: int
    steps: int
    tune_seconds: float

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> Sheet:
        """For people."""
        given = "" if self.first_loss is None else f", {self.first_loss:.4f} with the options as given"
        notes = [
            f"{self.loss:.4f} nats after {self.steps:,} steps{given}",
            f"{self.finished:,} trials and {self.pruned:,} that were given up, in {format_seconds(self.tune_seconds)}",
        ]
        sheet = Sheet(f"tuned {whole(self.location)}", notes).text("option").number("best")
        for name, value in self.best.items():
            sheet.add(f"train.{name}", f"{value:.3g}")
        return sheet
