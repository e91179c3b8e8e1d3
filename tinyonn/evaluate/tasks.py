"""``tinyonn evaluate --tasks``: tasks of lm-eval, perplexity of a stream, on the original and what is made of it.

Data flow: names of tasks → the requests that each makes, whose digest decides with that of the model what a result
depends on → model by model, task by task → a result, on the disk at once. A result whose inputs have not changed is
not measured again, so a killed call goes on. What is measured stands in the run's ``evaluate/tasks.json``;
``tasks.parquet`` has the same as rows, and ``tasks/`` what each document scored.
"""

from __future__ import annotations

import gc
import logging
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinyonn.config import Config
from tinyonn.dense.load import choose_device, context_length, load_tokenizer, model_folder
from tinyonn.errors import InputError
from tinyonn.evaluate.demand import state, task_needs
from tinyonn.evaluate.stream import Stream, read_stream, stream_loss, windows_of
from tinyonn.evaluate.subjects import Subject, find_subjects, load_subject, sparse_settings
from tinyonn.evaluate.task_report import TasksReport, task_results, write_rows, write_values
from tinyonn.places import local_folder
from tinyonn.plan.facts import describe_model
from tinyonn.record.identity import check_base
from tinyonn.run import open_run
from tinyonn.score.source import digest
from tinyonn.show.pace import Phase
from tinyonn.show.progress import Bar
from tinyonn.store.lock import evaluating

