"""Options that contradict each other, or the model, found before anything is done.

`contradictions` needs the configuration alone and is asked when it is read; `check_model` needs the list of the model's
parameters and is asked by ``tinyonn plan`` and by the first stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from tinyonn.errors import InputError
from tinyonn.show.escape import shortened

if TYPE_CHECKING:
    from tinyonn.config import Config, RouterConfig, TrainConfig
    from tinyonn.dense.parameters import Parameter
    from tinyonn.plan.demands import ModelFacts

Preset = Literal["balanced", "root", "wanda", "wg", "magnitude", "source"]  # weights of S that have a name
OTHERS = ("energy", "gblm", "random")  # scores that are no S
UPDATED = "+update"  # behind a method's name: what is kept is updated
UNIFORM = "+uniform"  # there too: every tensor has one share
WANDA_FLOAT = "wanda-float"  # from float activations
FLOAT_ROOT = "root-float-"  # and a number: from float gradients of so many samples
BASES = ("default", "sparsegpt", WANDA_FLOAT, *get_args(Preset), *OTHERS)
KINDS = ("norm", "bias", "embedding", "head")  # of every architecture, be there some in this model or not
MOST_SAMPLES = 65_535 // 15  # of a segment: its sums hold a level of at most 15 of each


def contradictions(config: Config) -> Iterator[str]:
    """What of a configuration cannot be carried out, a sentence for each.

    What is left out gives way: a default that does not fit the number of experts is fitted to it where it is used.
    """
    yield from _of_record(config)
    yield from _of_experts(config)
    yield from _of_router(config.router, experts_of(config))
    yield from _of_train(config, experts_of(config))
    yield from _of_evaluate(config)


def base_of(method: str) -> str:
    """A way to choose weights, of `evaluate.methods`, without what stands behind its name."""
    return method.removesuffix(UNIFORM).removesuffix(UPDATED)


def is_method(method: str) -> bool:
    """Whether there is such a way to choose weights."""
    base = base_of(method)
    number = base.removeprefix(FLOAT_ROOT)
    if number != base:
        return number.isascii() and number.isdigit() and int(number) > 0
    return base in BASES and not (base == "sparsegpt" and UPDATED in method)


def experts_of(config: Config) -> int:
    """How many experts there will be."""
    return config.cluster.cells


def fitting(given: Sequence[int], experts: int) -> tuple[int, ...]:
    """The default numbers of experts to train with, those that there are too few experts for left out."""
    return tuple(k for k in given if k <= experts)


def check_model(config: Config, parameters: Sequence[Parameter]) -> None:
    """Refuse what later stages could not do with this model.

    Raises
    ------
    InputError
        More weights to keep than there are, or fewer than experts.
    """
    from tinyonn.dense.parameters import kind_of

    cut = [p for p in parameters if p.kind == "linear" and kind_of(p) not in KINDS]
    weights = sum(parameter.size for parameter in cut)
    least = experts_of(config)
    named = [
        ("experts.budget", config.experts.budget),
        *(("evaluate.budgets", b) for b in config.evaluate.budgets),
    ]
    for name, budget in named:
        kept = round(budget * weights) if budget <= 1 else int(budget)
        if kept > weights:
            raise InputError(
                f"{name}: {kept:,} weights, but only {weights:,} linear weights are outside the trunk; give at most "
                "as many, or a share such as 0.315"
            )
        given = config.experts.model_fields_set & {"budget"} or config.cluster.model_fields_set & {"cells"}
        if kept < least and name == "experts.budget" and given:
            raise InputError(
                f"{name} = {budget:g} keeps {kept:,} weights, below one for each of {_count(config)}; give more, or "
                "make fewer experts"
            )


def check_teacher(hidden: float, student: ModelFacts, teacher: ModelFacts) -> None:
    """Refuse a teacher of training that cannot teach the model; `hidden` is the weight of the layers' loss.

    Raises
    ------
    InputError
        Fewer tokens in its head, or other layers where these are compared.
    """
    if teacher.vocabulary < student.vocabulary:
        raise InputError(
            f"train.teacher_model: {teacher.name} has {teacher.vocabulary:,} tokens in its head and {student.name} "
            f"{student.vocabulary:,}; give a teacher with the same tokenizer"
        )
    ours, theirs = (student.layers, student.hidden), (teacher.layers, teacher.hidden)
    if hidden > 0 and ours != theirs:
        raise InputError(
            f"train.loss.hidden = {hidden} compares layers, but {student.name} has {ours[0]} of "
            f"width {ours[1]} and its teacher {teacher.name} {theirs[0]} of {theirs[1]}; set it to 0"
        )


def _of_record(config: Config) -> Iterator[str]:
    segment = config.record.segment
    if isinstance(segment, int) and segment > MOST_SAMPLES:
        yield f"record.segment = {segment:,}: a segment's sums hold at most {MOST_SAMPLES:,} samples; give fewer"


def _of_experts(config: Config) -> Iterator[str]:
    experts, there = config.experts, experts_of(config)
    if experts.budget > 1 and experts.budget != int(experts.budget):
        yield (
            f"experts.budget = {experts.budget}: a number of weights is whole, a share lies in (0, 1]; "
            f"give {round(experts.budget)}"
        )
    if experts.core == 1:
        yield "experts.core = 1 leaves nothing for experts; give a smaller core"
    if experts.top_k is not None and experts.top_k > there:
        yield f"experts.top_k = {experts.top_k} but there are {_count(config)}; give at most as many, or null for all"


def _of_router(router: RouterConfig, experts: int) -> Iterator[str]:
    given = router.model_fields_set
    if router.shared >= experts:
        yield f"router.shared = {router.shared} of {experts} experts leaves none to choose; give fewer"
        return
    choices = experts - router.shared
    # Of branches there are fewer where there are fewer experts.
    if "top_k" in given and router.top_k is not None and router.top_k > choices:
        beside = f" beside the {router.shared} shared ones" if router.shared else ""
        yield f"router.top_k = {router.top_k} but there are {choices} experts{beside}; give at most as many"


def _of_train(config: Config, experts: int) -> Iterator[str]:
    train = config.train
    if "ks" in train.routing.model_fields_set:
        for k in train.routing.ks:
            if not 0 <= k <= experts:
                yield f"train.routing.ks has {k} but there are {_count(config)}; give 0, which is all, to {experts}"
    if train.warm_start == 0:
        yield "train.warm_start = 0 leaves a new router as it was drawn; give a warm start of 100 steps or more"
    yield from _of_losses(train)


def _of_losses(train: TrainConfig) -> Iterator[str]:
    if train.teacher == "cached" and train.loss.hidden > 0:
        yield (
            f"train.loss.hidden = {train.loss.hidden} needs the teacher's hidden states, which a cache does not hold; "
            "set it to 0, or train.teacher: live"
        )


def _of_evaluate(config: Config) -> Iterator[str]:
    for method in config.evaluate.methods:
        if not is_method(method):
            known = ", ".join(sorted(BASES))
            yield (
                f"evaluate.methods has {shortened(method)}, which is no method; there are {known}, {FLOAT_ROOT}8 and "
                f"the like, and {UPDATED} and {UNIFORM} behind them"
            )
    for budget in config.evaluate.budgets:
        if not budget > 0 or (budget > 1 and budget != int(budget)):
            yield f"evaluate.budgets has {budget}; give shares in (0, 1], or whole numbers of weights"


def _count(config: Config) -> str:
    return f"{config.cluster.cells} experts (cluster.cells)"
