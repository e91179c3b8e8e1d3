"""What a person sees, by the tables' own code with awkward values: nothing is cut, broken or too wide."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from tinyonn.cluster.report import Cell, Churn, ClusterReport
from tinyonn.config import RecordConfig
from tinyonn.dense.parameters import Parameter
from tinyonn.doctor import DoctorReport, Finding
from tinyonn.evaluate.allocate import AllocateReport
from tinyonn.evaluate.loss import Losses
from tinyonn.evaluate.report import EvaluateReport, Line
from tinyonn.evaluate.sensitivity import Found
from tinyonn.evaluate.trained import TrainedLine, TrainedReport
from tinyonn.experts.export import ExportReport
from tinyonn.experts.report import AssembleReport, Kept, Totals
from tinyonn.plan.demands import DataFacts, Machine, ModelFacts
from tinyonn.plan.recording import plan_record
from tinyonn.profile.profile import ProfileReport
from tinyonn.record.report import RecordReport
from tinyonn.run import MergeReport
from tinyonn.score.stage import ScoreReport
from tinyonn.show import progress
from tinyonn.show.pace import Phase
from tinyonn.show.progress import Bar, counted, shown_progress
from tinyonn.show.sheet import HARD, Sheet, whole, wrap
from tinyonn.show.sizes import GiB
from tinyonn.status import SliceStatus, StatusReport
from tinyonn.train.report import TrainReport
from tinyonn.train.tune import TuneReport

WEIGHTS = 4_000_000_000
RUN = "/home/someone/projects/sparse-experts/storage/qwen-4b"  # whole, on a line of its own
FOLDER = f"{RUN}/model"
SLICES = [f"conversations-about-everyday-things-{n:04}" for n in range(16)]  # 40 characters
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOSSES = Losses(dict.fromkeys(SLICES, 12.3456), dict.fromkeys(SLICES, 1_000_000))


def plan() -> Any:
    sizes = {"embed": (151_936, 2560), "head": (151_936, 2560)}
    layers = [Parameter(f"{n}.up.weight", (6912, 2560), n, "linear") for n in range(40)]
    outside = [
        Parameter(f"{name}.weight", shape, None, "embedding" if name == "embed" else "linear")
        for name, shape in sizes.items()
    ]
    model = ModelFacts(FOLDER, 40, 2560, 6912, 151_936, "nf4", 2)
    assumed = ("16,384 samples (data.samples; the data are not counted)", "1,024 tokens a sample, half")
    data = DataFacts(1_000_000, 1024.0, 2048, 16, assumed)
    machine = Machine("cuda", 24 * GiB, 256 * GiB, 4000 * GiB, 8)
    return plan_record([*layers, *outside], model, data, machine, RecordConfig())


def cells() -> ClusterReport:
    found = tuple(
        Cell(n, WEIGHTS // 2, n, dict.fromkeys(SLICES, 1.2), {SLICES[n % 16]: 1.0}, {KINDS[n % 7]: 1.0}, [0.5] * 40)
        for n in range(100)
    )  # fmt: skip
    churn = Churn(0.1234, [0.5] * 100, {})
    return ClusterReport(RUN, WEIGHTS, 777_912_320, 0.31523, found, 12.34567, 1.2345, 65_536, "stored centres",
                         churn, 8, 12_345.6, 7_890.1, 345.6, True)  # fmt: skip


def evaluated() -> EvaluateReport:
    methods = ["default", "default+update", "sparsegpt", "activation", "magnitude"]
    lines = [Line("original", 1.0, WEIGHTS, LOSSES), Line("dense", 1.0, WEIGHTS, LOSSES)]
    shares = [0.75, 0.5, 0.315, 0.25, 0.1, 0.01, 0.00012]
    lines += [Line(method, share, WEIGHTS // 2, LOSSES) for method in methods for share in shares]
    return EvaluateReport(
        RUN, tuple(lines), 1_000_000, 1_234_567_890, 37, 12_345.6, f"{RUN}/evaluate/loss.png"
    )


KEPT = Kept(1_259_999_999, WEIGHTS, 125_999_999)
REPORTS: dict[str, Callable[[], Any]] = {
    "plan": plan,
    "doctor": lambda: DoctorReport(
        (
            Finding("python", "ok", "3.11.7 on Linux-6.18.44-generic-x86_64-with-glibc2.36, x86_64"),
            Finding("bitsandbytes on cuda", "fail", "an NF4 product is off by 12%", f"install again: see {RUN}"),
            Finding("disk", "warn", f"72.8 GiB free at {RUN}", "choose another storage.root"),
        )
    ),
    "record": lambda: RecordReport(
        RUN, 1_000_000, 1_234_567, 12_345, 654_321, WEIGHTS, 48, 16, 1e6, 1e5, 0.1, 1234.5, 256 * GiB, 80 * GiB, 1e6
    ),
    "status": lambda: StatusReport(
        RUN,
        tuple(SliceStatus(name, 1_234_567_890, 2_345_678_901, 123_456, 12_345) for name in SLICES),
        1_234_567_890,
        tuple({"index": n, "slice": SLICES[0], "reason": f"the loss of {RUN} is not finite"} for n in range(30)),
        WEIGHTS,
        483,
        "Qwen/Qwen1.5-4B 0123456789ab nf4 bfloat16",
        1_234_567_890_123,
        64 * GiB,
    ),
    "merge": lambda: MergeReport(RUN, 1234, dict.fromkeys(SLICES, 1234), dict.fromkeys(SLICES, 1), False, 1234.5),
    "score": lambda: ScoreReport(RUN, 10**6, WEIGHTS, 483, dict.fromkeys(SLICES, 10**6), 8, 6312.3, True,
                                 (f"slice {SLICES[0]} has 3 samples, fewer than 16",)),
    "cluster": cells,
    "assemble": lambda: AssembleReport(
        RUN, FOLDER, "a9f1f50a7165", WEIGHTS // 3, WEIGHTS, 777_912_320, [12_345_678] * 100 + [123_456_789],
        dict.fromkeys(KINDS, (1_234_567_890, WEIGHTS)), list(range(40)), 3 * GiB, 3 * GiB, 41, 2, 1234.5, 567.8,
        True,
    ),
    "totals": lambda: Totals(
        KEPT, 777_912_320, dict.fromkeys(KINDS, KEPT), {str(n): KEPT for n in range(40)}, {}, (12_345_678,) * 101, (3,)
    ),
    "profile": lambda: ProfileReport(
        RUN, f"{RUN}/profile", "assembly", "a9f1f50a7165", 100, 101, 10**6, 10**6, 12, dict.fromkeys(SLICES, 62_500),
        2.0811, 0.274, 88.1, 3 * GiB, 8, 1e6, 123.4, 3 * GiB, 0, 1e6,
    ),
    "train": lambda: TrainReport(
        RUN, f"{RUN}/train", FOLDER, 1_000_000, 999_950, 8, "cuda",
        {name: [12.3456, 11.2345] for name in ("loss", "kl", "ce", "hidden")},
        {"load_cv": 0.123, "load_dead": 0.5, "load_entropy": 0.9}, 1_259_999_999.0, 1_234_567_890_123, 123_456.7,
        64 * GiB, 63 * GiB, ["step 25: 3 experts (0, 7, 11) are on for up to 91% of the samples, over 80%"] * 4,
        [], 1e6, True, 2,
    ),
    "tune": lambda: TuneReport(RUN, {"optimizers.experts_lr": 1.2e-3, "loss.kl": 1.0}, 1.2345, 1.3456, 20, 7, 60, 1e5),
    "evaluate": evaluated,
    "trained": lambda: TrainedReport(
        RUN, tuple(TrainedLine(f"model {n}", 50.0 * n, WEIGHTS / 3, LOSSES) for n in range(5)), WEIGHTS, 10**6, 1e5
    ),
    "allocate": lambda: AllocateReport(
        RUN, {b: Found({f"{n}.{kind}.weight": 0.123 for n in range(4) for kind in KINDS}, 2.5, 2.4, 9)
              for b in (0.5, 0.315)}, 2.341, 56, 12_345, 1e5, True,
    ),
    "export": lambda: ExportReport(RUN, FOLDER, "parquet", list(range(100)), WEIGHTS, 41, 8 * GiB),
}  # fmt: skip


def drawn(sheet: Sheet, width: int) -> list[str]:
    """Lines on a terminal, without their styles."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(sheet, crop=False)
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()


