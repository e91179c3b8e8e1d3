"""A search with Optuna that can be killed, goes on, and may run in several processes on one folder.

The study lies in a journal (`JournalStorage`); whoever can reach the folder takes part. Suggestions come from TPE,
seeded by the number of trials so far, so that a study that goes on does not draw its first points again. A trial is
given up when it stands below the median of those before it at the same step. Trials that a killed process left running
are closed and their values tried anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyonn.errors import InputError

Report = Callable[[int, float], bool]  # step, value so far -> whether to give up
Objective = Callable[[Mapping[str, float], int, Report], float]  # values, trial's number, report -> value


@dataclass(frozen=True)
class Range:
    """Where a value is searched.

    Attributes
    ----------
    low, high : float
    log : bool
        By its logarithm.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            above = ", above 0 for a logarithmic one" if self.log else ""
            raise InputError(f"a range from {self.low} to {self.high}: give the lower end first{above}")

    def holds(self, value: float) -> bool:
        """Whether a value lies in it."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class SearchOptions:
    """How a study is searched.

    Attributes
    ----------
    trials : int
        Of the study in all, those given up counted.
    warm_trials : int
        Trials that are run to their end before any is given up.
    warm_steps : int
        Steps of a trial before it may be given up.
    seed : int
    """

    trials: int = 20
    warm_trials: int = 4
    warm_steps: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """The best trial so far.

    Attributes
    ----------
    values : dict of str to float
    objective : float
        Smaller is better.
    number : int
        Of the trial.
    finished, pruned : int
        Trials that ran to their end, and that were given up.
    """

    values: dict[str, float]
    objective: float
    number: int
    finished: int
    pruned: int


def load_optuna() -> Any:
    """The library, quiet."""
    try:
        import optuna
    except ImportError:
        raise InputError("a search needs Optuna: pip install 'tiny-onn[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(journal: Path, name: str, options: SearchOptions, part: int = 0) -> Any:
    """Make a study, or take part in it."""
    optuna = load_optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    journal.parent.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(study_name=name, storage=storage, direction="minimize", load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(
        seed=options.seed + 1000 * part + len(study.get_trials(deepcopy=False)),
        constant_liar=True,  # those under way count as bad ones: processes do not try the same
    )
    study.pruner = optuna.pruners.MedianPruner(options.warm_trials, options.warm_steps)
    return study


def begin(study: Any, first: Mapping[str, float], ranges: Mapping[str, Range]) -> None:
    """Close what a killed process left running, and queue its values; of a new study, queue `first`.

    Call it while nobody else takes part.
    """
    optuna = load_optuna()
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == optuna.trial.TrialState.RUNNING:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if trial.params.keys() == ranges.keys():
                study.enqueue_trial(trial.params, skip_if_exists=False)
    if not trials and all(ranges[name].holds(first[name]) for name in ranges):
        study.enqueue_trial({name: first[name] for name in ranges})


def search(study: Any, ranges: Mapping[str, Range], objective: Objective, trials: int) -> None:
    """Try values until the study has so many trials, whoever ran them."""
    optuna = load_optuna()
    state = optuna.trial.TrialState

    def once(trial: Any) -> float:
        values = {n: trial.suggest_float(n, r.low, r.high, log=r.log) for n, r in ranges.items()}

        def report(step: int, value: float) -> bool:
            trial.report(value, step)
            return bool(trial.should_prune())

        found = objective(values, trial.number, report)
        if not math.isfinite(found):
            raise optuna.TrialPruned
        return found

    ended = (state.COMPLETE, state.PRUNED)
    if len(study.get_trials(deepcopy=False, states=ended)) < trials:
        study.optimize(once, callbacks=[optuna.study.MaxTrialsCallback(trials, states=ended)])


def found(study: Any, name: str) -> Found:
    """What the study has."""
    optuna = load_optuna()
    state = optuna.trial.TrialState
    finished = len(study.get_trials(deepcopy=False, states=(state.COMPLETE,)))
    pruned = len(study.get_trials(deepcopy=False, states=(state.PRUNED,)))
    if finished == 0:
        raise InputError(
            f"{name}: none of {pruned} trials gave a finite loss; narrow the ranges, learning rates first"
        )
    best = study.best_trial
    return Found(dict(best.params), float(best.value), best.number, finished, pruned)
