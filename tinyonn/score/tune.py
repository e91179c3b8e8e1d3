"""``tinyonn score --tune N``: search the weights of S with Optuna.

Objective: agreement of S with ``|w g|``, the first-order effect of leaving a weight out, on the profile of a few
samples; mean over tensors of Spearman's rank correlation of S with ``log2 |w| + mean grad level / 2``. The levels of
the profile are recorded anew, in levels and not in codes. The study lies in the run's folder and goes on where it
stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata

from tinyonn.config import Config, ScoreConfig
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.places import local_folder
from tinyonn.run import Run, open_run
from tinyonn.score.stage import spread
from tinyonn.store.arrays import bands
from tinyonn.store.records import Float64

if TYPE_CHECKING:
    from tinyonn.record.recorder import Recorder

PROFILE_SAMPLES = 14  # taken in turns from the slices
PROFILE_TENSORS = 24  # matrices, evenly spread over the model
PROFILE_WEIGHTS = 1 << 14  # of each
RANGES = {"act": (0.0, 1.0), "grad": (-1.0, 1.0), "freq": (0.0, 1.0)}


@dataclass(frozen=True)
class Profile:
    """One tensor's part of the objective.

    Attributes
    ----------
    z : float64 [3, n]
        Standardised mean act level, grad level and freq of the run.
    ranks : float64 [n]
        Of ``|w g|`` on the profile, with mean 0 and length 1.
    """

    z: Float64
    ranks: Float64

    def agreement(self, weights: Float64) -> float:
        """Spearman's correlation of S with the profile."""
        ranks = _unit_ranks(weights @ self.z)
        return float(ranks @ self.ranks)


@dataclass(frozen=True)
class Tuned:
    """The best weights so far."""

    config: ScoreConfig
    agreement: float
    default_agreement: float
    trials: int


def tune_run(location: str, config: Config, trials: int) -> Tuned:
    """Search until the study has so many trials.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : Config
        As the run was recorded: its model and its corpus make the profile.
    trials : int

    Raises
    ------
    InputError
        Optuna is not installed, or nothing is recorded.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise InputError("--tune needs Optuna: pip install 'tiny-onn[tune]'") from None
    run = open_run(location)
    profiles = profile_of(run, config, local_folder(location))
    folder = local_folder(location) / "tune"
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="score",
        storage=JournalStorage(JournalFileBackend(str(folder / "score.log"))),
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        load_if_exists=True,
    )
    default = np.array(ScoreConfig().weights)

    def objective(trial: optuna.Trial) -> float:
        weights = {name: trial.suggest_float(name, *limits) for name, limits in RANGES.items()}
        return _mean_agreement(profiles, (weights["act"], weights["grad"], weights["freq"]))

    left = trials - len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))
    if left > 0:
        study.optimize(objective, n_trials=left)
    best = study.best_params
    tuned = ScoreConfig(weights=(best["act"], best["grad"], best["freq"]))
    act, grad, freq = (float(value) for value in default)
    return Tuned(
        tuned, float(study.best_value), _mean_agreement(profiles, (act, grad, freq)), trials - min(left, 0)
    )


def _mean_agreement(profiles: list[Profile], weights: tuple[float, float, float]) -> float:
    signed = np.array([weights[0], -weights[1], weights[2]])
    return float(np.mean([profile.agreement(signed) for profile in profiles])) if signed.any() else 0.0


def profile_of(run: Run, config: Config, folder: Path) -> list[Profile]:
    """Record a few samples in levels and put them beside the run's means."""
    from tinyonn.record.identity import recorded_corpus
    from tinyonn.record.levels import SUM_SAMPLES
    from tinyonn.record.worker import Worker

    corpus = recorded_corpus(folder, config, run.manifest)
    samples = corpus.calibration(min(PROFILE_SAMPLES, SUM_SAMPLES))
    worker = Worker(config.model, config.record.threads, config.record.seed)
    worker.load()
    chosen = spread([p for p in run.parameters if p.kind == "linear"], PROFILE_TENSORS)
    worker.recorder.open({p.name: run.calibration[p.name] for p in chosen}, spills=False)
    bad = worker.recorder.record(samples)
    if len(bad) == len(samples):
        raise InputError(
            f"none of the {len(samples)} profile samples gives finite values ({next(iter(bad.values()))})"
        )
    return [_profile(run, worker.recorder, p, len(samples) - len(bad)) for p in chosen]


def _profile(run: Run, recorder: Recorder, parameter: Parameter, samples: int) -> Profile:
    sums = recorder.sites[parameter.name].sums(samples)
    first, last = next(iter(bands(parameter.shape)))
    rows = np.unique(
        np.linspace(first, last - 1, max(1, PROFILE_WEIGHTS // parameter.shape[1])).astype(np.int64)
    )
    weights = recorder.weights(parameter)(first, last)[rows - first]
    means = run.mean_rows(parameter.name, first, last)[:, rows - first].reshape(3, -1)
    deviation = means.std(axis=1, keepdims=True)
    z = (means - means.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1)
    size = np.log2(np.maximum(np.abs(weights), 2.0**-126)) + sums.grad[rows] / samples / 2
    return Profile(z, _unit_ranks(size.reshape(-1)))


def _unit_ranks(values: Float64) -> Float64:
    ranks = np.asarray(rankdata(values), dtype=np.float64)
    ranks -= ranks.mean()
    length = np.sqrt(ranks @ ranks)
    return np.asarray(ranks / length) if length > 0 else ranks
