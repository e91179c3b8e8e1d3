"""Text from data, paths and models: shown as it is, and never obeyed by a terminal, a log, a page or a picture."""

from __future__ import annotations

import html
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from tests.record.runs import make_sick_model
from tests.recorded import SLICES, calibration, make_run, make_store, segment_of
from tinyonn.cli import app
from tinyonn.cluster import plot
from tinyonn.experts.card import write_card
from tinyonn.run import open_run
from tinyonn.show.escape import UNSEEN, code, markdown, picture, visible
from tinyonn.show.escape import html as as_html
from tinyonn.show.logs import close_logging, setup_logging
from tinyonn.show.progress import Bar, print_line
from tinyonn.show.sheet import Sheet, pairs, whole
from tinyonn.store.arrays import SegmentWriter
from tinyonn.store.manifest import Segment

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "[/red] [link=file:///etc/passwd]x[/link] \x1b]0;owned\x07 \x1b[31mred\x1b[0m \x1b]8;;http://e.il\x1b\\link \x9b2J "
    "\u202eevil\u2069 \u200f \r over \x7f\x08 \udcff \ud800 \ufeff \u2028 :smile: $\\frac$ <b>&amp;</b> `|`"
)
SEEN = visible(HOSTILE)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what rich draws with


@pytest.fixture(autouse=True)
def _closed_logs() -> Any:
    yield
    close_logging()


def harmless(text: str) -> bool:
    return UNSEEN.search(text.replace("\n", "")) is None


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(st.characters(codec=None), max_size=40))
def test_what_is_shown_is_harmless_whole_and_stable(text: str) -> None:
    shown = visible(text)
    assert harmless(shown) and "\n" not in shown
    shown.encode("utf-8")
    assert visible(shown) == shown
    if text.isprintable():
        assert shown == text
    assert visible(text, lines=True).split("\n") == [visible(line) for line in text.split("\n")]


def test_ordinary_writing_stays_as_it_is() -> None:
    for text in (
        "naïve café",
        "日本語 – 한국어",
        "עברית العربية",
        "👩\u200d🚀 🏳️",
        "می\u200cخواهم",
        "a[/b]c",
        "C:\\x",
    ):
        assert visible(text) == text


def test_every_outlet_for_people(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sheet = Sheet(f"title {HOSTILE}", [f"note {HOSTILE}"]).text(HOSTILE).number("n")
    sheet.add(whole(HOSTILE), HOSTILE)
    for width in (40, 200, 2000):
        out = io.StringIO()
        Console(file=out, width=width, force_terminal=True, legacy_windows=False).print(sheet, crop=False)
        drawn = ESCAPES.sub("", out.getvalue())
        assert harmless(drawn) and "owned" in drawn and "\\x1b]0;" in drawn
        assert harmless(sheet.plain(width))
    assert SEEN in pairs("", {"a": HOSTILE}).plain()
    setup_logging(tmp_path, "stage")
    log = logging.getLogger("tinyonn.test")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.warning("told %s\nforged line", HOSTILE, exc_info=True)
    print_line(f"line {HOSTILE}")
    bar = Bar(HOSTILE)
    bar.update(1, note=HOSTILE)
    assert harmless(bar.line())
    out = io.StringIO()
    Console(file=out, width=4000, force_terminal=True, legacy_windows=False).print(bar)
    assert harmless(ESCAPES.sub("", out.getvalue()))
    close_logging()
    written = (tmp_path / "stage.log").read_text("utf-8")
    assert harmless(written) and f"told {SEEN}\\nforged line" in written
    assert "\nValueError: " in written  # a traceback keeps its lines
    err = capsys.readouterr().err
    assert harmless(err) and f"line {SEEN}" in err


def hostile_run(folder: Path) -> Path:
    """A run with a sample that was set aside for a reason, in a slice, of a model, all of them hostile."""
    names = {"code": 40, "[red] $frac": 30}
    store = make_store(folder, names)
    for name in names:
        leaf = store.manifest.leaves(name)[0]
        aside = ({"index": 3, "reason": HOSTILE.encode("utf-8", "replace").decode()},)
        segment = Segment(leaf.slice, leaf.first, leaf.last, leaf.last - leaf.first - 1, aside)
        fork = store.begin(segment)
        writer = SegmentWriter(fork, segment.slice, segment.first, segment.last)
        for parameter in store.manifest.parameters:
            books, records = segment_of("code", parameter)
            writer.write(
                parameter.name, parameter.shape, calibration()[parameter.name], books, [(0, records)]
            )
        assert store.commit(fork, segment)
    return folder


@pytest.mark.parametrize("name", ["a[/b]c", "\x1b]0;owned\x07", "[red]"])
def test_status_of_a_run_that_such_a_row_went_through(tmp_path: Path, name: str) -> None:
    run = hostile_run(tmp_path / name)
    told = CliRunner().invoke(app, ["status", str(run)])
    assert told.exit_code == 0, told.stderr
    assert harmless(told.stdout) and "set aside: sample 3" in told.stdout and "[/red]" in told.stdout
    assert visible(name) in told.stdout
    as_json = CliRunner().invoke(app, ["status", str(run), "--json"])
    assert "[/red]" in json.loads(as_json.stdout)["set_aside"][0]["reason"]
    missing = CliRunner().invoke(app, ["status", str(tmp_path / f"{name}x")])
    assert missing.exit_code == 2 and harmless(missing.stderr) and "Traceback" not in missing.stderr


def on_a_terminal(*arguments: str | bytes) -> tuple[int, str]:
    """The command on a terminal of its own, as it comes from there."""
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyonn", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=side,
        stderr=side,
        stdin=side,
    )
    os.close(side)
    came = b""
    try:
        while piece := os.read(main, 1 << 16):
            came += piece
    except OSError:  # the other end is closed
        pass
    os.close(main)
    return process.wait(60), came.decode("utf-8", "replace")


