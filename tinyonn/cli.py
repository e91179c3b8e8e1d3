"""The command line: ``tinyonn STAGE RUN [--config FILE] [--json]``. Parses, validates, calls one stage.

A RUN without a slash is a run under ``storage.root``; with one, or as ``s3://...``, it is the place itself.
Exit codes: 0 done, 2 wrong use or input, 3 does not fit, 4 store busy or damaged, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Protocol

import typer

from tinyonn.errors import CapacityError, InputError, TinyONNError
from tinyonn.places import local_folder, run_location

if TYPE_CHECKING:
    from rich.table import Table

    from tinyonn.config import Config
    from tinyonn.engine import EngineOptions

INTERRUPTED = 130
DEMO_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"

RunArgument = Annotated[str, typer.Argument(help="A run under storage.root, or its folder or s3:// address.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="One YAML file; see configs/.", metavar="FILE")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object as the last line; progress goes to stderr.")
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster to use, e.g. auto or 192.168.1.10:6379; else a local Ray."),
]

app = typer.Typer(
    name="tinyonn",
    help="Record what every weight of a dense language model did, and build sparse experts from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Report(Protocol):
    """What a stage returns."""

    def figures(self) -> dict[str, Any]:
        """The stage's own figures, as JSON values."""

    def table(self) -> Table:
        """The same for people."""


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
        from tinyonn.planning import plan_run
        from tinyonn.sizes import parse_size

        limits = {name: parse_size(text, f"--{name}") for name, text in _given(vram=vram, ram=ram, disk=disk)}
        return plan_run(location, local_folder(location), settings, limits)

    _run_stage("plan", run, config, as_json, stage, log=False)


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

    if not _run_stage("doctor", run, config, as_json, stage, log=False).figures()["healthy"]:
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

    _run_stage("record", run, config, as_json, stage)


