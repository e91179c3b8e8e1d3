"""The configuration: one YAML file, one tree of typed classes. Unknown keys are refused."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from tinyonn.checks import Preset, contradictions
from tinyonn.errors import InputError
from tinyonn.options import (
    BelowOne,
    Budget,
    Count,
    Factor,
    Number,
    Place,
    Rate,
    Section,
    Seed,
    Share,
    Signed,
    Some,
    Text,
    Threads,
    Weight,
    Width,
    Windows,
    fixed,
    fixed_in,
    known_options,
    option,
    page,
)
from tinyonn.show.escape import SHOWN, shortened
from tinyonn.yaml_text import read_yaml

Auto = Literal["auto"]

TOLD = 5  # faults that a message names

# Options that were, and values of options (`key=value`): what to do instead. Older runs' saved options may name them.
REMOVED: dict[str, str] = {
    **dict.fromkeys(("router.threshold", "router.max_k"), "router.top_k says how many experts are on"),
    "train.loss.specificity": "experts by need differ as they are made, and the warm start teaches the router",
    "router.gate": "a chosen expert works with gate 1, as in the dense model",
    "evaluate.oracle": "leave it out; masks of one slice are not evaluated any more",
    "experts.allocation=outlier": "it was worse than uniform; use auto, global or uniform",
    "experts.by": "leave it out; the cells of `tinyonn cluster` are the experts, by which slices need their weights",
    "experts.count": "the cells are the experts; cluster.cells says how many",
    "cluster.cap": "leave it out; cells hold about equally many of the weights that are kept",
    "cluster.trunk": "leave it out; what can be cut is clustered",
    **dict.fromkeys(("cluster.iterations", "cluster.tolerance"), "leave it out; centres are of a sample"),
    "cluster.features.slice": "cluster.features.need is the weight of what slices need",
    "experts.balance": "leave it out; weights compete within a tensor, whatever their cells",
    "experts.core_by": "leave it out; the core is the best of what is kept",
    "experts.within": "leave it out; weights compete within a tensor",
    "profile.prompt_tokens": "experts are chosen from the first 64 tokens of a text; leave it out",
    "profile.excerpt": "160 characters of each sample are kept; leave it out",
    "router.branches": "10 are found in the profile; leave it out",
    "router.width": "the encoder has 128 features; leave it out",
    "score.preset": "give score.weights",
    "experts.score": "a run is cut by what it was scored by: give score.weights and run `tinyonn score` again",
    **{f"score.{name}": "give score.weights, of act, grad and freq" for name in ("act", "grad", "freq")},
    "train.seed": "it is 0; leave it out",
    "train.prompt_loss": "the prompt's own tokens count; leave it out",
    "train.precision": "products are bfloat16, what is trained is held in float32; leave it out",
    "train.temperature": "the distillation's is 1; leave it out",
    "train.warm_start_lr": "it is 0.003; leave it out, or search it with `tinyonn tune`",
    "train.clip": "gradients are clipped to a norm of 1; leave it out",
    "train.keep": "the latest two checkpoints are kept; leave it out",
    "train.schedule": "learning rates rise over a twentieth of the steps and fall over the last half; leave it out",
    "train.loss.kl": "it is 1, to which the other weights are relative; leave it out",
    "train.loss.z": "it is 0.001; leave it out",
    "train.loss.profile": "the router learns from the profile in the warm start alone; leave it out",
    **{
        f"train.stages.{end}": "experts on are at least half and at most twice as many"
        for end in ("least", "most")
    },
    "train.optimizers.router": "its matrices learn by Muon in the warm start; leave it out",
    "train.optimizers.router_lr": "the router is held after the warm start; leave it out",
    "train.optimizers.router_decay": "it is 0.01; leave it out",
    "train.optimizers.experts": "experts learn by Muon; leave it out",
    **dict.fromkeys(
        (f"train.optimizers.{part}_decay" for part in ("experts", "trunk")), "nothing decays; leave it out"
    ),
}

# a, b, c, d of S by name; the source is the first idea: high activation, low gradient, high frequency.
PRESETS: dict[str, tuple[float, float, float, float]] = {
    "balanced": (0.5, 0.75, 0.0, 1.0),
    "root": (0.0, 0.5, 0.0, 1.0),
    "wanda": (1.0, 0.0, 0.0, 1.0),
    "wg": (0.0, 1.0, 0.0, 1.0),
    "magnitude": (0.0, 0.0, 0.0, 1.0),
    "source": (1.0, -1.0, 1.0, 1.0),
}


class ModelConfig(Section):
    """The dense model that is recorded."""

    path: Place = option(
        "reference", "a hub name, a folder, a GGUF file, or the model that is shipped", first=True
    )
    revision: Text | None = option(None, "commit or tag of a hub name")
    quantization: Literal["nf4", "none"] = option("nf4", "of the weights while recording")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "of what is computed")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU if there is one", first=True)
    checkpointing: bool = option(
        False, "compute activations again in the backward pass: less memory, more time"
    )


DataFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "query-response", "preference",
    "text",
]  # fmt: skip


class SourceConfig(Section):
    """Where rows come from, and what their columns are."""

    path: Place = option(
        "reference",
        "a file or folder, a name that `datasets` knows, or the corpus that is shipped",
        first=True,
    )
    name: Text | None = option(None, "configuration of a name that `datasets` knows")
    split: Text = option("train", "of a data set")
    format: DataFormat = option("auto", "how columns are read (docs/data.md); auto: as they are named")
    text: Text | None = option(None, "column of plain text, of which all tokens are labelled")
    messages: Text | None = option(
        None, "column of chat messages, of which the assistant's tokens are labelled"
    )
    slice: Text | None = option(None, "column that names the slice; null: slices are derived", first=True)


class MixedSource(SourceConfig):
    """One of several sources; without a slice's name or column it is a slice called like its file."""

    slice_name: Text | None = option(None, "the slice that all its rows are", min_length=1)
    samples: Count | None = option(None, "take so many of it, evenly over its slices; null: all")
    share: Some | None = fixed(None, "take this share of its rows", "give samples")

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

    sources: tuple[MixedSource, ...] = ()  # `data: [...]` is short for `data: {sources: [...]}`
    slices: int = option(8, "how many slices to derive", ge=1, le=16)
    max_tokens: Count = option(2048, "of a sample; longer ones are cut", first=True)
    samples: Count | None = option(None, "take so many, evenly over the slices; null: all", first=True)
    seed: Seed = fixed(0, "of the stored order and of derived slices")
    rendered: bool = option(False, "texts are rendered conversations, whose special tokens are read as such")

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
    """How the recorder works; all but `workers` and `windows` decides the bits of the result."""

    segment: Width | Auto = option("auto", "samples per segment; auto: as a model of the cost says")
    workers: Threads | Auto = option("auto", "recorders; auto: as many as GPUs, or as CPUs and RAM allow")
    threads: Threads = fixed(1, "CPU threads of a worker")
    windows: Windows | Auto = option("auto", "passes over a segment, each recording some of the layers")
    calibration: Width = fixed(32, "samples that set the levels' bases")
    max_live: Width = option(3, "segments per slice on the disk while recording, beside those in flight")
    seed: Seed = fixed(0, "of the dithering")


