"""The configuration: one YAML file, one tree of typed classes. Unknown keys are refused."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from tinyonn.errors import InputError

Auto = Literal["auto"]
Score = Literal["root", "S", "seed", "activation", "magnitude", "wanda", "energy", "wg", "gblm", "random"]

# Weights of act, grad and freq in S = act z(act) - grad z(grad) + freq z(freq).
SCORE_PRESETS = {"default": (1.0, 0.0, 1.0), "seed": (1.0, 1.0, 1.0), "activation": (1.0, 0.0, 0.0)}


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """The dense model that is recorded."""

    path: str = "reference"  # a hub name, a folder, or "reference" for the model that ships with the project
    revision: str | None = None
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpointing: bool = (
        False  # recompute the layers' activations in the backward pass instead of keeping them
    )


class DataConfig(Section):
    """The corpus that is fed to the model, one sample at a time."""

    path: str = "reference"  # .jsonl, .parquet, a folder of either, a `datasets` name, or "reference"
    name: str | None = None  # configuration of a `datasets` name
    split: str = "train"
    text: str | None = None  # column of plain text
    messages: str | None = None  # column of chat messages; labels are the assistant's turns
    slice: str | None = None  # column that names the slice; without it slices are derived
    slices: int = Field(8, ge=1, le=16)  # how many slices to derive
    max_tokens: PositiveInt = 2048
    samples: PositiveInt | None = None  # take this many, evenly over the slices; null takes all
    seed: int = 0  # of the stored order and of derived slices


class RecordConfig(Section):
    """How the recorder works; all but `workers` decides the bits of the result."""

    segment: PositiveInt | Auto = "auto"  # samples per segment
    workers: PositiveInt | Auto = "auto"
    threads: PositiveInt = 1  # CPU threads of one worker
    windows: PositiveInt | Auto = "auto"  # passes over a segment, each recording some of the layers
    calibration: int = Field(32, ge=1)  # samples that set the levels' bases
    max_live: int = Field(3, ge=1)  # live segments per slice while recording, beside those in flight
    seed: int = 0  # of the dithering


class ScoreConfig(Section):
    """How weights are scored: S = act z(act) - grad z(grad) + freq z(freq)."""

    preset: Literal["default", "seed", "activation"] = "default"
    act: float | None = None  # in place of the preset's
    grad: float | None = None
    freq: float | None = None

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

    score: float = Field(1.0, ge=0, allow_inf_nan=False)
    act: float = Field(1.0, ge=0, allow_inf_nan=False)
    grad: float = Field(1.0, ge=0, allow_inf_nan=False)
    freq: float = Field(0.5, ge=0, allow_inf_nan=False)
    slice: float = Field(2.0, ge=0, allow_inf_nan=False)  # dominant slice, scaled by selectivity
    layer: float = Field(0.5, ge=0, allow_inf_nan=False)
    kind: float = Field(0.25, ge=0, allow_inf_nan=False)
    row: float = Field(
        0.0, ge=0, allow_inf_nan=False
    )  # position in 16 buckets; neurons have no order of their own
    column: float = Field(0.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _some_weight(self) -> FeatureWeights:
        if not any(self.model_dump().values()):
            raise ValueError("all features weigh 0; give at least one a weight")
        return self


class ClusterConfig(Section):
    """How weights are clustered into cells."""

    cells: int = Field(100, ge=2, le=255)
    features: FeatureWeights = FeatureWeights()
    trunk: tuple[str, ...] = ("norm", "bias", "embedding", "head")  # kinds in no cell; also such as q_proj
    cap: float | None = Field(None, gt=1, allow_inf_nan=False)  # largest cell, as a multiple of the mean size
    iterations: int = Field(300, ge=1)  # of full k-means, at most
    tolerance: float = Field(1e-5, ge=0, lt=1)  # share of weights that may still change cell in the last one
    seed: int = 0


class ExpertsConfig(Section):
    """Which weights are kept, and how the experts they become are switched on."""

    budget: float = Field(
        0.315, gt=0, allow_inf_nan=False
    )  # share of the linear weights; above 1 their number
    score: Score = "root"  # what the kept ones are best in; root is |W| times the root of its gradient
    within: Literal["cell", "tensor", "row"] = "cell"  # what competes
    balance: float = Field(0.02, ge=0, le=1)  # within cells: how far a cell's part follows its size
    allocation: Literal["auto", "global", "uniform", "outlier"] = "auto"  # of the budget across tensors
    core: float = Field(0.5, ge=0, le=1)  # share of the budget that is always on
    seed: int = 0  # of ties
    top_k: PositiveInt | None = None  # experts on for a prompt; null switches all on
    reroute_every: PositiveInt | None = None  # tokens after which a router chooses again; null: never


class EvaluateConfig(Section):
    """What the cut models are measured on, and beside what."""

    data: DataConfig | None = None  # held-out data; null: the held-out split of the reference corpus
    samples: PositiveInt | None = 252  # of them, evenly over the slices; null takes all
    methods: tuple[str, ...] = (
        "default", "S", "seed", "activation", "magnitude", "wanda", "wg", "gblm", "random", "sparsegpt",
        "default+update",
    )  # fmt: skip
    budgets: tuple[float, ...] = (0.5, 0.315, 0.25, 0.1)
    calibration: PositiveInt = 112  # recorded samples for methods that update weights
    oracle: str | None = "wg"  # score of masks made of one slice each; null leaves them out


class StorageConfig(Section):
    """Where runs live."""

    root: str = "storage"  # a folder, or s3://bucket/prefix


class TrackConfig(Section):
    """Where metrics go besides the log."""

    tensorboard: bool = False  # event files under the run's folder
    wandb: str | None = (
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
    evaluate: EvaluateConfig = EvaluateConfig()
    storage: StorageConfig = StorageConfig()
    track: TrackConfig = TrackConfig()


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All option names, dotted and sorted: ``data.max_tokens``, ``data.messages``, ..."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
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
        Names the key or value, what is allowed, and for an unknown key the nearest known one.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{origin}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Any) -> str:
    key = ".".join(
        str(part) for part in item["loc"] if part not in ("int", "literal['auto']", "constrained-int")
    )
    if item["type"] == "extra_forbidden":
        known = known_keys() + list(Config.model_fields)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
        return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "")
    return f"{key} = {item['input']!r}: {item['msg']}"


def load_config(path: str | Path | None) -> Config:
    """Read and validate a YAML file; None gives the defaults."""
    if path is None:
        return Config()
    try:
        tree = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable YAML file ({error}); see configs/ for examples") from None
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: expected a mapping of sections such as 'model:' and 'data:', got {type(tree).__name__}"
        )
    return parse_config(tree, str(path))
