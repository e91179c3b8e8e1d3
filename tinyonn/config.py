"""The configuration: one YAML file, one tree of typed classes. Unknown keys are refused."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tinyonn.checks import Score, contradictions
from tinyonn.errors import InputError
from tinyonn.escape import SHOWN, shortened
from tinyonn.limits import (
    AboveZero,
    BelowOne,
    Budget,
    Count,
    Factor,
    Number,
    Place,
    Rate,
    Seed,
    Share,
    Signed,
    Some,
    Text,
    Threads,
    Weight,
    Width,
    Windows,
)
from tinyonn.yaml_text import read_yaml

Auto = Literal["auto"]

TOLD = 5  # faults that a message names

# Options that were, and values of options (`key=value`): what to do instead. Older runs' saved options may name them.
REMOVED: dict[str, str] = {
    "router.threshold": "router.top_k says how many experts are on",
    "router.max_k": "router.top_k says how many experts are on",
    "train.loss.specificity": "experts by need differ as they are made, and the warm start teaches the router",
    "router.gate": "a chosen expert works with gate 1, as in the dense model",
    "evaluate.oracle": "leave it out; masks of one slice are not evaluated any more",
    "experts.allocation=outlier": "it was worse than uniform; use auto, global or uniform",
    "experts.balance": "leave it out; weights compete within a tensor, whatever their cells",
    "experts.core_by": "leave it out; the core is the best of what is kept",
    "experts.within": "leave it out; weights compete within a tensor",
}

# Weights of act, grad and freq in S = act z(act) - grad z(grad) + freq z(freq).
SCORE_PRESETS = {"default": (1.0, 0.0, 1.0), "seed": (1.0, 1.0, 1.0), "activation": (1.0, 0.0, 0.0)}


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """The dense model that is recorded."""

    path: Place = "reference"  # a hub name, a folder, a GGUF file, or "reference" for the model shipped
    revision: Text | None = None
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpointing: bool = (
        False  # recompute the layers' activations in the backward pass instead of keeping them
    )


DataFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "query-response", "preference",
    "text",
]  # fmt: skip


class SourceConfig(Section):
    """Where rows come from, and what their columns are."""

    path: Place = (
        "reference"  # a file or folder (JSONL, JSON, Parquet, Arrow), a `datasets` name, or "reference"
    )
    name: Text | None = None  # configuration of a `datasets` name
    split: Text = "train"
    format: DataFormat = "auto"  # what the columns are; auto: as their names say, see tinyonn/corpus/forms.py
    text: Text | None = None  # column of plain text
    messages: Text | None = None  # column of chat messages; labels are the assistant's turns
    slice: Text | None = None  # column that names the slice; without it slices are derived


class MixedSource(SourceConfig):
    """One of several sources; without a slice's name or column it is a slice called like its file."""

    slice_name: Text | None = Field(None, min_length=1)  # the slice that all its rows are
    samples: Count | None = None  # take this many of it, evenly over its slices; null takes all
    share: Some | None = None  # take this share of its rows

    @model_validator(mode="after")
    def _one_of_each(self) -> MixedSource:
        if self.slice_name and self.slice:
            raise ValueError("slice_name names the slice and slice a column that does; give one of them")
        if self.samples and self.share:
            raise ValueError("samples and share both say how much is taken; give one of them")
        return self

    def most(self, rows: int) -> int:
        """How many of so many rows are taken."""
        return min(rows, self.samples or rows) if self.share is None else max(1, round(self.share * rows))