class ScoreConfig(Section):
    """What a weight is worth, by which it is kept: S = a log2 rms + b log2 g + c share + d log2 |W|."""

    # rms is that of its input, g the size of its gradient, share that of the samples in which it was active.
    weights: Preset | tuple[Signed, Signed, Signed, Weight] = option(
        "balanced", "a, b, c and d in S, or a name: balanced is 0.5, 0.75, 0, 1"
    )

    @property
    def exponents(self) -> tuple[float, float, float, float]:
        """The four numbers."""
        return PRESETS[self.weights] if isinstance(self.weights, str) else self.weights

    @model_validator(mode="before")
    @classmethod
    def _of_four(cls, tree: Any) -> Any:
        weights = tree.get("weights") if isinstance(tree, dict) else None
        if isinstance(weights, list | tuple) and len(weights) != 4:
            raise ValueError(
                f"score.weights has {len(weights)} numbers; give four, of its input's size, its gradient's, its share "
                f"of samples and its own size, or one of {', '.join(PRESETS)}"
            )
        return tree

    @model_validator(mode="after")
    def _some_weight(self) -> ScoreConfig:
        if not any(self.exponents):
            raise ValueError(f"the weights are {self.weights}; at least one must not be 0")
        return self


class FeatureWeights(Section):
    """Weight of each group of features in the distance between weights; 0 leaves a group out."""

    need: Weight = Field(
        1.0, gt=0
    )  # of each slice: the logarithm of the budget under which it keeps the weight
    score: Weight = 0.0
    act: Weight = 0.0
    grad: Weight = 0.0
    freq: Weight = 0.0
    layer: Weight = 0.0
    kind: Weight = 0.0
    row: Weight = 0.0  # position in 16 buckets; neurons have no order of their own
    column: Weight = 0.0


