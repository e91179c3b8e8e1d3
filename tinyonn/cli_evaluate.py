"""The command `evaluate`: held-out loss, tasks, streams."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyonn.command import (
    BudgetsOption,
    ConfigOption,
    JsonOption,
    MethodsOption,
    Report,
    RunArgument,
    SamplesOption,
    changed,
    evaluated,
    names_of,
    run_stage,
    say,
    show,
)
from tinyonn.errors import InputError

if TYPE_CHECKING:
    from tinyonn.config import Config

app = typer.Typer()


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
    methods: MethodsOption = None,
    budgets: BudgetsOption = None,
    samples: SamplesOption = None,
    split: Annotated[
        str,
        typer.Option(
            "--split", help="Of the held-out samples: development (for choices), test, final (once), or all."
        ),
    ] = "test",
    plot: Annotated[bool, typer.Option("--plot", help="Draw loss against kept share into the run.")] = False,
    trained: Annotated[
        bool, typer.Option("--trained", help="Instead measure the run's trained model beside the dense one.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Instead ask tasks of lm-eval, such as piqa,gsm8k, or YAML files of such tasks (extra `eval`).",
        ),
    ] = None,
    stream: Annotated[
        Path | None,
        typer.Option(
            "--stream",
            help="Instead, or with --tasks, the perplexity of a text, as of WikiText-2.",
            metavar="FILE",
        ),
    ] = None,
    windows: Annotated[
        str, typer.Option("--windows", help="Of --stream: tokens of a window; context is the model's own.")
    ] = "2048,context",
    subjects: Annotated[
        str | None,
        typer.Option(
            "--subjects",
            help="Of --tasks and --stream: int8, gobo3, gobo4, llmint8, gguf, assembled, trained or trained@5, beside "
            "original and nf4.",
        ),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", help="A GGUF of the same model, as a subject.", metavar="FILE")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--tasks-data", help="Files of the tasks, in place of the hub.", metavar="FOLDER"),
    ] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Examples before a question; else as the task says.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Documents of each task, or windows; else all.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run the programs that a model writes, apart and with limits.")
    ] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Requests at a time.")] = 8,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of tasks; else lm-eval's.")] = None,
) -> None:
    """Measure the held-out loss of the dense model and of what each way to choose weights leaves of it; or tasks."""

    def of_tasks(location: str, settings: Config) -> Report:
        from tinyonn.evaluate.tasks import Settings, TasksOptions, evaluate_tasks

        if trained or allocate or plot or methods or budgets or samples:
            raise InputError(
                "--tasks and --stream exclude --trained, --allocate, --plot, --methods, --budgets and --samples; "
                "--limit says how many documents, --subjects which models"
            )
        options = TasksOptions(
            tasks=tuple(names_of(tasks)),
            subjects=tuple(names_of(subjects)) or None,
            stream=stream,
            windows=tuple(names_of(windows)),
            gguf=gguf,
            settings=Settings(shots, limit, chat, seed, data, run_code, batch),
        )
        return evaluate_tasks(location, settings, options, say)

    def stage(location: str, settings: Config) -> Report:
        from tinyonn.evaluate.stage import evaluate_options, evaluate_run

        if tasks or stream:
            return of_tasks(location, settings)
        if subjects or gguf or data or shots is not None or limit or chat or run_code or seed is not None:
            raise InputError(
                "--subjects, --gguf, --tasks-data, --shots, --limit, --chat, --run-code and --seed belong to --tasks "
                "or --stream; give one of these"
            )
        settings = changed(settings, "evaluate", evaluated(methods, budgets, samples))
        if trained:
            from tinyonn.evaluate.trained import evaluate_trained

            options = evaluate_options(location, settings, split=split)
            return evaluate_trained(location, settings, options, tell=say)
        if allocate:
            from tinyonn.evaluate.allocate import AllocateOptions, allocate_run

            budget = settings.experts.budget
            show(allocate_run(location, settings, AllocateOptions((budget,)), say))
        return evaluate_run(location, settings, evaluate_options(location, settings, plot, split), say)

    run_stage("evaluate", run, config, as_json, stage)
