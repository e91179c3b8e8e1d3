"""How a stage is run from the command line: options that several have, errors, exit codes, the JSON line."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Protocol

import typer

from tinyonn import endings
from tinyonn.errors import CapacityError, EngineLostError, InputError, TinyONNError
from tinyonn.places import local_folder, run_location
from tinyonn.show import screen
from tinyonn.show.escape import shortened

if TYPE_CHECKING:
    from tinyonn.config import Config
    from tinyonn.show.sheet import Sheet
    from tinyonn.workers.tasks import EngineOptions

UNUSABLE = (  # what a path can be wrong with
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS,
)  # fmt: skip

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
MethodsOption = Annotated[
    str | None,
    typer.Option("--methods", help="Ways to choose weights, such as default,wanda,sparsegpt; else fifteen."),
]
BudgetsOption = Annotated[
    str | None, typer.Option("--budgets", help="What is kept, such as 0.5,0.315; else four shares.")
]
SamplesOption = Annotated[
    int | None, typer.Option("--samples", min=1, help="Held-out samples, about so many; else 252.")
]


class Report(Protocol):
    """What a stage returns."""

    def figures(self) -> dict[str, Any]:
        """The stage's own figures, as JSON values."""

    def table(self) -> Sheet:
        """The same for people."""


def run_stage(
    stage: str,
    run: str,
    config: Path | None,
    as_json: bool,
    body: Callable[[str, Config], Report],
    log: bool = True,
) -> Report:
    """Run a stage with its configuration, tell its report or its error, and exit as the error says.

    Parameters
    ----------
    stage, run : str
    config : Path or None
    as_json : bool
    body : callable
        Takes the run's location and the configuration.
    log : bool
        Write the run's log.
    """
    started = time.monotonic()
    try:
        from tinyonn.config import load_config

        settings = load_config(config)
        location = run_location(run, settings.storage.root)
        from tinyonn.machine import bound_caches
        from tinyonn.plan.usage import measured

        bound_caches()

        with measured() as meter, _console(stage, location, as_json, log):
            report = body(location, settings)
    except KeyboardInterrupt:
        _end(endings.ending() or endings.Ending.of_signal(signal.SIGINT))
    except EngineLostError as error:
        logging.getLogger("tinyonn").debug("failed", exc_info=True)
        endings.decide(error)
        _end(endings.Ending.of_error(error))
    except TinyONNError as error:
        fail(error)
    except MemoryError:
        fail(
            CapacityError(
                "out of RAM; see `tinyonn plan`, use fewer record.workers or a smaller data.max_tokens"
            )
        )
    except OSError as error:
        if (reason := endings.ending()) is not None:  # a connection to what has ended
            _crash()
            _end(reason)
        if error.errno in UNUSABLE:
            fail(
                InputError(
                    f"{shortened(str(error.filename or run))}: {error.strerror}; give a path that may be used"
                )
            )
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _crash()
            raise
        fail(
            CapacityError(
                f"no space left on disk for {error.filename or run}; free some, then run the command again"
            )
        )
    except Exception:
        _crash()
        if (reason := endings.ending()) is not None:  # what fails while this process ends, fails by that
            _end(reason)
        raise
    if as_json:
        own = {"stage": stage, "run": location, "seconds": round(time.monotonic() - started, 3)}
        memory = {"peak_rss_bytes": meter.usage.peak, "peak_parts_bytes": meter.usage.parts()}
        print(json.dumps({**own, **memory, **report.figures(), **own}), flush=True)
    else:
        sheet = report.table()
        sheet.notes += [f"memory held at most, all processes together: {meter.usage}"] if log else []
        screen.show(sheet)
    return report


def changed(settings: Config, section: str, changes: dict[str, Any]) -> Config:
    """The configuration with options given on the command line in a section, validated like the file's."""
    from tinyonn.config import parse_config

    tree = settings.model_dump(
        exclude_unset=True
    )  # what was left out stays so: some limits follow the model then
    return parse_config({**tree, section: {**tree.get(section, {}), **changes}}, "command line", whole=True)


def evaluated(methods: str | None, budgets: str | None, samples: int | None) -> dict[str, Any]:
    """What --methods, --budgets and --samples change in the section `evaluate`."""
    changes: dict[str, Any] = {name: names_of(text) for name, text in given(methods=methods, budgets=budgets)}
    return changes if samples is None else {**changes, "samples": samples}


def names_of(text: str | None) -> list[str]:
    """Names, or numbers, of an option that takes several, separated by commas."""
    return [] if text is None else [part.strip() for part in text.split(",")]


def engine_options(kind: str, workers: int | None, memory: str | None, address: str | None) -> EngineOptions:
    """What --engine, --workers, --memory and --address ask for."""
    from tinyonn.workers.tasks import KINDS, EngineOptions

    if kind not in KINDS:
        raise InputError(f"--engine {kind!r} is unknown; choose {', '.join(KINDS)}")
    return EngineOptions(kind, workers, size_of(memory), address)


def size_of(memory: str | None) -> int | None:
    """Bytes of --memory."""
    from tinyonn.show.sizes import parse_size

    return None if memory is None else parse_size(memory, "--memory")


def show(report: Report) -> None:
    """Print a report for people."""
    screen.show(report.table())


def say(message: str) -> None:
    """A line of progress, to the console and the log."""
    logging.getLogger("tinyonn").info(message)


def fail(error: TinyONNError) -> NoReturn:
    """One line on stderr, the traceback in the log alone."""
    line = " ".join(str(error).split())
    logger = logging.getLogger("tinyonn")
    if logger.handlers:
        logger.debug("failed", exc_info=True)
    screen.complain(f"tinyonn: {line}")
    raise typer.Exit(error.exit_code) from None


def _end(reason: endings.Ending) -> NoReturn:
    endings.tell(reason)
    raise typer.Exit(reason.code) from None


def _crash() -> None:
    logging.getLogger("tinyonn").debug("a fault of Tiny-ONN itself", exc_info=True)


def given(**options: str | None) -> list[tuple[str, str]]:
    """The options that were given, with their texts."""
    return [(name, text) for name, text in options.items() if text is not None]


@contextlib.contextmanager
def _console(stage: str, location: str, as_json: bool, log: bool) -> Iterator[None]:
    """The console for this stage alone, its log and its progress."""
    chatter = None
    if log and (stage in ("record", "pipeline", "demo") or local_folder(location).is_dir()):
        from tinyonn.show.logs import chatter_file, setup_logging

        folder = local_folder(location) / "logs"
        setup_logging(folder, stage)
        chatter = chatter_file(folder, stage)
    from tinyonn.show.progress import Bar, shown_progress

    with screen.kept_for_us(chatter, as_json), shown_progress():
        if not log:  # quick, and reads alone
            yield
            return
        with Bar(stage):
            yield