@app.command()
def merge(run: RunArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Average committed segments until each slice has one (as far as it is recorded)."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.merging import merge_run

        return merge_run(location)

    _run_stage("merge", run, config, as_json, stage)


EngineOption = Annotated[
    str, typer.Option("--engine", help="Where Dask runs the tasks: threads, distributed or ray.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Tasks at a time; else one per CPU, of threads two.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", help="RAM that the stage may use, e.g. 2GiB, instead of what is free."),
]
DaskAddressOption = Annotated[
    str | None, typer.Option("--address", help="Of a Dask scheduler or a Ray cluster; else a local one.")
]


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
            "--tune", min=1, help="Search the weights first, up to so many trials; needs the run's config."
        ),
    ] = None,
) -> None:
    """Put all that is recorded into one scored record and one affinity per weight."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.score.stage import score_run

        scores = settings.score
        if tune is not None:
            from tinyonn.score.tune import tune_run

            found = tune_run(location, settings, tune)
            scores = found.config
            _say(
                f"after {found.trials} trials: score: {{act: {scores.act:.3f}, grad: {scores.grad:.3f}, "
                f"freq: {scores.freq:.3f}}} agrees with |w g| by {found.agreement:.4f} "
                f"(default {found.default_agreement:.4f})"
            )
        return score_run(location, scores, _engine(engine, workers, memory, address))

    _run_stage("score", run, config, as_json, stage)


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
    """Group the scored weights into cells; after new data, starts from the stored centres and keeps their numbers."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.cluster.stage import cluster_run

        report = cluster_run(
            location, settings.cluster, _engine(engine, workers, memory, address), fresh=fresh
        )
        if plot is not None:
            from tinyonn.cluster.plot import plot_cells

            _say(
                f"pictures: {', '.join(str(path) for path in plot_cells(location, plot, settings.cluster.seed))}"
            )
        return report

    _run_stage("cluster", run, config, as_json, stage)


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
) -> None:
    """Keep the best weights of every cell and write them as experts of a model that `transformers` loads."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.experts.assemble import assemble_run

        chosen = _engine(engine, workers, memory, address)
        return assemble_run(location, settings.model, settings.experts, chosen, output)

    _run_stage("assemble", run, config, as_json, stage)


@app.command()
def evaluate(
    run: RunArgument,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    allocate: Annotated[
        bool,
        typer.Option(
            "--allocate",
            help="First search how experts.budget is best spread over the tensors, and keep that.",
        ),
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Instead of evaluate.methods, such as default,wanda,sparsegpt."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="Instead of evaluate.budgets, such as 0.5,0.315.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Instead of evaluate.samples.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw loss against kept share into the run.")] = False,
) -> None:
    """Measure the held-out loss of the dense model and of what each way to choose weights leaves of it."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.evaluate.stage import evaluate_options, evaluate_run

        given = dict(_given(methods=methods, budgets=budgets))
        changes: dict[str, Any] = {}
        if "methods" in given:
            changes["methods"] = [name.strip() for name in given["methods"].split(",")]
        if "budgets" in given:
            changes["budgets"] = [part.strip() for part in given["budgets"].split(",")]
        if samples is not None:
            changes["samples"] = samples
        settings = _changed(settings, "evaluate", changes)
        if allocate:
            from tinyonn.evaluate.allocate import AllocateOptions, allocate_run

            budget = settings.experts.budget
            _show(allocate_run(location, settings, AllocateOptions((budget,)), _say))
        return evaluate_run(location, settings, evaluate_options(location, settings, plot), _say)

    _run_stage("evaluate", run, config, as_json, stage)


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
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", help="The assembled model, if it is not in the run's experts/.", metavar="FOLDER"
        ),
    ] = None,
) -> None:
    """Write an assembled model for others: for a hub, as a dense checkpoint that every tool reads, or as masks."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.base.source import model_folder
        from tinyonn.evaluate.report import card_figures
        from tinyonn.experts.export import Assembled, export_model, numbers_of
        from tinyonn.run import open_run

        source = model if model is not None else local_folder(location) / "experts"
        numbers = numbers_of(experts, slices, lambda: open_run(location))
        figures = card_figures(local_folder(location), Assembled(source).config["assembly"].get("selection"))
        base = model_folder(settings.model, weights=False)
        return export_model(source, folder, format, numbers, base, figures)

    _run_stage("export", run, config, as_json, stage, log=False)


@app.command()
def status(run: RunArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show what is committed: samples per slice, live segments, samples set aside, disk use."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.status import read_status

        return read_status(location)

    _run_stage("status", run, config, as_json, stage, log=False)


@app.command()
def demo(as_json: JsonOption = False) -> None:
    """Record the shipped corpus with the shipped model, cluster its weights, cut it into experts, measure them."""

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.cluster.stage import cluster_run
        from tinyonn.evaluate.stage import evaluate_options, evaluate_run
        from tinyonn.experts.assemble import assemble_run
        from tinyonn.merging import merge_run
        from tinyonn.score.stage import score_run
        from tinyonn.status import is_complete, read_status

        if is_complete(location):
            _say(f"{location} is recorded and merged: nothing to do (remove the folder to start afresh)")
        else:
            from tinyonn.record.driver import record

            _show(record(location, settings))
            _show(merge_run(location))
        _show(read_status(location))
        _show(score_run(location, settings.score))
        _show(cluster_run(location, settings.cluster))
        _show(assemble_run(location, settings.model, settings.experts))
        return evaluate_run(location, settings, evaluate_options(location, settings), _say)

    if not DEMO_CONFIG.is_file():
        _fail(
            InputError(
                f"{DEMO_CONFIG} is missing; run the demo from a clone, or `tinyonn record RUN --config FILE`"
            )
        )
    _run_stage("demo", "demo", DEMO_CONFIG, as_json, stage)


def main() -> None:
    """Entry point of the ``tinyonn`` script and of ``python -m tinyonn``."""
    app()


def _run_stage(
    stage: str,
    run: str,
    config: Path | None,
    as_json: bool,
    body: Callable[[str, Config], Report],
    log: bool = True,
) -> Report:
    started = time.monotonic()
    try:
        with _stdout_to_stderr(as_json):
            from tinyonn.config import load_config

            settings = load_config(config)
            location = run_location(run, settings.storage.root)
            if log and (stage in ("record", "demo") or local_folder(location).is_dir()):
                from tinyonn.logs import setup_logging

                setup_logging(local_folder(location) / "logs", stage)
            report = body(location, settings)
    except KeyboardInterrupt:
        print(
            "interrupted; what was committed stays, and the same command goes on from there", file=sys.stderr
        )
        raise typer.Exit(INTERRUPTED) from None
    except TinyONNError as error:
        _fail(error)
    except MemoryError:
        _fail(
            CapacityError(
                "out of RAM; see `tinyonn plan`, use fewer record.workers or a smaller data.max_tokens"
            )
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _crash()
            raise
        _fail(
            CapacityError(
                f"no space left on disk for {error.filename or run}; free some, then run the command again"
            )
        )
    except Exception:
        _crash()
        raise
    if as_json:
        own = {"stage": stage, "run": location, "seconds": round(time.monotonic() - started, 3)}
        print(json.dumps({**own, "peak_rss_bytes": _peak_rss(), **report.figures(), **own}), flush=True)
    else:
        _show(report)
    return report


def _changed(settings: Config, section: str, changes: dict[str, Any]) -> Config:
    """The configuration with options given on the command line in a section, validated like the file's."""
    from tinyonn.config import parse_config

    tree = settings.model_dump()
    return parse_config({**tree, section: {**tree[section], **changes}}, "command line")


def _engine(kind: str, workers: int | None, memory: str | None, address: str | None) -> EngineOptions:
    from tinyonn.engine import KINDS, EngineOptions
    from tinyonn.sizes import parse_size

    if kind not in KINDS:
        raise InputError(f"--engine {kind!r} is unknown; choose {', '.join(KINDS)}")
    limit = None if memory is None else parse_size(memory, "--memory")
    return EngineOptions(kind, workers, limit, address, progress=sys.stderr.isatty())


def _show(report: Report) -> None:
    from rich.console import Console

    Console().print(report.table())


def _say(message: str) -> None:
    logging.getLogger("tinyonn").info(message)


def _fail(error: TinyONNError) -> NoReturn:
    """One line on stderr, the traceback in the log alone."""
    line = " ".join(str(error).split())
    logger = logging.getLogger("tinyonn")
    if logger.handlers:
        logger.debug("failed", exc_info=True)
    print(f"tinyonn: {line}", file=sys.stderr)
    raise typer.Exit(error.exit_code) from None


def _crash() -> None:
    logging.getLogger("tinyonn").debug("a fault of Tiny-ONN itself", exc_info=True)


def _given(**options: str | None) -> list[tuple[str, str]]:
    return [(name, text) for name, text in options.items() if text is not None]


def _peak_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def _stdout_to_stderr(active: bool) -> Iterator[None]:
    """Keep standard output for the JSON line, also from libraries, child processes and daemons."""
    if not active:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
