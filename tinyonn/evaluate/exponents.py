"""``tinyonn score --tune N``: search a, b and c of S with Optuna, by what the model loses that is cut by it.

Objective: mean held-out loss over the slices, development split, of the selection that `tinyonn assemble` would make
with the same budget, core and allocation; d is 1, since a multiple of S orders weights alike. The named scores are
tried first. The study lies in the run's folder and goes on where it stopped; one trial is a selection and a pass over
the documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tinyonn.config import PRESETS, Config, ScoreConfig
from tinyonn.errors import InputError
from tinyonn.evaluate.baselines import masks_of
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.loss import batches_of, losses
from tinyonn.evaluate.stage import evaluate_options, held_out_corpus, samples_of
from tinyonn.places import local_folder
from tinyonn.record.identity import check_base
from tinyonn.run import open_run
from tinyonn.score.scores import name_of
from tinyonn.score.source import RunSource, digest, tensors_outside
from tinyonn.select.select import allocate, select
from tinyonn.select.selection import searched_shares, select_options
from tinyonn.show.progress import Bar
from tinyonn.store.lock import RunLock

SPLIT = "development"
RANGES = {"a": (0.0, 1.5), "b": (-1.0, 1.5), "c": (-1.0, 1.0)}
STEP = 0.05


@dataclass(frozen=True)
class Tuned:
    """The best weights so far.

    Attributes
    ----------
    config : ScoreConfig
    loss, default_loss : float
        Nats; the default is that of `ScoreConfig`.
    trials : int
    """

    config: ScoreConfig
    loss: float
    default_loss: float
    trials: int


def tune_run(location: str, config: Config, trials: int) -> Tuned:
    """Search until the study has so many trials.

    Parameters
    ----------
    location : str
        Of a scored run; by which weights does not matter.
    config : Config
        Its model, the recorded one; of its experts budget, core and allocation; of `evaluate` the held-out data.
    trials : int

    Raises
    ------
    InputError
        Optuna is not installed, nothing is scored, or there are no held-out data.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise InputError("--tune needs Optuna: pip install 'tiny-onn[tune]'") from None
    folder = local_folder(location) / "tune"
    with RunLock(local_folder(location), shared=True, what="tune"):
        objective = _Objective(location, config)
        folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name=f"exponents {objective.digest}",
            storage=JournalStorage(JournalFileBackend(str(folder / "score.log"))),
            direction="minimize",
            sampler=optuna.samplers.TPESampler(seed=0),
            load_if_exists=True,
        )
        if not study.trials:
            for a, b, c, _ in PRESETS.values():
                study.enqueue_trial({"a": a, "b": b, "c": c})
        left = trials - len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))
        with Bar("tuning", max(left, 0), "trials") as bar:
            for number in range(max(left, 0)):
                study.optimize(objective, n_trials=1)
                bar.update(number + 1, note=f"{study.best_value:.4f} nats")
        found = study.best_params
        default = objective.loss(ScoreConfig().exponents[:3])
    return Tuned(
        ScoreConfig(weights=(found["a"], found["b"], found["c"], 1.0)),
        float(study.best_value),
        default,
        trials - min(left, 0),
    )


class _Objective:
    """The loss of a trial's S."""

    def __init__(self, location: str, config: Config) -> None:
        run, options = open_run(location), evaluate_options(location, config, split=SPLIT)
        fingerprint = check_base(run.store, location, config.model)
        corpus = held_out_corpus(config, options, local_folder(location))
        self._config, self._run, self._location = config, run, location
        self._batches = batches_of(samples_of(corpus, SPLIT))
        self._dense = DenseWeights(config.model)
        self._source = RunSource(run, self._dense.rows, self._dense.transposed, labels=False)
        asked = self._asked("balanced")
        budget = asked.weights_of(self._source)
        self._kept_T = allocate(self._source, tensors_outside(run.parameters), asked, [budget])[0]
        decided_by = [fingerprint, corpus.fingerprint, {**asked.tree(), "score": None}]
        self.digest = digest([run.store.reader().stage("rows"), *decided_by])
        self._known: dict[str, float] = {}

    def _asked(self, score: str) -> Any:
        experts = self._config.experts
        shares = searched_shares(self._run, self._location, experts.budget)
        return select_options(experts, score, shares)

    def __call__(self, trial: Any) -> float:
        """As Optuna calls it."""
        found = [trial.suggest_float(name, *limits, step=STEP) for name, limits in RANGES.items()]
        return self.loss(found)

    def loss(self, exponents: Any) -> float:
        """Nats, of a, b and c."""
        name = name_of((*exponents, 1.0))
        if name not in self._known:
            selection = select(self._source, self._asked(name), kept_T=np.asarray(self._kept_T))
            with torch.no_grad(), self._dense.masked(masks_of(selection, self._source)) as model:
                self._known[name] = losses(model, self._batches).mean
        return self._known[name]