LOG = logging.getLogger(__name__)
CONTEXT = "context"
PACKAGES = ("lm-eval", "transformers", "torch", "bitsandbytes", "datasets", "tiny-onn")
DEFAULT_CONTEXT = 2048  # of a model whose configuration does not say
LONGEST_WINDOW = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How tasks are asked.

    Attributes
    ----------
    shots : int or None
        Examples before a question; None is as the task says.
    limit : int or None
        Documents of each task, the first ones; None takes all.
    chat : bool
        Put the prompt into the model's chat template, examples as turns.
    seed : int or None
        None is lm-eval's own seeds.
    data : Path or None
        Folder with files of tasks, in place of the hub.
    run_code : bool
        Run programs that the model writes.
    batch : int
        Requests at a time.
    """

    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    seed: int | None = None
    data: Path | None = None
    run_code: bool = False
    batch: int = 8


@dataclass(frozen=True)
class TasksOptions:
    """What is measured.

    Attributes
    ----------
    tasks : tuple of str
        Names that lm-eval knows, YAML files, or folders of these.
    subjects : tuple of str or None
        See `tinyonn.evaluate.subjects`; None takes those that are there.
    stream : Path or None
        A text whose perplexity is measured.
    windows : tuple of str
        Tokens of a window, as digits; ``context`` is the model's own.
    gguf : Path or None
        A GGUF of the same model.
    settings : Settings
        Of tasks; `limit` is also that of windows.
    """

    tasks: tuple[str, ...] = ()
    subjects: tuple[str, ...] | None = None
    stream: Path | None = None
    windows: tuple[str, ...] = ("2048", CONTEXT)
    gguf: Path | None = None
    settings: Settings = Settings()


@dataclass(frozen=True)
class _Unit:
    """A task, or windows of the stream.

    Attributes
    ----------
    name : str
    decided_by : dict
        What a result depends on beside the model.
    requests : int
    tokens, batch : int
        Of the longest request, and requests at a time.
    whole : bool
        Whether the logits of all tokens are held at once.
    window : int or None
        Tokens of the stream's windows; None of a task.
    """

    name: str
    decided_by: dict[str, Any]
    requests: int
    tokens: int
    batch: int
    whole: bool = False
    window: int | None = None


def evaluate_tasks(
    location: str, config: Config, options: TasksOptions, tell: Callable[[str], None] = lambda line: None
) -> TasksReport:
    """Measure tasks and streams on a run's model; may be killed at any moment and called again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : Config
        As the run was recorded.
    options : TasksOptions
    tell : callable
        Called with a line of text as each result is there.

    Raises
    ------
    InputError
        lm-eval is missing; no such task, subject or file; the model is not the recorded one; programs may not run.
    CapacityError
        It does not fit.
    StoreBusyError
        Another process changes or evaluates the run.
    """
    if options.tasks:
        check_lm_eval()
    run = open_run(location)
    with evaluating(location):
        fingerprint = check_base(run.store, location, config.model)
        return _Tasks(location, config, options, fingerprint, tell).carry_out()


def check_lm_eval() -> None:
    """Refuse tasks without lm-eval.

    Raises
    ------
    InputError
        It is not installed; names the extra.
    """
    try:
        version("lm-eval")
    except PackageNotFoundError:
        raise InputError("--tasks needs the package lm-eval: pip install 'tiny-onn[eval]'") from None


class _Tasks:
    """One call, model by model."""

    def __init__(
        self,
        location: str,
        config: Config,
        options: TasksOptions,
        fingerprint: dict[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self.location, self.config, self.options, self.tell = location, config, options, tell
        self.folder = local_folder(location)
        self.tokenizer = load_tokenizer(config.model)
        self.context = context_length(model_folder(config.model, weights=False)) or DEFAULT_CONTEXT
        self.results = task_results(self.folder / "evaluate" / "tasks.json")
        self.subjects = find_subjects(options.subjects, config.model, self.folder, options.gguf, fingerprint)
        self.device = choose_device(config.model.device).type
        self.stream: Stream | None = None
        self.measured = 0

    def carry_out(self) -> TasksReport:
        """All results that are missing, then the files and the report."""
        started = time.monotonic()
        units = [*self._tasks(), *self._windows()]
        missing = [
            (subject, [unit for unit in units if self.results.get(self._key(subject, unit)) is None])
            for subject in self.subjects
        ]
        planned = self._state([(subject, todo) for subject, todo in missing if todo])
        phases = [Phase(_phase(subject, unit), unit.requests) for subject, todo in missing for unit in todo]
        with Bar("evaluating", phases or 0, "requests") as self.bar:
            for subject, todo in missing:
                if todo:
                    self._measure(subject, todo)
        lines = [self.results.get(self._key(subject, unit)) for unit in units for subject in self.subjects]
        report = TasksReport(
            self.location,
            tuple(line for line in lines if line is not None),
            self.measured,
            time.monotonic() - started,
            planned,
        )
        write_rows(self.folder / "evaluate" / "tasks.parquet", report.rows())
        return report

    def _tasks(self) -> Sequence[_Unit]:
        """The tasks, and what they will ask."""
        if not self.options.tasks:
            return []
        from tinyonn.evaluate.harness import SOFTMAX, asked

        settings = self.options.settings
        if settings.run_code:
            from tinyonn.evaluate.sandbox import isolation

            self.tell(isolation().told())
        units = []
        with Bar("reading tasks", len(self.options.tasks), "tasks") as bar:
            for name in self.options.tasks:
                found = asked(name, settings, self.tokenizer, self.context)
                decided_by = {"requests": found.digest, "seed": settings.seed, "softmax": SOFTMAX}
                decided_by |= {"batch": settings.batch, "context": self.context, "device": self.device}
                units.append(
                    _Unit(name, decided_by, found.requests, found.tokens, settings.batch, found.compared)
                )
                bar.add()
        return units

    def _windows(self) -> Sequence[_Unit]:
        """The stream by each length of a window."""
        if self.options.stream is None:
            return []
        self.stream = read_stream(self.options.stream, self.tokenizer)
        units = []
        for length in dict.fromkeys(self._length(text) for text in self.options.windows):
            count = len(windows_of(self.stream, length, self.options.settings.limit))
            decided_by = {
                "stream": self.stream.digest,
                "window": length,
                "count": count,
                "device": self.device,
            }
            units.append(_Unit(self.stream.name, decided_by, count, length, 1, window=length))
        return units

    def _length(self, text: str) -> int:
        length = self.context if text == CONTEXT else int(text) if text.isdigit() else 0
        if not 2 <= length <= min(self.context, LONGEST_WINDOW):
            raise InputError(
                f"--windows has {text!r}; give tokens from 2 to {self.context:,}, which the model takes, or {CONTEXT}"
            )
        return length

    def _key(self, subject: Subject, unit: _Unit) -> list[Any]:
        """What a result depends on."""
        return [
            subject.kind,
            subject.experts,
            subject.model,
            self.config.model.dtype,
            unit.name,
            unit.decided_by,
        ]

    def _state(self, missing: Sequence[tuple[Subject, Sequence[_Unit]]]) -> int:
        """What it needs of RAM, or a refusal."""
        if not missing:
            return 0
        parameters, model = describe_model(self.config.model)
        planned = 0
        for subject, todo in missing:
            settings = sparse_settings(subject, self.folder)
            passes = [(unit.batch, unit.tokens, unit.whole) for unit in todo]
            needs = task_needs(parameters, model, subject.kind, settings, passes)
            planned = max(planned, state(f"evaluating {subject.name}", self.config.model, needs))
        return planned

    def _measure(self, subject: Subject, todo: Sequence[_Unit]) -> None:
        model = load_subject(subject, self.config.model, self.folder, self.options.gguf)
        for unit in todo:
            self.bar.enter(_phase(subject, unit))
            started = time.monotonic()
            key = self._key(subject, unit)
            found = (
                self._windows_of(subject, unit, model)
                if unit.window
                else self._task(subject, unit, model, key)
            )
            line = {
                "subject": subject.name,
                "task": unit.name,
                **found,
                "seconds": round(time.monotonic() - started, 1),
                "model": subject.model,
                "experts": subject.experts,
                "configuration": self._told(),
                "versions": versions(),
                "commit": commit(),
                "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            self.results.put(key, line)
            self.bar.update(unit.requests)
            self.measured += 1
            self.tell(f"{subject.name}, {unit.name}: {TasksReport.summary(line)}")
        del model
        gc.collect()  # a model is a ring of references: one is there at a time

    def _task(self, subject: Subject, unit: _Unit, model: Any, key: list[Any]) -> dict[str, Any]:
        from tinyonn.evaluate.harness import SubjectLM, score

        asked = SubjectLM(
            model, self.tokenizer, self.options.settings.batch, self.context, subject.experts, self.bar.add
        )
        found = asdict(score(unit.name, self.options.settings, asked))
        write_values(self.folder / "evaluate" / "tasks" / f"{digest(key)}.parquet", found.pop("values"))
        return found

    def _windows_of(self, subject: Subject, unit: _Unit, model: Any) -> dict[str, Any]:
        assert self.stream is not None and unit.window is not None
        windows_WT = windows_of(self.stream, unit.window, self.options.settings.limit)
        loss = stream_loss(model, windows_WT, subject.experts, self.bar.add)
        name = f"{unit.name} {unit.window}"
        figures = {"nats": loss.nats, "nats_stderr": loss.error, "perplexity": loss.perplexity}
        return {
            "results": {name: figures},
            "samples": {name: loss.windows},
            "tokens": loss.tokens,
            "window": unit.window,
        }

    def _told(self) -> dict[str, Any]:
        """The configuration of what is measured, as JSON values."""
        settings = asdict(self.options.settings)
        asked = {name: settings[name] for name in ("shots", "limit", "chat", "seed", "batch")}
        model = self.config.model.model_dump(include={"path", "revision", "dtype"})
        return {"model": model, "device": self.device, **asked}


def _phase(subject: Subject, unit: _Unit) -> str:
    window = f" {unit.window:,}" if unit.window else ""
    return f"{unit.name}{window} of {subject.name}"


def versions() -> dict[str, str]:
    """Of the packages that a figure depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the clone that this code runs from; None outside of one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