class DataConfig(SourceConfig):
    """The corpus that is fed to the model, one sample at a time: one source, or a list of them."""

    sources: tuple[MixedSource, ...] = ()  # more sources; `data: [...]` is short for `data: {sources: [...]}`
    slices: int = Field(8, ge=1, le=16)  # how many slices to derive
    max_tokens: Count = 2048
    samples: Count | None = None  # take this many, evenly over the slices; null takes all
    seed: Seed = 0  # of the stored order and of derived slices
    rendered: bool = False  # texts are rendered conversations: special tokens in them are no plain text

    @model_validator(mode="before")
    @classmethod
    def _list_of_sources(cls, tree: Any) -> Any:
        if isinstance(tree, (list, tuple)):
            tree = {"sources": tree, "path": ""}
        if isinstance(tree, dict) and tree.get("sources") and "path" not in tree:
            tree = {**tree, "path": ""}
        return tree

    @model_validator(mode="after")
    def _some_source(self) -> DataConfig:
        if not self.path and not self.sources:
            raise ValueError("there is no source; give data.path, or a list of sources")
        return self

    def origins(self) -> tuple[SourceConfig, ...]:
        """All sources, in order: the section's own if it has a path, then those of `sources`."""
        return (*([self] if self.path else []), *self.sources)

    @property
    def told(self) -> str:
        """The sources' paths, for messages."""
        return ", ".join(origin.path for origin in self.origins())


class RecordConfig(Section):
    """How the recorder works; all but `workers` decides the bits of the result."""

    segment: Width | Auto = "auto"  # samples per segment
    workers: Threads | Auto = "auto"
    threads: Threads = 1  # CPU threads of one worker
    windows: Windows | Auto = "auto"  # passes over a segment, each recording some of the layers
    calibration: Width = 32  # samples that set the levels' bases
    max_live: Width = 3  # live segments per slice while recording, beside those in flight
    seed: Seed = 0  # of the dithering


class ScoreConfig(Section):
    """How weights are scored: S = act z(act) - grad z(grad) + freq z(freq)."""

    preset: Literal["default", "seed", "activation"] = "default"
    act: Signed | None = None  # in place of the preset's
    grad: Signed | None = None
    freq: Signed | None = None

    def weights(self) -> tuple[float, float, float]:
        """Weights of act, grad and freq."""
        preset = SCORE_PRESETS[self.preset]
        act, grad, freq = (
            given if given is not None else value
            for given, value in zip((self.act, self.grad, self.freq), preset, strict=True)
        )
        return act, grad, freq

    @model_validator(mode="after")
    def _some_weight(self) -> ScoreConfig:
        weights = self.weights()
        if not all(math.isfinite(weight) for weight in weights) or not any(weights):
            raise ValueError(f"the weights are {weights}; they must be finite, and at least one not 0")
        return self


class FeatureWeights(Section):
    """Weight of each group of features in the distance between weights; 0 leaves a group out."""

    score: Weight = 1.0
    act: Weight = 1.0
    grad: Weight = 1.0
    freq: Weight = 0.5
    slice: Weight = 2.0  # dominant slice, scaled by selectivity
    layer: Weight = 0.5
    kind: Weight = 0.25
    row: Weight = 0.0  # position in 16 buckets; neurons have no order of their own
    column: Weight = 0.0

    @model_validator(mode="after")
    def _some_weight(self) -> FeatureWeights:
        if not any(self.model_dump().values()):
            raise ValueError("all features weigh 0; give at least one a weight")
        return self


class ClusterConfig(Section):
    """How weights are clustered into cells."""

    cells: int = Field(100, ge=2, le=255)
    features: FeatureWeights = FeatureWeights()
    trunk: tuple[Text, ...] = ("norm", "bias", "embedding", "head")  # kinds in no cell; also such as q_proj
    cap: Factor | None = Field(None, gt=1)  # largest cell, as a multiple of the mean size
    iterations: Width = 300  # of full k-means, at most
    tolerance: BelowOne = 1e-5  # share of weights that may still change cell in the last one
    seed: Seed = 0


