"""The loop that trains: one for one worker or many, for routed models and for those they are compared with.

A step, for all its samples together:

1. every worker routes the whole batch (`routing`);
2. each runs its own samples, some at a time: teacher, student, loss parts over the tokens of the whole batch; backward;
3. gradients are summed over workers, so that one and two workers take the same step up to rounding;
4. stage rules (`stages`), clipping, learning rates, optimizers, the bias that balances the load;
5. a line of the monitor; every so many steps a checkpoint.

What is random is a function of the seed and the step. So a training that was killed and resumed goes through the same
numbers as one that was not: on CPUs with one worker bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyonn.corpus.file import Corpus
from tinyonn.errors import InputError
from tinyonn.train.checkpoint import Checkpoints, put_back, take, trained
from tinyonn.train.data import Batch, Order
from tinyonn.train.monitor import Monitor, StepFacts
from tinyonn.train.optimizers import Schedule, build_optimizers, clip_gradients, first_non_finite, set_rates
from tinyonn.train.options import TrainOptions
from tinyonn.train.routing import ProfileTargets, Routed, choose_experts
from tinyonn.train.samples import (
    PARTS,
    Sums,
    Workers,
    active_experts,
    load_of,
    loss_of,
    run_samples,
    sparsity,
)
from tinyonn.train.stages import Growth, Rules
from tinyonn.train.student import Student, prepare_model, weight_not_finite
from tinyonn.train.teacher import Cached, Teacher

LOG = logging.getLogger(__name__)
LONG_STEP = 20.0  # seconds, of which what was compiled is a small part


class TrainingDivergedError(InputError):
    """A loss or a gradient is not a number; the last good checkpoint stays."""


@dataclass(frozen=True)
class _Done:
    """A step that was taken: its values, and what the monitor gets besides."""

    values: dict[str, float]
    load_E: np.ndarray[Any, np.dtype[np.int64]] | None
    samples: int
    tokens: int


class Trainer:
    """One training, resumed where its last checkpoint stands.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        What is trained, on its device: a sparse model with or without a router, or any causal language model.
    corpus : Corpus
    options : TrainOptions
    folder : path
        For checkpoints and the steps' lines; all workers must reach it.
    teacher : Teacher, optional
        Needed unless the weights of ``kl`` and ``hidden`` are 0.
    targets : ProfileTargets, optional
        Needed for a warm start or a weight of ``profile``.
    identity : mapping, optional
        What else the training is of, such as the assembly's and the teacher's fingerprints: JSON. A checkpoint in which
        any of it differs is refused.
    places : sequence of (str, int), optional
        Slices and positions to train on; the whole corpus by default.

    Attributes
    ----------
    step : int
        Steps done, those of the warm start counted.
    steps : int
        In all.
    observe : callable
        Called with the line of every step, see `tinyonn.train.monitor`, on the first worker; may be set.
    monitor : Monitor or None
        Of the first worker, which has one from its first step on; another may be set before that.

    Raises
    ------
    InputError
        Options, model, teacher and corpus do not fit together; a checkpoint of another training.
    """

    def __init__(
        self,
        model: Any,
        corpus: Corpus,
        options: TrainOptions,
        folder: str | Path,
        teacher: Teacher | None = None,
        targets: ProfileTargets | None = None,
        identity: Mapping[str, Any] | None = None,
        places: Sequence[tuple[str, int]] | None = None,
    ) -> None:
        self.options, self.teacher, self.targets = options, teacher, targets
        self.student = Student(model, options.weights, options.temperature, options.prompt_loss)
        check_fit(self.student, teacher, targets, options)
        self.optimizers = build_optimizers(model, options.optimizers)
        prepare_model(model, options.precision, options.checkpointing)
        self.workers = Workers.found()
        self.observe: Callable[[Mapping[str, Any]], None] = lambda line: None
        self.monitor: Monitor | None = None
        self.steps = options.warm_start + options.steps
        self.schedule = Schedule.of_shares(options.steps, **vars(options.schedule))
        self.order = Order(corpus, options.batch, options.seed, places, options.prompt_tokens)
        self._warm = self._warm_order(corpus)
        groups = self.student.experts + 1 if self.student.experts else 0
        self.rules = Rules(options.stages, groups, options.spike)
        known = {"corpus": corpus.fingerprint, **(identity or {})}
        self.folder = Path(folder)
        self.checkpoints = Checkpoints(self.folder, known | options.deciding(), options.keep)
        self.step = 0
        self._resume()

    # The loop

    def run(self, until: int | None = None) -> int:
        """Train to the end, or until so many steps are done."""
        last = self.steps if until is None else min(until, self.steps)
        if self.monitor is None and self.workers.first:
            self.monitor = Monitor(self.folder, shared=self.shared, resumed=self.step)
        while self.step < last:
            started = time.monotonic()
            done = self._warm_step(self.step) if self.stage_of(self.step) == 0 else self._full_step(self.step)
            self.step += 1
            if self.monitor is not None:
                seconds = time.monotonic() - started
                facts = StepFacts(self.step, done.values, done.load_E, done.samples, done.tokens, seconds)
                self.monitor.record(facts)
                self.observe(self.monitor.line)
            if self.step % self.options.checkpoint_every == 0 or self.step == self.steps:
                if self.monitor is not None:
                    self.monitor.sync()
                self.save()
        return self.step

    def rehearse(self) -> float:
        """Seconds that a step after the warm start will take: the samples of the first are run, and nothing is learnt.

        Run twice where the first time was short: it may have compiled something.
        """
        seconds = 0.0
        stage, batch = self.stage_of(self.options.warm_start), self.order.step(0)
        with torch.random.fork_rng():
            for _ in range(2):
                started = time.monotonic()
                self._forget_gradients()
                routed = self._route(batch, 0, None)
                gates = self._value_gates(stage)
                run_samples(self.student, self.teacher, batch, routed, self.options, self.workers, gates)
                seconds = time.monotonic() - started
                if (
                    seconds > LONG_STEP and self.workers.world == 1
                ):  # several wait for each other: as often in each
                    break
        self._forget_gradients()
        return seconds

    @property
    def shared(self) -> tuple[int, ...]:
        """Experts that are always on, beside the core."""
        return () if self.student.router is None else tuple(self.student.router.options.shared)

    def stage_of(self, step: int) -> int:
        """Of the step after so many: 0 in the warm start, then 1 or 2."""
        if step < self.options.warm_start:
            return 0
        return 1 if step - self.options.warm_start < self.options.first_stage else 2

    def _full_step(self, step: int) -> _Done:
        stage, own = self.stage_of(step), step - self.options.warm_start
        batch = self.order.step(own)
        routed = self._route(batch, own, self.rules.growth if stage == 2 else None)
        self._forget_gradients()
        sums = run_samples(
            self.student, self.teacher, batch, routed, self.options, self.workers, self._value_gates(stage)
        )
        self._check_loss(step, sums, routed)
        self.workers.add(self._gradients())
        line: dict[str, float] = {"stage": stage, "loss": loss_of(sums, routed, self.options.weights)}
        line |= {name: sums.mean(name) for name in PARTS if name in sums.counts}
        if self._learns("values"):
            active_E = active_experts(routed, self.student.model.config)
            line["surprise"] = self.rules.sort_out(self.student.model, stage, active_E)
        norm = line["gradient_norm"] = self._clip(step)
        verdict = self.rules.judge(stage, line["ce"], line["entropy"], norm)
        line |= {"integrity": verdict.integrity, "lr_factor": self.schedule.factor(own) * verdict.scale}
        rates = set_rates(self.optimizers, line["lr_factor"])
        line |= {f"lr/{name}": rate for name, rate in rates.items()}
        self._update(routed)
        if routed is not None:
            line |= routed.parts | sparsity(routed, self.student.model.config.expert_sizes)
        return _Done(line, load_of(routed), len(batch), int(batch.lengths_B.sum()))

    def _warm_step(self, step: int) -> _Done:
        """The router alone, on what the profile says."""
        assert self._warm is not None
        batch = self._warm.step(step)
        routed = self._route(batch, step, None, warm=True)
        assert routed is not None
        self._forget_gradients()
        routed.loss.backward()
        loss = float(routed.loss.detach())
        if not math.isfinite(loss):
            self._diverged(step, "the router's loss in the warm start is not finite")
        norm = self._clip(step)
        set_rates(self.optimizers, 1.0, {"router": self.options.warm_start_lr})
        self._update(routed)
        line = {"stage": 0, "loss": loss, "gradient_norm": norm, **routed.parts}
        return _Done(line, load_of(routed), len(batch), int(batch.prompts_B.sum()))

    def _route(self, batch: Batch, step: int, growth: Growth | None, warm: bool = False) -> Routed | None:
        if self.student.router is None:
            return None
        seed, weights = self.options.seed, self.options.weights
        if warm:
            seed, weights = seed + 1, replace(weights, profile=1.0, balance=0.0)
        moves = warm or self.options.optimizers.router_lr > 0
        with torch.set_grad_enabled(moves and self._learns("router")):
            return choose_experts(
                self.student, batch, step, seed, self.options.routing, weights, self.targets, growth
            )

    def _clip(self, step: int) -> float:
        """The norm of all gradients, which are clipped to the limit."""
        named = trained(self.student.model)
        clipped = clip_gradients([parameter for _, parameter in named], self.options.clip or None)
        if not clipped.finite:
            lost = weight_not_finite(self.student.model)
            self._diverged(step, lost or f"the gradient of {first_non_finite(named)} is not finite")
        if self.stage_of(step) and self.rules.spikes.observe(clipped.norm):
            LOG.warning("step %d: the norm of the gradients jumped to %.3g", step + 1, clipped.norm)
        return clipped.norm

    def _update(self, routed: Routed | None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        if self.student.experts:
            self.student.model.forget()
        if routed is not None:
            self.student.router.update_bias(routed.load_E, self.options.routing.bias_rate)

    def _forget_gradients(self) -> None:
        for _, parameter in trained(self.student.model):
            parameter.grad = None

    def _value_gates(self, stage: int) -> torch.Tensor | None:
        """In stage 1 experts that are off get gradients too."""
        if stage != 1 or self.student.router is None or not self._learns("values"):
            return None
        return torch.ones(self.student.experts, device=self.student.device)

    def _gradients(self) -> list[torch.Tensor]:
        """Of all that is trained; zeros where a worker's samples gave none and another's may have."""
        parameters = [parameter for _, parameter in trained(self.student.model)]
        for parameter in parameters if self.workers.world > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    # What is not a number

    def _check_loss(self, step: int, sums: Sums, routed: Routed | None) -> None:
        if routed is not None and not math.isfinite(float(routed.loss.detach())):
            self._diverged(step, "the router's own loss is not finite")
        for name in sums.counts:
            if not math.isfinite(sums.totals[name]):
                self._diverged(step, sums.bad or f"{name} is not finite on another worker")

    def _diverged(self, step: int, cause: str) -> None:
        kept = self.checkpoints.paths()
        where = f"{kept[-1]} is the last good checkpoint" if kept else "there is no checkpoint yet"
        raise TrainingDivergedError(f"step {step + 1}: {cause}; {where}; lower the learning rates")

    def _learns(self, what: str) -> bool:
        return any(what in name.split(".") for name, _ in trained(self.student.model))

    def _warm_order(self, corpus: Corpus) -> Order | None:
        if not self.options.warm_start or self.targets is None:
            return None
        places = self.targets.places(corpus)
        options = self.options
        return Order(corpus, options.warm_start_batch, options.seed + 1, places, options.prompt_tokens)

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint of the steps done so far."""
        if self.workers.first:
            tensors, about = take(self.student.model, self.optimizers, self.rules)
            self.checkpoints.save(self.step, tensors, about)
        self.workers.wait()

    def _resume(self) -> None:
        found = self.checkpoints.latest()
        if not self.workers.agree(0 if found is None else found.step, self.student.device):
            raise InputError(
                f"workers see different checkpoints in {self.folder}; give storage that all of them reach"
            )
        if found is not None:
            put_back(found, self.student.model, self.optimizers, self.rules)
            self.step = found.step
            LOG.info("resumed at step %d", self.step)


