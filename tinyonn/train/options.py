"""How a model is trained: everything that decides the result, as one frozen tree.

What has no default here is an option and has it in `tinyonn.config`; what has one is set by no configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from tinyonn.corpus.tokens import PROMPT_TOKENS
from tinyonn.errors import InputError

Rule = Literal["adamw", "muon", "frozen"]
PRECISIONS = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """What each part of the loss counts; a part of weight 0 is not computed.

    Attributes
    ----------
    kl : float
        Cross entropy towards the teacher's distribution, per counted token.
    ce : float
        Cross entropy of the text itself, per counted token.
    hidden : float
        Relative squared error of every layer's output against the teacher's, mean over layers and samples.
    balance, z, profile : float
        Of the router, mean over samples.
    """

    kl: float = 1.0
    ce: float
    hidden: float
    balance: float
    z: float = 0.001
    profile: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """How experts are chosen while training.

    Attributes
    ----------
    ks : tuple of int
        Each sample draws one: so many experts are on for it. 0 is all of them; empty takes the model's own rule.
    noise : float
        Standard deviation of what is added to the scores before choosing.
    dropout : float
        Share of the experts that cannot be chosen in a step.
    capacity : float or None
        An expert takes at most so many times its even share of a batch's samples; None is no limit.
    bias_rate : float
        Step of the bias that balances the load without a loss.
    """

    ks: tuple[int, ...]
    noise: float
    dropout: float
    capacity: float | None
    bias_rate: float


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """The two stages: which experts may change, how many are on, how fast they learn; see `tinyonn.train.stages`.

    Attributes
    ----------
    first : float
        Share of the steps that belong to stage 1; the rest is stage 2. In stage 1 all experts get gradients, whether
        they are on or not; in stage 2 those that are on.
    act_k : int or None
        Stage 1: experts that may be updated at all; None is every one.
    min_k : int or None
        Stage 1: the least surprised of these are updated; None is all of them. The core is updated in any case.
    grow : float
        Stage 2: the number of experts on is multiplied by ``(surprise / running mean) ** grow``; 0 keeps it.
    least, most : float
        Bounds of that factor.
    integrity : bool
        Stage 2: learning rates are scaled by predictive integrity relative to its running mean.
    alpha, gamma : float
        Of predictive integrity.
    """

    first: float
    act_k: int | None
    min_k: int | None
    grow: float
    least: float = 0.5
    most: float = 2.0
    integrity: bool
    alpha: float = 1.0
    gamma: float = 0.5


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Shares of the steps, as of `tinyonn.train.optimizers.Schedule.of_shares`."""

    warmup: float = 0.05
    decay: float = 0.5
    floor: float = 0.0


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """What is trained by which rule.

    Attributes
    ----------
    router : {"muon", "adamw", "frozen"}
        Rule of the router's matrices; the rest of it goes by AdamW, or is frozen too.
    router_lr : float
        Peak learning rate of the whole router after the warm start; 0 holds it as that left it. Muon's updates have
        AdamW's size (Liu et al. 2025), so one rate does.
    router_decay : float
        Weight decay of matrices and convolutions.
    experts : {"adamw", "muon", "frozen"}
    experts_lr, experts_decay : float
    trunk_lr, trunk_decay : float
        Of the trunk's matrices, which are embeddings and head, by AdamW; a rate of 0 freezes them.
    norms_lr : float
        Of norms and biases by AdamW; 0 freezes them.
    betas : (float, float)
        AdamW's.
    momentum : float
        Muon's.
    """

    router: Rule = "muon"
    router_lr: float = 0.0
    router_decay: float = 0.01
    experts: Rule = "muon"
    experts_lr: float
    experts_decay: float = 0.0
    trunk_lr: float
    trunk_decay: float = 0.0
    norms_lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95

    def __post_init__(self) -> None:
        rates = ("router_lr", "experts_lr", "trunk_lr", "norms_lr")
        for name in (*rates, "router_decay", "experts_decay", "trunk_decay"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} is {value}; give a number from 0 on")
        for name in ("router", "experts"):
            if getattr(self, name) not in ("adamw", "muon", "frozen"):
                raise InputError(f"{name} is {getattr(self, name)!r}; use adamw, muon or frozen")
        for name, value in (
            ("betas[0]", self.betas[0]),
            ("betas[1]", self.betas[1]),
            ("momentum", self.momentum),
        ):
            if not 0 <= value < 1:
                raise InputError(f"{name} is {value}; it lies from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One training.

    Attributes
    ----------
    steps : int
    batch : int
        Samples of a step, all workers together.
    micro_batch : int
        Samples that a worker runs at a time; decides the memory, and bits only by rounding.
    seed : int
    prompt_tokens : int
        Of a text, from which gates are chosen.
    prompt_loss : bool
        Labelled tokens of the prompt count in the loss too.
    precision : str
        ``bfloat16``: what is trained is held in float32 and multiplied in bfloat16. ``float32``: all in float32.
    temperature : float
        Of the distillation.
    warm_start, warm_start_batch : int
        Steps before the first in which the router alone learns from the profile, and samples of each.
    warm_start_lr : float
        Learning rate of these steps.
    clip : float
        Largest norm of all gradients together; 0 does not clip.
    spike : float
        A step whose norm is so many times the running median is reported.
    checkpointing : bool
        Layers' activations are computed again in the backward pass: less memory, a third more work.
    checkpoint_every, keep : int
        Steps between checkpoints; how many of the latest are kept. Neither decides bits.
    weights, routing, stages, schedule, optimizers
    """

    steps: int
    batch: int
    micro_batch: int
    seed: int = 0
    prompt_tokens: int = PROMPT_TOKENS
    prompt_loss: bool = True
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    temperature: float = 1.0
    warm_start: int
    warm_start_batch: int = 64
    warm_start_lr: float = 3e-3
    checkpointing: bool = False
    clip: float = 1.0
    spike: float = 10.0
    checkpoint_every: int
    keep: int = 2
    weights: LossWeights
    routing: RoutingOptions
    stages: StageOptions
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    optimizers: OptimizerOptions

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "micro_batch": 1, "warm_start": 0, "checkpoint_every": 1, "keep": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise InputError(f"train.{name} = {getattr(self, name)}; give at least {limit}")
        if self.precision not in PRECISIONS:
            raise InputError(f"train.precision = {self.precision!r}; choose {' or '.join(PRECISIONS)}")
        if not 0 <= self.stages.first <= 1:
            raise InputError(f"train.stages.first = {self.stages.first}; it is a share of the steps, 0 to 1")
        if not 0 <= self.routing.dropout < 1:
            raise InputError(f"train.routing.dropout = {self.routing.dropout}; a share from 0 to below 1")
        if self.temperature <= 0:
            raise InputError(f"train.temperature = {self.temperature}; it must be above 0")

    @property
    def first_stage(self) -> int:
        """Steps of stage 1."""
        return round(self.stages.first * self.steps)

    def deciding(self) -> dict[str, Any]:
        """What decides the result, flat: a checkpoint is of the same training if all of it is equal."""
        tree = asdict(self)
        for name in ("micro_batch", "checkpointing", "checkpoint_every", "keep"):  # rounding at most
            tree.pop(name)
        return dict(flat(tree))


def flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves of nested dictionaries by dotted names; tuples as lists, as JSON has them."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def option_of(options: TrainOptions, name: str) -> Any:
    """An option by its dotted name."""
    found: Any = options
    for part in name.split("."):
        if not is_dataclass(found) or part not in {f.name for f in fields(found)}:
            raise InputError(
                f"train.{name} is no option of a training; give such as optimizers.router_lr or weights.ce"
            )
        found = getattr(found, part)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise InputError(f"train.{name} = {found!r} is no number, so it has no range; leave it out")
    return found


def with_options(options: TrainOptions, values: Mapping[str, float]) -> TrainOptions:
    """The options with some changed, by dotted names; whole numbers stay whole."""
    for name, value in values.items():
        whole = isinstance(option_of(options, name), int)
        options = _changed(options, name.split("."), round(value) if whole else value)
    return options


def _changed(tree: Any, path: list[str], value: float) -> Any:
    first, *rest = path
    return replace(tree, **{first: _changed(getattr(tree, first), rest, value) if rest else value})