class ExpertsConfig(Section):
    """Which weights are kept, and how the experts they become are switched on."""

    budget: Budget = 0.315  # share of the linear weights; above 1 their number
    score: Score = "root"  # what the kept ones are best in; root is |W| times the root of its gradient
    by: Literal["need", "cells"] = (
        "need"  # what makes an expert: which slices need a weight, or the run's cells
    )
    count: int = Field(100, ge=1, le=254)  # experts by need; by cells there are as many as cells
    allocation: Literal["auto", "global", "uniform"] = "auto"  # of the budget across tensors
    core: Share = 0.1  # share of the budget that is always on
    seed: Seed = 0  # of ties
    top_k: Width | None = None  # experts on for a prompt; null switches all on
    reroute_every: Count | None = None  # tokens after which a router chooses again; null: never


class EvaluateConfig(Section):
    """What the cut models are measured on, and beside what."""

    data: DataConfig | None = None  # held-out data; null: the held-out split of the reference corpus
    samples: Count | None = 252  # of them, evenly over the slices; null takes all
    methods: tuple[Text, ...] = (
        "default", "S", "seed", "activation", "magnitude", "wanda", "wg", "gblm", "random", "sparsegpt",
        "default+update",
    )  # fmt: skip
    budgets: tuple[Budget, ...] = (0.5, 0.315, 0.25, 0.1)
    calibration: Width = 112  # recorded samples for methods that update weights


class ProfileConfig(Section):
    """What each expert does on each sample is measured on these."""

    samples: Count | None = 560  # of the recorded ones, evenly over the slices; null takes all
    prompt_tokens: Count = (
        64  # of a text, from which its experts are chosen; of a chat: all before the answer
    )
    excerpt: Number = 160  # characters of each sample that are kept


class RouterConfig(Section):
    """The router that chooses experts for a prompt."""

    branches: Width = 10  # the main router's choices, each with a sub-router of its own
    width: Width = 128  # features of its encoder
    top_k: Width | None = 10  # experts on for a prompt, the shared ones not counted; null: all
    shared: Number = 0  # experts always on: those that are strong and even in the profile


class LossConfig(Section):
    """What each part of the loss counts."""

    kl: Weight = 1.0  # towards the teacher's distribution
    ce: Weight = 0.1  # of the text itself
    hidden: Weight = 0.1  # every layer's output against the teacher's
    balance: Weight = 0.0
    z: Weight = 0.001
    profile: Weight = 0.0  # the router's choice against the profile


class RoutingConfig(Section):
    """How experts are chosen while training."""

    ks: tuple[int, ...] = (10, 25, 50, 0)  # each sample draws one: experts on, 0 is all; empty: router.top_k
    noise: Weight = 0.0  # on the scores, standard deviation
    dropout: BelowOne = 0.0  # share of the experts that a step does without
    capacity: Factor | None = None  # of an expert, in even shares of a batch
    bias_rate: Rate = 0.0  # of the bias that balances the load; 0: none


class StagesConfig(Section):
    """Stage 1 lets all experts learn and updates the least surprised; stage 2 trains what is on."""

    first: Share = 0.0  # share of the steps
    act_k: Number = 0  # experts with gradients in stage 1; 0 is all
    min_k: Number = 0  # of these the least surprised are updated; 0 is all
    grow: Weight = 0.0  # stage 2: how top_k follows surprise
    least: Some = 0.5  # bounds of its factor
    most: Factor = 2.0
    integrity: bool = False  # stage 2: learning rates follow predictive integrity


class OptimizersConfig(Section):
    """What is trained by which rule; rates are peaks."""

    router: Literal["muon", "adamw", "frozen"] = "muon"
    router_lr: Rate = 0.0  # after the warm start; 0 holds it
    router_decay: Rate = 0.01
    experts: Literal["muon", "adamw", "frozen"] = "muon"
    experts_lr: Rate = 1e-3
    experts_decay: Rate = 0.0
    trunk_lr: Rate = 0.0  # of embeddings and head; 0 freezes them
    trunk_decay: Rate = 0.0
    norms_lr: Rate = 3e-3  # of norms and biases; 0 freezes them


