"""The documents say what is so: commands run, options and files exist, blocks validate, snippets work."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from tests.dense.architectures import make_model
from tests.documents import (
    PAGES,
    ROOT,
    Block,
    blocks,
    code_spans,
    commands,
    links,
    mentioned_paths,
    words,
)
from tests.options import written
from tests.record.runs import config_of, serial_run, write_rows
from tinyonn.cli import app
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import Config, EvaluateConfig, known_keys, parse_config
from tinyonn.score.stage import score_run
from tinyonn.show import screen

PLAN_WIDTH = 100
SECTIONS = "|".join(Config.model_fields)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone after `make demo`: storage/demo, and configs/ where demo.yaml is that of the run."""
    folder = tmp_path_factory.mktemp("clone")
    model = make_model("qwen2", folder / "model")
    write_rows(folder / "rows.jsonl", {"python": 9, "prose": 5})
    config = config_of(model, folder / "rows.jsonl")
    write_rows(folder / "held.jsonl", {"python": 3, "prose": 3}, seed=1)
    held_out = config.data.model_copy(update={"path": str(folder / "held.jsonl")})
    measured = EvaluateConfig(data=held_out)
    record = config.record.model_copy(update={"workers": 1})  # in this process, without Ray
    train = config.train.model_copy(update={"steps": 4, "warm_start": 4})
    config = config.model_copy(update={"evaluate": measured, "record": record, "train": train})
    serial_run(folder / "storage" / "demo", config)
    score_run(str(folder / "storage" / "demo"), config)
    cluster_run(str(folder / "storage" / "demo"), config)
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "configs" / "demo.yaml").write_text(yaml.safe_dump(written(config)), "utf-8")
    return folder


def stage_options(stage: str) -> set[str]:
    """The options that a stage knows."""
    command: Any = typer.main.get_command(app)
    assert stage in command.commands, f"there is no stage {stage!r}, only {sorted(command.commands)}"
    return {name for parameter in command.commands[stage].params for name in parameter.opts} | {"--help"}


def ray_options(names: list[str]) -> tuple[set[str], int]:
    """The options that a (sub)command of ``ray`` knows, and how many words name it."""
    from ray.scripts.scripts import cli

    command: Any = cli
    depth = 0
    while hasattr(command, "commands") and depth < len(names):
        assert names[depth] in command.commands, f"ray has no command {' '.join(names[: depth + 1])!r}"
        command = command.commands[names[depth]]
        depth += 1
    return {name for parameter in command.params for name in parameter.opts}, depth


def given(arguments: Iterable[str]) -> set[str]:
    return {word.split("=")[0] for word in arguments if word.startswith("--") and word != "--"}


def split_at(arguments: list[str], mark: str) -> tuple[list[str], list[str]]:
    place = arguments.index(mark) if mark in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


def can_run(command: Block) -> bool:
    """Whether it is a stage on a run that `place` has, or a plan."""
    arguments = words(command.text)[:3]
    return arguments[0] == "tinyonn" and (arguments[2:] == ["demo"] or arguments[1:] == ["plan", "qwen"])


@pytest.mark.parametrize("command", commands(), ids=str)
def test_command_exists_with_its_options(command: Block) -> None:
    first, *rest = words(command.text)
    if first == "tinyonn" and rest[0].islower():
        assert given(rest) <= stage_options(rest[0])
    elif first == "ray":
        own, entry = split_at(rest, "--")
        options, _ = ray_options([word for word in own if not word.startswith("-")])
        assert given(own) <= options
        if entry:
            assert (ROOT / entry[1]).is_file()
            assert given(entry) <= stage_options(Path(entry[1]).stem)
    elif first == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    else:
        assert first in ("tinyonn", "cd", ".", "export", "chmod", "mkdir"), (
            f"what is {first!r}? teach this test"
        )


@pytest.mark.parametrize("command", [block for block in commands() if can_run(block)], ids=str)
def test_command_runs(command: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the demo's run, offline; what would start a recording ends because nothing is left to do."""
    arguments = words(command.text)[1:]
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def test_plan_in_the_docs_is_what_plan_prints(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for block in blocks("text") if block.page == "docs/stages.md" and "VRAM" in block.text)
    (command,) = (c for c in commands() if c.page == "README.md" and c.text.startswith("tinyonn plan qwen"))
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(screen, "watched", lambda stream: True)
    monkeypatch.setattr(screen, "width_of", lambda stream: PLAN_WIDTH)
    result = CliRunner().invoke(app, words(command.text)[1:])
    printed = [line.rstrip() for line in result.stdout.rstrip().splitlines()]
    assert block.text.rstrip().splitlines() == printed, (
        f"paste it anew, of a terminal of {PLAN_WIDTH} columns"
    )


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_configuration_is_valid(block: Block) -> None:
    parse_config(yaml.safe_load(block.text), block.page)


def test_options_named_in_prose_exist() -> None:
    """Notes of decisions tell of removed ones too."""
    spans = [span for span in code_spans() if "decisions/" not in span.page]
    named = {span.text.split(":")[0].strip() for span in spans}
    options = {
        text
        for text in named
        if re.fullmatch(rf"({SECTIONS})\.[a-z_]+", text) and not text.endswith((".yaml", ".safetensors"))
    }
    assert options
    assert options <= set(known_keys())


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_snippet_runs(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    exec(compile(block.text, f"<{block.page}>", "exec"), names)
    assert names["act"].shape == names["codes"].shape == names["act_code"].shape
    assert (names["python_act"] != names["act"]).any()
    assert names["act_code"].max() <= 15


@pytest.mark.parametrize("block", mentioned_paths(), ids=lambda block: f"{block.page}: {block.text}")
def test_mentioned_file_exists(block: Block) -> None:
    assert (ROOT / block.text).exists()


@pytest.mark.parametrize(("page", "target"), links(), ids=lambda item: str(item).removeprefix(f"{ROOT}/"))
def test_link_leads_somewhere(page: Path, target: str) -> None:
    assert (page.parent / target.split("#")[0]).exists()


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_shell_block_parses(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True, timeout=20)


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text("utf-8")
    files = {path.name for path in folder.glob("[0-9]*.md")}
    assert set(re.findall(r"\(([0-9][^)]*\.md)\)", index)) == files
    for name in files:
        assert re.match(rf"# {name[:3]} \S", (folder / name).read_text("utf-8")), name


def test_no_figure_is_left_out() -> None:
    missing = [
        f"{page.relative_to(ROOT)}: {name}"
        for page in PAGES
        for name in re.findall(r"<!-- ([A-Z]+:\S+) -->", page.read_text("utf-8"))
    ]
    assert not missing, f"figures to be filled in: {missing}"