def texts(sheet: Sheet) -> list[str]:
    """All that has to be there."""
    headings = [column.heading for column in sheet.columns] if sheet.headed else []
    return [sheet.title, *sheet.notes, *headings, *(cell for row in sheet.rows for cell in row.cells)]


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("name", REPORTS)
def test_every_number_name_and_path_is_whole(name: str, width: int) -> None:
    sheet = REPORTS[name]().table()
    lines = drawn(sheet, width)
    assert max(map(cell_len, lines)) <= width
    seen = "\n".join(lines)
    assert "…" not in seen
    found = set(re.split(r"[\s┃│]+", seen))
    found |= {word.removesuffix(":") for word in found}  # headings of a list
    for text in texts(sheet):
        missing = set(text.replace(HARD, " ").split()) - found
        assert not missing
    for column, place in ((column, n) for n, column in enumerate(sheet.columns) if column.number):
        for row in sheet.rows:  # a number keeps to one line, its unit too
            assert re.search(rf"(?<!\S){re.escape(row.cells[place])}(?!\S)", seen) or not row.cells[place], (
                column
            )


@pytest.mark.parametrize("name", REPORTS)
def test_titles_are_short(name: str) -> None:
    sheet = REPORTS[name]().table()
    assert len(wrap(sheet.title, 80)) <= 2


