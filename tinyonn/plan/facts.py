"""The facts that a plan is made from: of model, data and machine. Reads no weights and no texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyonn.checks import check_model, check_teacher
from tinyonn.config import Config, DataConfig, MixedSource, ModelConfig, SourceConfig
from tinyonn.dense.parameters import Parameter, list_parameters, list_uses
from tinyonn.errors import InputError, StoreDamagedError
from tinyonn.machine import Device, free_disk, free_ram, gpus, usable_cpus
from tinyonn.plan.demands import DataFacts, Machine, ModelFacts
from tinyonn.plan.recording import RecordPlan, plan_record

if TYPE_CHECKING:
    from tinyonn.corpus.file import Corpus

ASSUMED_SAMPLES = 65_536
ASSUMED_FILL = 0.5  # mean length of a sample as a share of data.max_tokens


def plan_run(location: str, folder: Path, config: Config, limits: dict[str, int]) -> RecordPlan:
    """Plan a run on this machine, or on one with other limits.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    folder : Path
        The run's local folder.
    config : Config
    limits : dict
        Bytes of ``vram``, ``ram`` and ``disk`` that replace what is free here.

    Raises
    ------
    InputError
        The model cannot be recorded, or a GPU is asked for that is not there; options that do not fit the model.
    CapacityError
        It does not fit.
    """
    parameters, model = describe_model(config.model)
    check_model(config, parameters)
    if config.train.teacher_model is not None:
        check_teacher(config.train.loss.hidden, model, describe_model(config.train.teacher_model)[1])
    machine = describe_machine(config.model.device, folder, limits)
    if location.startswith("s3://"):
        machine = replace(machine, disk=limits.get("disk"))
    return plan_record(parameters, model, describe_data(config.data, folder), machine, config.record)


def plan_recording(
    config: Config, corpus: Corpus, device: Device, places: int, ram: int, folder: Path
) -> RecordPlan:
    """Plan a run on a Ray cluster.

    Parameters
    ----------
    config : Config
    corpus : Corpus
    device : str
        ``cpu`` or ``cuda``.
    places : int
        Workers that the cluster can hold by its GPUs or CPUs.
    ram : int
        Free bytes of all its machines.
    folder : Path
        The run's local folder.

    Raises
    ------
    InputError
        The model cannot be recorded.
    CapacityError
        It does not fit.
    """
    parameters, model = describe_model(config.model)
    data = DataFacts(len(corpus), corpus.mean_tokens, corpus.max_tokens, len(corpus.slices))
    vram = min((gpu.free for gpu in gpus()), default=None) if device == "cuda" else None
    disk = None if config.storage.root.startswith("s3://") else free_disk(folder)
    cpus = places * config.record.threads if device == "cpu" else places
    return plan_record(parameters, model, data, Machine(device, vram, ram, disk, cpus), config.record)


def describe_model(config: ModelConfig) -> tuple[list[Parameter], ModelFacts]:
    """List the parameters and what the memory depends on, from ``config.json`` alone."""
    from tinyonn.dense.load import recordable_shape
    from tinyonn.dense.source import describe_origin

    shape: Any = recordable_shape(config)
    uses = [use.parameter_name for use in list_uses(shape)]
    parameters = list_parameters(shape)
    settings = shape.config.get_text_config()
    try:
        hidden, layers = int(settings.hidden_size), int(settings.num_hidden_layers)
    except (AttributeError, TypeError):
        raise InputError(
            f"{config.path}: the settings of model_type {settings.model_type!r} have no hidden_size or no "
            "num_hidden_layers, so that what it takes cannot be planned; choose another model"
        ) from None
    names = ("intermediate_size", "n_inner", "ffn_dim")
    inner = next((size for name in names if (size := getattr(settings, name, None))), 4 * hidden)
    facts = ModelFacts(
        name=config.path,
        layers=layers,
        hidden=hidden,
        intermediate=int(inner),
        vocabulary=int(settings.vocab_size),
        quantization=config.quantization,
        dtype_bytes={"bfloat16": 2, "float32": 4}[config.dtype],
        checkpointing=config.checkpointing,
        tied=frozenset(name for name in uses if uses.count(name) > 1),
        origin=describe_origin(config),
    )
    return parameters, facts


def describe_data(config: DataConfig, folder: Path) -> DataFacts:
    """Samples, tokens, slices: as tokenised if the run has begun, else counted, else assumed and said so."""
    corpus = _tokenised(folder / "corpus.arrow")
    if corpus is not None and len(corpus.header.described) in (
        0,
        len(config.origins()),
    ):  # else sources were added
        read = tuple(corpus.header.described)
        return DataFacts(len(corpus), corpus.mean_tokens, corpus.max_tokens, len(corpus.slices), forms=read)
    rows = _rows(config)
    mean = ASSUMED_FILL * config.max_tokens
    assumed = [f"{mean:,.0f} tokens a sample, half of data.max_tokens"]
    if rows is None:
        rows = config.samples or ASSUMED_SAMPLES
        which = "data.samples" if config.samples else "a figure for want of one: data.samples is not set"
        assumed.insert(0, f"{rows:,} samples ({which}; the data are not counted)")
    samples = min(rows, config.samples or rows)
    slices = max(config.slices if config.path else 1, len(config.sources))
    if any(origin.slice or origin.path == "reference" for origin in config.origins()):
        assumed.append(f"{slices} slices (the column is not counted)")
    return DataFacts(max(1, samples), mean, config.max_tokens, slices, tuple(assumed), _forms(config))


def describe_machine(device: str, folder: Path, limits: dict[str, int]) -> Machine:
    """What is free on this machine, or what `limits` says instead."""
    import torch

    found = [] if device == "cpu" or "vram" in limits or torch.version.cuda is None else gpus()
    if device == "cuda" and not found and "vram" not in limits:
        raise InputError(
            "model.device = 'cuda' but there is no usable GPU; use model.device: auto, or plan with --vram 8GiB"
        )
    ram, disk = limits.get("ram", free_ram()), limits.get("disk", free_disk(folder))
    if device == "cpu" or not (found or "vram" in limits):
        return Machine("cpu", None, ram, disk, usable_cpus())
    vram = limits.get("vram", min((gpu.free for gpu in found), default=0))
    return Machine("cuda", vram, ram, disk, max(1, len(found)))


def _forms(config: DataConfig) -> tuple[str, ...]:
    """What the columns of each source here are, from its first rows; those on the hub are not fetched."""
    from tinyonn.corpus.rows import Source

    local = [
        origin for origin in config.origins() if origin.path == "reference" or Path(origin.path).exists()
    ]
    return tuple(f"{origin.path}: {Source(origin).form}" for origin in local)


def _tokenised(path: Path) -> Corpus | None:
    """The corpus of a run that has begun; one that is damaged is made anew when it is needed."""
    from tinyonn.corpus.file import Corpus

    try:
        return Corpus(path) if path.is_file() else None
    except StoreDamagedError:
        return None


def _rows(config: DataConfig) -> int | None:
    """Rows that the sources give, where their files or the options tell."""
    total = 0
    for origin in config.origins():
        counted = _parquet_rows(origin)
        if isinstance(origin, MixedSource):
            counted = origin.samples if counted is None else origin.most(counted)
        if counted is None:
            return None
        total += counted
    return total


def _parquet_rows(config: SourceConfig) -> int | None:
    if config.path == "reference":
        from tinyonn.corpus.rows import REFERENCE_CORPUS

        files = [REFERENCE_CORPUS / f"{config.split}.parquet"]
    else:
        from tinyonn.corpus.files import content_of, find_files

        path = Path(config.path).expanduser()
        files = find_files(path, config.split)[0] if path.is_dir() else [path]
        if any(content_of(file) != "parquet" for file in files):
            return None
    if not files or not all(file.is_file() for file in files):
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return sum(int(pq.read_metadata(file).num_rows) for file in files)
    except (pa.ArrowException, OSError):
        return None
