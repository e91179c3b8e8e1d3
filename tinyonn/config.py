"""The configuration: one YAML file, one tree of typed classes. Unknown keys are refused."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from tinyonn.errors import InputError

Auto = Literal["auto"]


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