@pytest.mark.parametrize("name", REPORTS)
def test_without_a_terminal_a_row_is_a_line(name: str) -> None:
    sheet = REPORTS[name]().table()
    text = sheet.plain()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f─-╿…]", text)
    lines = text.split("\n")
    for row in sheet.rows:
        cells = [cell.replace(HARD, " ") for cell in row.cells if cell]
        assert any(all(cell in line for cell in cells) for line in lines)


WORD = st.text(st.sampled_from("ab/-_[]数1,.%"), min_size=1, max_size=30)
CELL = st.lists(WORD, min_size=0, max_size=5).map(" ".join)


@given(
    st.lists(st.tuples(st.booleans(), CELL), min_size=1, max_size=7),
    st.lists(st.lists(CELL, min_size=7, max_size=7), max_size=4),
    st.integers(31, 130),
    CELL,
)
@settings(max_examples=40, deadline=None)
def test_any_table_fits_any_width(
    columns: list[tuple[bool, str]], rows: list[list[str]], width: int, note: str
) -> None:
    sheet = Sheet(whole("a title"), [note])
    for number, heading in columns:
        (sheet.number if number else sheet.text)(heading)
    for row in rows:
        sheet.add(*(cell.split(" ")[0] if column.number else cell
                    for column, cell in zip(sheet.columns, row, strict=False)))  # fmt: skip
    lines = drawn(sheet, width)
    longest = max((cell_len(word) for text in texts(sheet) for word in text.split()), default=0)
    assert max(map(cell_len, lines), default=0) <= max(width, longest + 3)  # set in, and a colon
    found = re.split(r"[\s┃│]+", "\n".join(lines))
    for text in [
        sheet.title.replace(HARD, " "),
        note,
        *(cell for row in sheet.rows for cell in row.cells),
    ]:
        for word in text.split():
            assert any(word in seen for seen in found)


def test_paths_with_blanks_and_units_are_not_broken() -> None:
    path = "/home/some one/my runs/first"
    assert wrap(f"recorded into the folder {whole(path)}", 40) == ["recorded into the folder", path]
    assert wrap("this takes 12 GiB of memory", 14) == ["this takes", "12 GiB of", "memory"]
    assert wrap("a" * 50, 20) == ["a" * 50]
    assert wrap("one\ntwo", None) == ["one", "two"]


# Live and plain progress


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_day_of_work_is_few_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tinyonn")
    clock = Clock()
    with Bar("recording", 100_000, "samples", shown=True, clock=clock) as bar:
        for done in range(1, 100_001):
            clock.now += 0.864
            bar.update(done)
    told = [line for line in caplog.messages if line.startswith("recording")]
    assert 40 < len(told) < 120
    assert re.fullmatch(r"recording: 4/100,000 samples, 1\.2 samples/s, 23 h 5\d min left", told[0])


def test_what_is_counted_is_not_what_it_costs() -> None:
    """Samples for people, tokens for the estimate; what an earlier start recorded counts for people alone."""
    clock = Clock()
    with Bar("recording", 9000.0, "samples", count=400, before=100, shown=False, clock=clock) as bar:
        for second in range(1, 21):
            clock.now += 1
            bar.update(100.0 * second, 100 + 3 * second, "2 set aside")
    assert bar.line() == "recording: 160/400 samples, 3.0 samples/s, 1 min 10 s left, 2 set aside"


def test_phases_have_their_own_counts_and_the_whole_its_time() -> None:
    clock = Clock()
    warm, main = Phase("warm start", 200.0), Phase("steps", 300.0, before=100.0)
    with Bar("training", [warm, main], "steps", shown=False, clock=clock) as bar:
        for step in range(1, 101):
            clock.now += 0.1
            bar.update(step)
        assert bar.line() == "training: warm start: 100/200 steps, 10.0 steps/s, 10 s left of warm start"
        main.expected = 0.5
        assert bar.line().endswith("10 min 10 s left")
        clock.now += 10
        bar.enter("steps")
        for step in range(1, 11):
            clock.now += 4
            bar.update(step)
        assert bar.line() == "training: steps: 110/400 steps, 4.0 s each, 19 min 20 s left"