class ScheduleConfig(Section):
    """Learning rates over the steps: up, level, down; shares of the steps."""

    warmup: Share = 0.05
    decay: Share = 0.5
    floor: Share = 0.0  # at the end, of the peak


class TrainConfig(Section):
    """How router and experts are trained against the dense model."""

    data: DataConfig | None = None  # null: all of what the run was recorded from
    steps: Count = 400
    batch: Width = 16  # samples of a step, all workers together
    micro_batch: Width = 8  # of them at a time in memory
    seed: Seed = 0
    prompt_loss: bool = True  # the prompt's own tokens count too
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    temperature: AboveZero = 1.0
    warm_start: Number = 200  # steps before the first in which the router alone learns from the profile
    warm_start_lr: AboveZero = 3e-3
    clip: Weight = 1.0
    checkpoint_every: Count = 50
    keep: Width = 2  # latest checkpoints
    teacher: Literal["live", "cached"] = "live"  # cached: the most probable tokens on the disk
    teacher_model: ModelConfig | None = None  # null: the dense model itself
    loss: LossConfig = LossConfig()
    routing: RoutingConfig = RoutingConfig()
    stages: StagesConfig = StagesConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optimizers: OptimizersConfig = OptimizersConfig()


class StorageConfig(Section):
    """Where runs live."""

    root: Place = "storage"  # a folder, or s3://bucket/prefix


class TrackConfig(Section):
    """Where metrics go besides the log."""

    tensorboard: bool = False  # event files under the run's folder
    wandb: Text | None = (
        None  # project of a W&B-compatible tracker (`pip install wandb` or a compatible client)
    )


class Config(Section):
    """The whole configuration."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    record: RecordConfig = RecordConfig()
    score: ScoreConfig = ScoreConfig()
    cluster: ClusterConfig = ClusterConfig()
    experts: ExpertsConfig = ExpertsConfig()
    profile: ProfileConfig = ProfileConfig()
    router: RouterConfig = RouterConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    storage: StorageConfig = StorageConfig()
    track: TrackConfig = TrackConfig()


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All option names, dotted and sorted: ``data.max_tokens``, ``data.messages``, ...

    Those of an item of a list stand below the list's name: ``data.sources.share``.
    """
    keys: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return sorted(keys)


def parse_config(tree: dict[str, Any], origin: str = "configuration") -> Config:
    """Validate a nested dict.

    Raises
    ------
    InputError
        Names the key or value, what is allowed, and for an unknown key the nearest known one; or options that
        contradict each other.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        told = [_explain(item) for item in wrong[:TOLD]]
        more = [f"and {len(wrong) - TOLD:,} more"] if len(wrong) > TOLD else []
        raise InputError(f"{origin}: " + "; ".join([*told, *more])) from None
    if wrong_together := list(contradictions(config)):
        raise InputError(f"{origin}: " + "; ".join(wrong_together[:TOLD]))
    return config


def _explain(item: Any) -> str:
    parts = [part for part in item["loc"] if part not in ("int", "literal['auto']", "constrained-int")]
    key = ".".join(part[:SHOWN] if isinstance(part, str) else shortened(part) for part in parts)
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    if instead := REMOVED.get(f"{plain}={item['input']}"):
        return f"{key} = {shortened(item['input'])} was removed: {instead}"
    if item["type"] == "extra_forbidden":
        if instead := REMOVED.get(plain):
            return f"{key} was removed: {instead}"
        known = known_keys() + list(Config.model_fields)
        near = difflib.get_close_matches(plain, known, n=1, cutoff=0.3)
        return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "")
    return f"{key} = {shortened(item['input'])}: {item['msg']}"


def load_config(path: str | Path | None) -> Config:
    """Read and validate a YAML file; None gives the defaults."""
    if path is None:
        return Config()
    tree = read_yaml(path) or {}
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: expected a mapping of sections such as 'model:' and 'data:', got {type(tree).__name__}"
        )
    return parse_config(tree, str(path))