class ClusterConfig(Section):
    """How weights are clustered into cells, which become the experts."""

    cells: int = option(100, "how many, and so how many experts", ge=1, le=254)
    features: FeatureWeights = fixed(FeatureWeights(), "weights of the features in the distance")
    even: bool = fixed(True, "cells hold about equally many of the weights that are kept")
    seed: Seed = fixed(0, "of the sample and of the first centres")


class ExpertsConfig(Section):
    """Which weights are kept, and how the experts they become are switched on."""

    budget: Budget = option(0.315, "share of the linear weights to keep; above 1 their number", first=True)
    allocation: Literal["auto", "global", "uniform"] = fixed(
        "auto",
        "of the budget across tensors: what `tinyonn evaluate --allocate` found, else one cut through all",
    )
    core: Share = option(0.1, "share of the budget that is always on")
    seed: Seed = fixed(0, "of ties")
    top_k: Width | None = fixed(
        None,
        "experts on for a prompt without a router",
        "all are; set top_k in the assembled model's config.json",
    )
    reroute_every: Count | None = fixed(
        None, "tokens after which a router chooses again",
        "it never does; set reroute_every in the model's config.json",
    )  # fmt: skip


class EvaluateConfig(Section):
    """What the cut models are measured on, and beside what."""

    data: DataConfig | None = option(None, "held-out data, with the keys of data; null: the shipped corpus's")
    samples: Count | None = fixed(252, "held-out samples", "give `tinyonn evaluate --samples`")
    methods: tuple[Text, ...] = fixed((
        "default", "root", "source", "magnitude", "wanda", "wg", "gblm", "random", "sparsegpt",
        "default+update", "magnitude+uniform", "wanda-float+uniform", "sparsegpt+uniform",
    ), "ways to choose weights", "give `tinyonn evaluate --methods`")  # fmt: skip
    budgets: tuple[Budget, ...] = fixed(
        (0.5, 0.315, 0.25, 0.1), "what is kept", "give `tinyonn evaluate --budgets`"
    )
    calibration: Width = fixed(112, "recorded samples for methods that need some")


class ProfileConfig(Section):
    """What each expert does on each sample is measured on these."""

    samples: Count | None = option(560, "of the recorded ones, evenly over the slices; null: all")


class RouterConfig(Section):
    """The router that chooses experts for a prompt."""

    top_k: Width | None = option(
        10, "experts on for a prompt, the shared ones not counted; null: all", first=True
    )
    shared: Number = option(0, "experts that are always on: the strong and even ones of the profile")


class LossConfig(Section):
    """What each part of the loss counts."""

    ce: Weight = option(0.1, "of the text itself, beside 1 for the dense model's distribution")
    hidden: Weight = option(0.1, "of every layer's output against the dense model's")
    balance: Weight = option(0.0, "of the experts' even load")


