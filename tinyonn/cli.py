"""The command line: ``tinyonn STAGE RUN [--config FILE] [--json]``. Parses, validates, calls one stage.

A RUN without a slash is a run under ``storage.root``; with one, or as ``s3://...``, it is the place itself.
Exit codes: 0 done, 2 wrong use or input, 3 does not fit, 4 store busy or damaged, or Ray lost; 130 interrupted, and
128 and its number for other signals.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyonn import cli_evaluate, cli_experts, endings
from tinyonn.command import (
    AddressOption,
    BudgetsOption,
    ConfigOption,
    DaskAddressOption,
    EngineOption,
    JsonOption,
    MemoryOption,
    MethodsOption,
    Report,
    RunArgument,
    SamplesOption,
    WorkersOption,
    engine_options,
    evaluated,
    fail,
    given,
    names_of,
    run_stage,
    say,
)
from tinyonn.errors import InputError
from tinyonn.places import local_folder

if TYPE_CHECKING:
    from tinyonn.config import Config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

app = typer.Typer(
    name="tinyonn",
    help="Record what every weight of a dense language model did, and build sparse experts from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def plan(
    run: RunArgument,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    vram: Annotated[
        str | None, typer.Option(help="Memory of one GPU, e.g. 8GiB, instead of this machine's.")
    ] = None,
    ram: Annotated[str | None, typer.Option(help="Free RAM, e.g. 32GiB, instead of this machine's.")] = None,
    disk: Annotated[
        str | None, typer.Option(help="Free disk space, e.g. 200GiB, instead of this machine's.")
    ] = None,
) -> None:
    """State what recording needs in VRAM, RAM and on disk, and refuse what does not fit; loads nothing."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.plan.facts import plan_run
        from tinyonn.show.sizes import parse_size

        limits = {name: parse_size(text, f"--{name}") for name, text in given(vram=vram, ram=ram, disk=disk)}
        return plan_run(location, local_folder(location), settings, limits)

    run_stage("plan", run, config, as_json, stage, log=False)


@app.command()
def doctor(
    run: Annotated[str, typer.Argument(help="A run; its disk is looked at.")] = "demo",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine: Python, Torch, GPUs, bitsandbytes, RAM, disk, Ray, store."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.doctor import examine

        return examine(local_folder(location))

    if not run_stage("doctor", run, config, as_json, stage, log=False).figures()["healthy"]:
        raise typer.Exit(InputError.exit_code)


@app.command()
def record(
    run: RunArgument,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    address: AddressOption = None,
) -> None:
    """Record the corpus through the model into the run's store; goes on where an earlier call stopped."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.record.driver import record

        return record(location, settings, address=address)

    run_stage("record", run, config, as_json, stage)


@app.command()
def merge(run: RunArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Average committed segments until each slice has one (as far as it is recorded)."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.run import merge_run

        return merge_run(location)

    run_stage("merge", run, config, as_json, stage)


@app.command()
def score(
    run: RunArgument,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    engine: EngineOption = "threads",
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    address: DaskAddressOption = None,
    tune: Annotated[
        int | None,
        typer.Option(
            "--tune", min=1, help="Search the weights, up to so many trials; needs the run's config."
        ),
    ] = None,
) -> None:
    """Put all that is recorded into one scored record and one affinity per weight."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.score.stage import score_run

        options = engine_options(engine, workers, memory, address)
        report = score_run(location, settings, options)
        if tune is not None:
            from tinyonn.evaluate.exponents import tune_run

            found = tune_run(location, settings, tune)
            say(
                f"after {found.trials} trials: score: {{weights: [{', '.join(map(str, found.config.exponents))}]}} "
                f"loses {found.loss:.4f} nats on the development split (default {found.default_loss:.4f})"
            )
            report = score_run(location, settings.model_copy(update={"score": found.config}), options)
        return report

    run_stage("score", run, config, as_json, stage)


@app.command()
def cluster(
    run: RunArgument,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    engine: EngineOption = "threads",
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    address: DaskAddressOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew instead of from the stored centres.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Folder for PNG and HTML pictures of the cells.", metavar="FOLDER"),
    ] = None,
) -> None:
    """Group weights into cells by which slices need them, the experts to be; new data leave cells their numbers."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.cluster.stage import cluster_run

        report = cluster_run(
            location, settings, engine_options(engine, workers, memory, address), fresh=fresh
        )
        if plot is not None:
            from tinyonn.cluster.plot import plot_cells

            say(f"pictures: {', '.join(map(str, plot_cells(location, settings, plot)))}")
        return report

    run_stage("cluster", run, config, as_json, stage)


@app.command()
def status(run: RunArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show what is committed: samples per slice, live segments, samples set aside, disk use."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.status import read_status

        return read_status(location)

    run_stage("status", run, config, as_json, stage, log=False)


@app.command()
def pipeline(
    run: RunArgument,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    skip: Annotated[
        str | None, typer.Option("--skip", help="Stages to leave out, such as profile,train,trained.")
    ] = None,
    methods: MethodsOption = None,
    budgets: BudgetsOption = None,
    samples: SamplesOption = None,
) -> None:
    """Every stage, one after another, from the corpus to a trained model; goes on where an earlier call stopped."""
    from tinyonn.pipeline import check_stages, run_pipeline

    skipped = names_of(skip)
    try:
        check_stages(skipped)  # before there is a log, and so a folder
    except InputError as error:
        fail(error)

    def stage(location: str, settings: Config) -> Report:
        return run_pipeline(location, settings, evaluated(methods, budgets, samples), skipped)

    run_stage("pipeline", run, config, as_json, stage)


@app.command()
def demo(
    full: Annotated[
        bool, typer.Option("--full", help="A quarter of an hour instead of five minutes.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """From the shipped corpus and model to a trained sparse one that generates: every stage, one after another."""
    name = "demo-full" if full else "demo"
    config = CONFIGS / f"{name}.yaml"

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.pipeline import DEMO, FULL_DEMO, run_pipeline

        return run_pipeline(location, settings, FULL_DEMO if full else DEMO)

    if not config.is_file():
        fail(
            InputError(
                f"{config} is missing; run the demo from a clone, or `tinyonn record RUN --config FILE`"
            )
        )
    run_stage("demo", name, config, as_json, stage)


app.add_typer(cli_experts.app)
app.add_typer(cli_evaluate.app)


def main() -> None:
    """Entry point of the ``tinyonn`` script and of ``python -m tinyonn``."""
    endings.take_signals()
    try:
        app()
    except SystemExit as reason:
        endings.finish(reason.code if isinstance(reason.code, int) else int(reason.code is not None))
    finally:
        endings.leave()