def test_a_terminal_is_told_nothing_but_styles(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "a[/b]c")
    code_, came = on_a_terminal("status", str(run))
    assert code_ == 0, came
    assert "owned" in came and "\x1b]" not in came and "\x07" not in came and "\x9b" not in came
    left = ESCAPES.sub("", came).replace("\r\n", "\n")
    assert harmless(left)
    assert {found[-1] for found in ESCAPES.findall(came)} <= set("mhlKAG")


def test_names_that_no_system_can_spell_are_refused(tmp_path: Path) -> None:
    for name in (b"\xff\xfe", b"a" * 300, b"b/" * 2500):
        _, came = on_a_terminal("status", os.fsencode(tmp_path) + b"/" + name)
        assert "Traceback" not in came and "tinyonn: RUN = " in came
    result = CliRunner().invoke(app, ["status", f"{tmp_path}/a\0b"])
    assert result.exit_code == 2 and "NUL" in result.stderr


def test_markdown_and_code_show_what_they_are_given() -> None:
    markdown_it = pytest.importorskip("markdown_it")
    page = markdown_it.MarkdownIt("commonmark").enable("table")
    for text in (
        "a|b",
        "`x",
        "[a](http://b)",
        "<script>x</script>",
        "*a* _b_ __c__",
        "q_proj",
        "$x$",
        "\\",
        "``a`",
    ):
        for made, inner in ((markdown(text), text), (code(text), None)):
            drawn = page.render(f"| a | b |\n|---|---|\n| {made} | end |")
            cells = re.findall(r"<td>(.*?)</td>", drawn, re.DOTALL)
            assert len(cells) == 2 and cells[1] == "end", drawn
            if inner is not None:
                assert "<" not in cells[0] and html.unescape(cells[0]) == inner
    assert markdown("q_proj and up_proj") == "q_proj and up_proj"
    assert code("reference") == "`reference`"


def test_a_card_says_names_and_does_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    licence = '---\nlicense: "mit` <script>"\n---\n'
    (tmp_path / "base" / "README.md").write_text(licence, "utf-8")
    bad = f"x]({HOSTILE.encode('utf-8', 'replace').decode()})\n# forged\n<script>"
    assembly = {
        "base": {"path": f"them/{bad}", "quantization": "none"}, "slices": {bad: 3}, "tinyonn": "1", "samples": 3,
        "report": {"budget": 3, "linear": 10, "sizes": [1, 2], "trunk": 1, "kinds": {bad: (1, 2)}},
        "selection": {"score": "root", "within": "cell", "allocation": "global", "core": 0.1, "seed": 0},
    }  # fmt: skip
    write_card(tmp_path, {"assembly": assembly}, tmp_path / "base", {bad: {bad: 1.0, "mean": 1.0}})
    card = (tmp_path / "README.md").read_text("utf-8")
    assert harmless(card)
    front, body = card.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["license"] == "mit` <script>"
    assert not [line for line in body.splitlines() if line.startswith("# forged")]
    assert "<script>" not in re.sub(r"(`+).*?\1", "", body).replace("\\<script\\>", "")


def test_pictures_and_pages_take_any_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for text in ("$\\frac$", "$a", "$x$y$", HOSTILE.encode("utf-8", "replace").decode()):
        figure, axes = pyplot.subplots()
        axes.plot([1], label=picture(text))
        axes.set_yticks([0], [picture(text)])
        axes.legend()
        figure.savefig(tmp_path / "picture.png")
        pyplot.close(figure)
    assert as_html('<script>&"\x1b') == "&lt;script&gt;&amp;&quot;\\x1b"
    assert vars(plot)["picture"] is picture


@pytest.mark.slow
def test_a_recording_of_such_rows_into_such_a_folder(tmp_path: Path, ray_cluster: str) -> None:
    """On a terminal, whole, with a live line; then status, of the same words."""
    model = make_sick_model(tmp_path / "model")
    rows: list[Any] = [{"text": f"some text, number {n}", "kind": "ab"[n % 2]} for n in range(60)]
    part = {"type": "[/red]\x1b]0;owned\x07\u202e", "x": 1}
    rows[7] = {"messages": [{"role": "user", "content": [part]}], "kind": "a"}
    path = tmp_path / "rows[/x].jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    tree = {
        "model": {"path": str(model), "quantization": "none", "dtype": "float32", "device": "cpu"},
        "data": {"path": str(path), "slice": "kind", "max_tokens": 64},
        "record": {"segment": 10, "workers": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    run = str(tmp_path / "a[/b]c")
    for stage in (("record", run, "--address", ray_cluster), ("status", run)):
        code_, came = on_a_terminal(*stage, "--config", str(tmp_path / "config.yaml"))
        assert code_ == 0, came
        assert "\x1b]" not in came and "\x07" not in came and "a[/b]c" in came
    assert open_run(run).segments
    log = (Path(run) / "logs" / "record.log").read_text("utf-8")
    assert harmless(log)


def test_a_plain_run_is_shown_as_before(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    told = CliRunner().invoke(app, ["status", str(run)]).stdout
    assert [line.split()[0] for line in told.splitlines()[3:6]] == list(SLICES)