class RoutingConfig(Section):
    """How experts are chosen while training."""

    ks: tuple[int, ...] = option(
        (10, 25, 50, 0), "each sample draws one: so many experts on, 0 is all; empty: router.top_k"
    )
    noise: Weight = option(0.0, "on the scores, standard deviation")
    dropout: BelowOne = option(0.0, "share of the experts that a step does without")
    capacity: Factor | None = option(None, "of an expert, in even shares of a batch")
    bias_rate: Rate = option(0.0, "of the bias that balances the load; 0: none")


class StagesConfig(Section):
    """Stage 1 lets all experts learn and updates the least surprised; stage 2 trains what is on."""

    first: Share = option(0.0, "share of the steps in stage 1")
    act_k: Number = option(0, "stage 1: experts with gradients; 0: all")
    min_k: Number = option(0, "stage 1: of these the least surprised are updated; 0: all")
    grow: Weight = option(0.0, "stage 2: how the number of experts follows surprise")
    integrity: bool = option(False, "stage 2: learning rates follow predictive integrity")


class OptimizersConfig(Section):
    """What is trained by which rule; rates are peaks."""

    experts_lr: Rate = option(1e-3, "of the experts, by Muon")
    trunk_lr: Rate = option(0.0, "of embeddings and head; 0 freezes them")
    norms_lr: Rate = option(3e-3, "of norms and biases; 0 freezes them")


class TrainConfig(Section):
    """How router and experts are trained against the dense model."""

    data: DataConfig | None = option(None, "with the keys of data; null: all that the run was recorded from")
    steps: Count = option(400, "of the training", first=True)
    batch: Width = option(16, "samples of a step, all workers together")
    micro_batch: Width = option(8, "samples of them at a time in memory")
    warm_start: Number = option(
        200, "steps before the first in which the router alone learns from the profile"
    )
    checkpoint_every: Count = option(50, "steps between checkpoints")
    teacher: Literal["live", "cached"] = option(
        "live", "cached: its most probable tokens are kept on the disk (loss.hidden must be 0)"
    )
    teacher_model: ModelConfig | None = option(None, "with the keys of model; null: the dense model itself")
    loss: LossConfig = LossConfig()
    routing: RoutingConfig = RoutingConfig()
    stages: StagesConfig = StagesConfig()
    optimizers: OptimizersConfig = OptimizersConfig()


class StorageConfig(Section):
    """Where runs live."""

    root: Place = option("storage", "a folder, or s3://bucket/prefix", first=True)


class TrackConfig(Section):
    """Where metrics go besides the log."""

    tensorboard: bool = option(False, "event files under the run's folder")
    wandb: Text | None = option(None, "project of a tracker with the client of W&B")


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


def known_keys() -> list[str]:
    """All option names, dotted and sorted: ``data.max_tokens``, ``data.messages``, ..."""
    return sorted(name for name, _ in known_options(Config))


def parse_config(tree: dict[str, Any], origin: str = "configuration", whole: bool = False) -> Config:
    """Validate a nested dict.

    Parameters
    ----------
    tree : dict
    origin : str
        Named in errors.
    whole : bool
        Take values as well that are fixed in a user's configuration: the tree is not a user's.

    Raises
    ------
    InputError
        Names the key or value, what is allowed, and for an unknown key the nearest known one, for one that was removed
        what to do instead; or options that contradict each other.
    """
    wrong = [] if whole else list(fixed_in(tree, Config))
    if not wrong:
        try:
            config = Config.model_validate(tree)
        except ValidationError as error:
            wrong = [_explain(item) for item in error.errors(include_url=False)]
        else:
            wrong = list(contradictions(config))
    if wrong:
        more = [f"and {len(wrong) - TOLD:,} more"] if len(wrong) > TOLD else []
        raise InputError(f"{origin}: " + "; ".join([*wrong[:TOLD], *more]))
    return config


def _explain(item: Any) -> str:
    parts = [part for part in item["loc"] if part not in ("int", "literal['auto']", "constrained-int")]
    key = ".".join(part[:SHOWN] if isinstance(part, str) else shortened(part) for part in parts)
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    if isinstance(item["input"], str) and (instead := REMOVED.get(f"{plain}={item['input']}")):
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


if __name__ == "__main__":
    print(page(Config), end="")
