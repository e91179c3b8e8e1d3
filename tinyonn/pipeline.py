"""Every stage, one after another, saying before each what is to be seen there: `tinyonn pipeline`, `tinyonn demo`.

Each stage may be killed and goes on when the same is called again, as if it had been called alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinyonn.cluster.stage import cluster_run
from tinyonn.command import Report, changed, say, show
from tinyonn.errors import InputError
from tinyonn.evaluate.stage import evaluate_options, evaluate_run
from tinyonn.evaluate.trained import continued, evaluate_trained
from tinyonn.experts.assemble import assemble_run
from tinyonn.places import local_folder
from tinyonn.plan.usage import Usage, measured
from tinyonn.profile.stage import profile_options, profile_run
from tinyonn.record.driver import record
from tinyonn.run import merge_run
from tinyonn.score.stage import score_run
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_seconds, format_size
from tinyonn.status import is_complete, read_status
from tinyonn.train.plan import train_stage_options
from tinyonn.train.stage import train_run

if TYPE_CHECKING:
    from tinyonn.config import Config

PROMPT = "def read_lines(path):\n    with open(path) as"
DEMO = {"samples": 42, "methods": ["default", "wanda", "random"], "budgets": [0.315]}  # what is evaluated
FULL_DEMO = {
    "samples": 126,
    "methods": ["default", "wanda", "magnitude", "random"],
    "budgets": [0.5, 0.315, 0.1],
}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes
    ----------
    name : str
        For ``--skip``.
    says : str
        What is to be seen in it.
    reports : callable
        Runs it, from the run's location and the configuration.
    """

    name: str
    says: str
    reports: Callable[[str, Config], Iterator[Report]]


@dataclass(frozen=True)
class Took:
    """What a stage took, and its own figures."""

    name: str
    seconds: float
    usage: Usage
    figures: dict[str, Any]


@dataclass(frozen=True)
class PipelineReport:
    """What every stage took."""

    location: str
    stages: tuple[Took, ...]

    def figures(self) -> dict[str, Any]:
        """JSON values; of every stage its own figures too."""
        stages = {
            one.name: {**one.figures, "seconds": round(one.seconds, 3), "peak_rss_bytes": one.usage.peak}
            for one in self.stages
        }
        return {"location": self.location, "stages": stages}

    def table(self) -> Sheet:
        """For people."""
        notes = ["memory: held at most by all processes together, libraries counted once"]
        sheet = Sheet(f"what the stages of {whole(self.location)} took", notes).text("stage")
        sheet.number("time", "memory")
        for one in self.stages:
            sheet.add(one.name, format_seconds(one.seconds), format_size(one.usage.peak))
        sheet.add("together", format_seconds(sum(one.seconds for one in self.stages)), "")
        return sheet


def _record(location: str, settings: Config) -> Iterator[Report]:
    if is_complete(location):
        say(f"{location} is recorded and merged: nothing to do (remove the folder to start afresh)")
    else:
        yield record(location, settings)
        yield merge_run(location)
    yield read_status(location)


def _score(location: str, settings: Config) -> Iterator[Report]:
    yield score_run(location, settings)


def _cluster(location: str, settings: Config) -> Iterator[Report]:
    yield cluster_run(location, settings)


def _assemble(location: str, settings: Config) -> Iterator[Report]:
    yield assemble_run(location, settings.model, settings.experts)


def _evaluate(location: str, settings: Config) -> Iterator[Report]:
    yield evaluate_run(location, settings, evaluate_options(location, settings), say)


def _profile(location: str, settings: Config) -> Iterator[Report]:
    yield profile_run(location, settings, profile_options(settings), tell=say)


def _train(location: str, settings: Config) -> Iterator[Report]:
    yield train_run(location, settings, train_stage_options(settings), say)


def _evaluate_trained(location: str, settings: Config) -> Iterator[Report]:
    yield evaluate_trained(location, settings, evaluate_options(location, settings), tell=say)
    text = continued(local_folder(location) / "model", PROMPT)
    on = ", ".join(map(str, text.experts[:12])) + (", ..." if len(text.experts) > 12 else "")
    say(f"prompt: {PROMPT!r}")
    say(f"goes on: {text.text!r}")
    say(
        f"served by experts {on}: {len(text.experts)} of {text.of}, which {text.slice or 'all texts'} needs most"
    )


STAGES = (
    Stage(
        "record",
        "texts go forward and backward through the model in 4 bits; what every weight did is written down",
        _record,
    ),
    Stage("score", "what each weight did for each kind of text becomes one record of 16 bits", _score),
    Stage("cluster", "weights that the same kinds of text need are put into cells", _cluster),
    Stage("assemble", "the best weights are kept; those of a cell become an expert", _assemble),
    Stage("evaluate", "what this cut, and others, lose on texts that were not recorded", _evaluate),
    Stage("profile", "what each expert does for each text: from this the router learns first", _profile),
    Stage(
        "train",
        "the router learns to choose experts for a prompt, and they to do what the whole model did",
        _train,
    ),
    Stage(
        "trained",
        "the trained model with all of its experts on, and with fewer and fewer",
        _evaluate_trained,
    ),
)


def check_stages(names: Collection[str]) -> None:
    """Raise InputError if one of the names is no stage's."""
    known = [stage.name for stage in STAGES]
    if wrong := [name for name in names if name not in known]:
        raise InputError(f"--skip {wrong[0]!r} is no stage; the stages are {', '.join(known)}")


def run_pipeline(
    location: str, settings: Config, evaluate: dict[str, Any], skip: Collection[str] = ()
) -> PipelineReport:
    """Every stage, one after another; what is there already is not made again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    settings : Config
    evaluate : dict
        What is evaluated, besides the section `evaluate`: samples, methods, budgets.
    skip : collection of str
        Stages to leave out.

    Raises
    ------
    InputError
        There is no such stage.
    TinyONNError
        As a stage raises it; what the stages before it made stays.
    """
    check_stages(skip)
    settings = changed(settings, "evaluate", evaluate)
    stages, took = [stage for stage in STAGES if stage.name not in skip], []
    for number, stage in enumerate(stages, 1):
        say(f"{number} of {len(stages)}, {stage.name}: {stage.says}")
        started, figures = time.monotonic(), {}
        with measured() as meter:
            for report in stage.reports(location, settings):
                show(report)
                figures.update(report.figures())
        took.append(Took(stage.name, time.monotonic() - started, meter.usage, figures))
    folder = local_folder(location)
    say(
        f"to look at next: {folder / 'model' / 'README.md'}, the trained model's card; `tinyonn status {location}`; "
        f"`tinyonn cluster {location} --plot {folder / 'cells'}`; docs/stages.md, what each stage did"
    )
    return PipelineReport(location, tuple(took))