def test_bytes_and_unknown_ends() -> None:
    clock = Clock()
    with Bar("hashing", 4 * GiB, "B", shown=False, clock=clock) as bar:
        for _ in range(8):
            clock.now += 1
            bar.add(GiB // 4)
        assert bar.line() == "hashing: 2.00 GiB of 4.00 GiB, 256 MiB/s, 8 s left"
    with Bar("merging", shown=False, clock=clock) as bar:
        clock.now += 75
        assert bar.line() == "merging: 1 min 15 s so far"
    assert list(counted(iter("abc"), "reading", 0, "rows")) == ["a", "b", "c"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_live_line_is_one_line_with_the_time_left(width: int) -> None:
    clock = Clock()
    with Bar("recording", 1e6, "samples", shown=False, clock=clock) as bar:
        for done in range(1, 30):
            clock.now += 1
            bar.update(1000 * done, note="3,456 set aside, and a good deal more that is only a remark")
        out = io.StringIO()
        Console(file=out, width=width, force_terminal=True, color_system=None).print(bar)
    (line,) = out.getvalue().rstrip("\n").split("\n")
    assert cell_len(line) < width
    assert "16 min 11 s left" in line


SCRIPT = """
import logging, os, sys, time
from pathlib import Path
from tinyonn.show import screen
from tinyonn.show.sheet import pairs
from tinyonn.show.logs import setup_logging
from tinyonn.show.progress import Bar, shown_progress
setup_logging(sys.argv[1], "stage")
with screen.kept_for_us(Path(sys.argv[1]) / "libraries.log", False), shown_progress():
    with Bar("working", 8, "units") as bar:
        for unit in range(8):
            time.sleep(0.15)
            print("a library's print")
            os.system("echo from a child process; echo and its errors >&2")
            bar.add()
            if unit == 3:
                logging.getLogger("tinyonn").warning("a warning of ours")
            if unit == 5:
                screen.show(pairs("in the middle", {"first": "second"}))
    screen.show(pairs("a title", {"name": "value"}))
"""


def run_script(folder: Path, terminal: bool, **environment: str) -> str:
    """What the script writes, on a terminal of 80 columns or into a pipe."""
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    env = clean | {"TERM": "xterm-256color", **environment}
    if not terminal:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
        return done.stderr + done.stdout
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(command, env=env, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    chunks = []
    try:
        while chunk := os.read(ours, 65536):
            chunks.append(chunk)
    except OSError:  # closed by the other side
        pass
    os.close(ours)
    assert process.wait(60) == 0
    return b"".join(chunks).decode()


def test_a_terminal_has_a_live_line_and_no_chatter(tmp_path: Path) -> None:
    text = run_script(tmp_path, terminal=True)
    assert "\r" in text and "units" in text and "left" in text
    assert "library" not in text and "child" not in text and "errors" not in text
    assert text.count("a warning of ours") == 1
    assert "┌" in text and text.rstrip().endswith("┘")  # the live line is gone
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    for line in (
        "a warning of ours",
        "in the middle",
        "a title",
        "│ first │ second │",
    ):  # each in a line of its own
        assert re.search(rf"(?:^|[\r\n]){re.escape(line)}\r?\n", plain)
    assert (tmp_path / "libraries.log").read_text("utf-8").count("and its errors") == 8


@pytest.mark.parametrize(
    ("terminal", "environment"), [(False, {}), (True, {"NO_COLOR": "1"}), (True, {"TERM": "dumb"})]
)
def test_without_one_there_are_plain_lines(
    tmp_path: Path, terminal: bool, environment: dict[str, str]
) -> None:
    text = run_script(tmp_path, terminal, **environment).replace("\r\n", "\n")
    assert "\x1b" not in text and "\r" not in text and "─" not in text
    middle = ["in the middle", "first  second"]
    assert text.splitlines() == ["a warning of ours", *middle, "a title", "name  value"]


def test_bars_are_silent_outside_the_command_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tinyonn")
    clock = Clock()
    with Bar("working", 10, clock=clock) as bar:
        clock.now += 100
        bar.add()
    assert not caplog.messages
    with shown_progress(), Bar("working", 10, clock=clock) as bar:
        clock.now += 100
        bar.add()
        assert progress._bars == [bar]
    assert len(caplog.messages) == 1 and not progress._bars
