"""Commands about experts: assemble, profile, train, tune, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyonn.command import (
    AddressOption,
    ConfigOption,
    DaskAddressOption,
    EngineOption,
    JsonOption,
    MemoryOption,
    Report,
    RunArgument,
    WorkersOption,
    engine_options,
    run_stage,
    say,
    show,
    size_of,
)
from tinyonn.errors import InputError
from tinyonn.places import local_folder

if TYPE_CHECKING:
    from tinyonn.config import Config

app = typer.Typer()


@app.command()
def assemble(
    run: RunArgument,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    engine: EngineOption = "threads",
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    address: DaskAddressOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="Folder of the model, instead of the run's experts/.", metavar="FOLDER"
        ),
    ] = None,
    then_train: Annotated[
        bool, typer.Option("--then-train", help="Then profile the experts and train router and experts.")
    ] = False,
) -> None:
    """Keep the best weights of every tensor and write them as experts of a model that `transformers` loads."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.experts.assemble import assemble_run

        chosen = engine_options(engine, workers, memory, address)
        report = assemble_run(location, settings.model, settings.experts, chosen, output)
        if not then_train:
            return report
        if output is not None:
            raise InputError("--then-train trains the run's experts/; leave out --output")
        show(report)
        return profile_and_train(location, settings, address)

    run_stage("assemble", run, config, as_json, stage)


@app.command()
def profile(
    run: RunArgument,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Instead of record.workers.")
    ] = None,
    address: AddressOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew, whatever profile is there.")] = False,
) -> None:
    """Measure what every expert does on every sample: what the router learns from first."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.profile.stage import profile_options, profile_run

        return profile_run(
            location, settings, profile_options(settings, fresh, workers), address=address, tell=say
        )

    run_stage("profile", run, config, as_json, stage)


TrainWorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes or GPUs; else one, on a cluster all.")
]


@app.command()
def train(
    run: RunArgument,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    workers: TrainWorkersOption = None,
    memory: MemoryOption = None,
    address: AddressOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder of the model, instead of the run's model/.", metavar="FOLDER"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the checkpoints.")] = False,
) -> None:
    """Train a router and the experts to do what the dense model does; goes on from the newest checkpoint."""

    def stage(location: str, settings: Config) -> Report:
        return _train(location, settings, output, workers, memory, address, fresh)

    run_stage("train", run, config, as_json, stage)


@app.command()
def tune(
    run: RunArgument,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Of the study in all.")] = 20,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of each trial's training.")] = 60,
    workers: TrainWorkersOption = None,
    memory: MemoryOption = None,
    address: AddressOption = None,
) -> None:
    """Search learning rates and loss weights over short trainings (needs Optuna: the extra `tune`)."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.train.plan import train_stage_options
        from tinyonn.train.tune import TuneOptions, tune_train

        options = train_stage_options(settings, address=address, memory=size_of(memory))
        return tune_train(location, settings, options, TuneOptions(trials, steps, workers=workers), say)

    run_stage("tune", run, config, as_json, stage)


def _train(
    location: str,
    settings: Config,
    output: Path | None = None,
    workers: int | None = None,
    memory: str | None = None,
    address: str | None = None,
    fresh: bool = False,
) -> Report:
    from tinyonn.train.plan import train_stage_options
    from tinyonn.train.stage import train_run

    options = train_stage_options(settings, output, workers, address, size_of(memory), fresh)
    return train_run(location, settings, options, say)


def profile_and_train(location: str, settings: Config, address: str | None = None) -> Report:
    """Profile an assembled run and train it, showing the first report; the report of the training."""
    from tinyonn.profile.stage import profile_options, profile_run

    show(profile_run(location, settings, profile_options(settings), address=address, tell=say))
    return _train(location, settings, address=address)


@app.command()
def export(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="hub (the sparse model), dense (a checkpoint of the base architecture), npz or parquet (masks).",
        ),
    ] = "hub",
    experts: Annotated[
        str | None,
        typer.Option("--experts", help="Numbers such as 0,4,17; the core is always there. Else all."),
    ] = None,
    slices: Annotated[
        str | None, typer.Option("--slices", help="Take the experts of these slices, such as python,prose.")
    ] = None,
    trained: Annotated[
        bool, typer.Option("--trained", help="The run's trained model, in place of the assembled one.")
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="The model, if it is not in the run's folder.", metavar="FOLDER"),
    ] = None,
) -> None:
    """Write a sparse model for others: for a hub, as a dense checkpoint that every tool reads, or as masks."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.dense.source import model_folder
        from tinyonn.evaluate.report import card_figures
        from tinyonn.evaluate.trained import trained_card_figures
        from tinyonn.experts.export import Assembled, export_model, numbers_of
        from tinyonn.store.lock import RunLock

        if trained and model is not None:
            raise InputError("--trained and --model exclude each other; give one")
        place = local_folder(location)
        source = model or place / ("model" if trained else "experts")
        with RunLock(place, shared=True, what="export"):
            assembled = Assembled(source)
            assembly = assembled.config["assembly"]
            numbers = numbers_of(experts, slices, assembled)
            if "training" in assembly:
                figures = trained_card_figures(place, assembly["id"])
            else:
                figures = card_figures(place, assembly.get("selection"))
            base = model_folder(settings.model, weights=False)
            return export_model(source, folder, format, numbers, base, figures)

    run_stage("export", run, config, as_json, stage, log=False)