def check_fit(
    student: Student, teacher: Teacher | None, targets: ProfileTargets | None, options: TrainOptions
) -> None:
    """Refuse what cannot be trained."""
    weights = options.weights
    if teacher is None and (weights.kl > 0 or weights.hidden > 0):
        raise InputError(
            "train.loss.kl and hidden need a teacher and there is none; give one, or set both to 0"
        )
    if isinstance(teacher, Cached):
        if weights.hidden > 0:
            raise InputError(
                "train.loss.hidden needs the teacher's hidden states, which a cache does not hold; set it to 0"
            )
        if options.temperature != 1:
            raise InputError(
                f"train.temperature = {options.temperature} needs all of the teacher's logits, of which a cache "
                "holds a few; set it to 1"
            )
    vocabulary = int(student.model.get_output_embeddings().weight.shape[0])
    if teacher is not None and teacher.vocabulary < vocabulary:
        raise InputError(
            f"the teacher's head has {teacher.vocabulary} tokens and the student's {vocabulary}; "
            "train with the dense model that the student was made from"
        )
    if student.router is None:
        if options.warm_start or options.routing.ks or weights.profile > 0:
            raise InputError(
                "train.warm_start, routing.ks and loss.profile need a router and the model has none; leave them out"
            )
        return
    if (options.warm_start or weights.profile > 0) and targets is None:
        raise InputError(
            "train.warm_start and loss.profile need the profile's targets; run `tinyonn profile` first"
        )
    if targets is not None and targets.experts != student.experts:
        raise InputError(
            f"the profile is of {targets.experts} experts but the model has {student.experts}; profile this assembly"
        )
    if wrong := [k for k in options.routing.ks if not 0 <= k <= student.experts]:
        raise InputError(
            f"train.routing.ks has {wrong[0]} but there are {student.experts} experts; 0 is all of them"
        )
    top_k = student.router.top_k
    if top_k is not None and top_k > student.experts:
        raise InputError(f"top_k = {top_k} but there are {student.experts} experts; give at most as many")
