"""Figures know where they come from: pages say what the stored results say, and nothing besides."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, results
from benchmarks.claims import CLAIMS, faults, figures_in
from benchmarks.stored import read_results, write_result
from tinyonn.errors import InputError

ROOT = Path(__file__).parent.parent
GOOD: dict[str, Any] = {
    "command": "python benchmarks/toy.py",
    "commit": "6d18afe",
    "date": "2026-11-22",
    "machine": "a toy",
    "figures": {"x": 1},
}
TOY = '''"""A toy: what it says stands above its table.

python benchmarks/toy.py
"""

from benchmarks.report import at_most, finish, show

show("half way", ("step",), [(1,)])
finish("toy", ("way", "nats"), [("a|b", 1.25)], [at_most("ratio", 1.0, 1.15)], True, {"seeds": [3], "x": 1})
'''


def test_the_page_of_results_is_made_of_what_is_stored() -> None:
    path = ROOT / "docs" / "results.md"
    assert path.read_text("utf-8") == results.page(read_results()), "run `make results`"


def test_the_page_does_not_depend_on_the_order_of_files() -> None:
    stored = read_results()
    assert results.page(dict(reversed(stored.items()))) == results.page(stored)


def test_every_stored_result_is_on_the_page_with_where_it_comes_from() -> None:
    page = results.page(read_results())
    newest = max(read_results(), key=lambda name: (name.startswith("gpu/"), name))
    for name, one in read_results().items():
        if not name.startswith("gpu/") or name == newest:
            assert (
                f"(../results/{name}.json): `{one.command}`, {one.commit}, {one.date}, {one.machine}" in page
            )


def test_the_script_that_writes_the_page_holds_no_figure() -> None:
    tree = ast.parse((ROOT / "benchmarks" / "results.py").read_text("utf-8"))
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert not [text for text in texts if figures_in(text)]


def test_pages_say_no_figure_that_is_in_no_stored_result() -> None:
    assert faults(ROOT, read_results()) == []


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A copy of what people write."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text[:40])
def test_a_stale_figure_is_refused(claim: Any, pages: Path) -> None:
    """The figure that a sentence has after the next run is not the one that stands there."""
    path = pages / claim.page
    stale = [number + 1 for number in claim.numbers(read_results())]
    text, said = " ".join(path.read_text("utf-8").split()), claim.said(read_results())
    assert said in text
    path.write_text(text.replace(said, " ".join(claim.text.format(*stale).split())), "utf-8")
    wrong = faults(pages, read_results())
    assert f"{claim.page} does not say what the stored results say: {said}" in wrong


@pytest.mark.parametrize(
    ("sentence", "figure"),
    [
        ("It loses 0.05 nats a token.", "0.05"),
        ("It is 3 times as fast.", "3"),
        ("It takes 12 % of the time.", "12"),
        ("A model of 1,200 MiB.", "1,200"),
        ("About **2.5** times.", "2.5"),
        ("Ready in 42 seconds.", "42"),
        ("It loses 0.09 nats.", "0.09"),  # right elsewhere, and in no claim here
    ],
)
def test_a_planted_figure_is_refused(sentence: str, figure: str, pages: Path) -> None:
    path = pages / "README.md"
    path.write_text(f"{path.read_text('utf-8')}\n{sentence}\n", "utf-8")
    (line,) = faults(pages, read_results())
    assert line.startswith(f"README.md: {figure!r} in ")


@pytest.mark.parametrize(
    "sentence",
    [
        "Python 3.11 to 3.13 and Ray 2.60, transformers 5.23.0, Qwen1.5-4B, 192.168.1.10.",
        "Set `train.loss.ce` to `0.1`; [note](https://host/1.5/2.5).",
        "```text\n12.5 MiB, 3 times\n```",
        "1,120 samples in 7 slices.",
    ],
)
def test_code_versions_and_counts_are_no_figures(sentence: str, pages: Path) -> None:
    path = pages / "README.md"
    path.write_text(f"{path.read_text('utf-8')}\n\n{sentence}\n", "utf-8")
    assert faults(pages, read_results()) == []


def test_a_result_that_says_something_else_is_refused_where_it_is_told(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results", tmp_path / "results")
    path = tmp_path / "results" / "quality.json"
    path.write_text(path.read_text("utf-8").replace("2.434 ± 0.001", "2.534 ± 0.001"), "utf-8")
    (line, *_) = faults(ROOT, read_results(tmp_path / "results"))
    assert "README.md does not say what the stored results say: By |W| · √g" in line
    assert "loses before any training 0.19 nats" in line
    path.unlink()
    with pytest.raises(InputError, match=r"^README.md: no stored result gives the figures of 'By"):
        faults(ROOT, read_results(tmp_path / "results"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": None}, r"bad\.json: command is null and should be text; a stored result has command, "),
        ({"machine": " "}, r"machine is \" \" and should be text"),
        ({"machine": {"cpus": 2}}, r"machine is \{\"cpus\": 2\} and should be text"),
        ({"date": "22 November"}, r"date is '22 November' and should be a day such as"),
        ({"commit": "main"}, r"commit is 'main' and should begin with one"),
        ({"seeds": 3}, r"seeds is 3 and should be a list of whole numbers"),
        ({"tables": [{"columns": ["a"], "rows": [["1", "2"]]}]}, r"has 2 cells under 1 columns"),
        ({"tables": [{"columns": ["a"]}]}, r"a table needs title, columns and rows"),
    ],
)
def test_a_file_that_is_no_stored_result_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(GOOD | change), "utf-8")
    with pytest.raises(InputError, match=message):
        read_results(tmp_path)
    with pytest.raises(InputError):
        write_result(GOOD | change, "new", tmp_path)
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({k: v for k, v in GOOD.items() if k != "figures"})])
def test_a_file_without_figures_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text, "utf-8")
    with pytest.raises(InputError, match=r"bad\.json "):
        read_results(tmp_path)


def test_a_benchmark_is_run_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the commit that is checked out, in a tree without other changes."""

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a", *words], cwd=tmp_path, check=True)

    script = tmp_path / "toy.py"
    script.write_text(TOY, "utf-8")
    git("init", "-q")
    git("add", "toy.py")
    git("commit", "-q", "-m", "toy")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "results"
    for _ in range(2):  # what is stored already is no change
        (path,) = report.store(script, ["--json"], None, dirty=False, folder=folder)
    one = read_results(folder)["toy"]
    assert path == folder / "toy.json"
    assert (one.command, one.commit) == ("python toy.py --json", report.git("rev-parse", "--short", "HEAD"))
    assert (one.seeds, one.about) == ((3,), "A toy: what it says stands above its table.")
    assert (one.figures, one.cell("a|b", "nats", 1), one.goal("ratio")) == ({"x": 1}, "1.2500", 1.0)
    assert "CPUs (" in one.machine
    assert [part.title for part in one.tables] == ["half way", "toy"]
    assert "| a\\|b | 1.2500 |" in results.page({"toy": one})
    script.write_text(TOY.replace("1.25", "1.5"), "utf-8")
    with pytest.raises(InputError, match=r"^1 files are not committed, such as toy\.py, .* or say --dirty$"):
        report.store(script, [], None, dirty=False, folder=folder)
    report.store(script, [], "other", dirty=True, folder=folder)
    assert read_results(folder)["other"].commit.endswith(" and changes")
    script.write_text("raise SystemExit(3)", "utf-8")
    with pytest.raises(InputError, match="ended with 3 and 0 lines; nothing is stored"):
        report.store(script, [], None, dirty=True, folder=folder)
