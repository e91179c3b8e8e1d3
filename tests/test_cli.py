"""The command line as people and scripts meet it: real processes where exit codes and streams matter."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tinyonn.cli import app
from tinyonn.command import run_stage
from tinyonn.config import Config
from tinyonn.dense.parameters import Parameter
from tinyonn.doctor import examine, look_at_disk, look_at_nf4, look_at_python, look_at_ram, look_at_ray
from tinyonn.errors import CapacityError, InputError, StoreBusyError, StoreDamagedError
from tinyonn.places import local_folder, run_location, store_location
from tinyonn.run import merge_run
from tinyonn.show.logs import FILE_BYTES, close_logging, setup_logging
from tinyonn.show.sizes import GiB, format_count, format_seconds, format_size, parse_size
from tinyonn.status import is_complete, read_status
from tinyonn.store.arrays import SegmentWriter
from tinyonn.store.lock import RunLock
from tinyonn.store.manifest import Manifest, Segment
from tinyonn.store.records import TensorCalibration
from tinyonn.store.repository import Store

ROOT = Path(__file__).parent.parent
PARAMETERS = (
    Parameter("layers.0.q.weight", (8, 16), 0, "linear"),
    Parameter("layers.0.norm.weight", (16,), 0, "norm"),
)
BOOKS = np.tile(np.arange(16) / 15, (3, 1))
CALIBRATION = TensorCalibration(100, 100, 0)


def tinyonn_process(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinyonn", *arguments],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def make_run(location: Path, segments: list[Segment], slices: dict[str, int]) -> Store:
    """A small run through the store's own writer."""
    manifest = Manifest(
        {"model.safetensors": "0123456789abcdef"}, {}, {"quantization": "nf4"}, slices, 4, PARAMETERS
    )
    store = Store.create(store_location(str(location)), manifest)
    store.commit_calibration({parameter.name: CALIBRATION for parameter in PARAMETERS})
    for segment in segments:
        fork = store.begin(segment)
        writer = SegmentWriter(fork, segment.slice, segment.first, segment.last)
        for parameter in PARAMETERS if segment.samples else ():
            records = np.full(parameter.shape, 0x7770, np.uint16)
            writer.write(parameter.name, parameter.shape, CALIBRATION, BOOKS, [(0, records)])
        assert store.commit(fork, segment)
    return store


SEGMENTS = [
    Segment("chat", 0, 4, 4),
    Segment("chat", 4, 8, 3, ({"index": 17, "reason": "loss is nan"},)),
    Segment("code", 0, 4, 4),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "storage" / "small", SEGMENTS, {"chat": 8, "code": 6})
    return tmp_path / "storage" / "small"


@pytest.fixture(autouse=True)
def _closed_logs() -> Any:
    yield
    close_logging()


def shown(report: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    return console.export_text()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GiB), ("8GB", 8 * 10**9), ("500MiB", 500 * 2**20), ("1.5 TiB", 3 * 2**39),
        ("8gib", 8 * GiB), ("512", 512), ("7 B", 7), (" 2kb ", 2000),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "8G", "-1GiB", "8 GiB free", "1e9", "0", "0.1B", "8,5GB", "٣GiB", "nan"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--vram = .* is not a size above 0; write it like 8GiB"):
        parse_size(text, "--vram")


def test_figures_are_written_for_people() -> None:
    assert [format_size(size) for size in (0, 512, 1024, 8 * GiB, 1000 * GiB)] == [
        "0 B", "512 B", "1.00 KiB", "8.00 GiB", "0.977 TiB",
    ]  # fmt: skip
    assert format_count(3_950_369_280) == "3.95 billion"
    assert format_count(5_512_192) == "5,512,192"
    times = (8.21, 200, 7500, 273_600)
    assert [format_seconds(seconds) for seconds in times] == [
        "8.2 s",
        "3 min 20 s",
        "2 h 05 min",
        "3 d 4 h",
    ]


def test_a_run_is_a_name_under_the_root_or_a_place() -> None:
    assert run_location("demo", "storage") == "storage/demo"
    assert run_location("storage/x", "storage") == "storage/x"
    assert run_location("demo", "s3://bucket/prefix/") == "s3://bucket/prefix/demo"
    assert run_location("./demo/", "storage") == "./demo"
    assert run_location("/tmp/x", "s3://bucket") == "/tmp/x"
    assert run_location("s3://other/run/", "storage") == "s3://other/run"
    assert local_folder("s3://bucket/prefix/demo") == Path("storage/demo")
    assert local_folder("/tmp/x") == Path("/tmp/x")
    for wrong in ("", ".", "..", " demo"):
        with pytest.raises(InputError, match="is not the name of a run"):
            run_location(wrong, "storage")


def test_help_is_fast_and_names_every_stage() -> None:
    started = time.monotonic()
    result = tinyonn_process("--help")
    assert result.returncode == 0
    for stage in ("plan", "doctor", "record", "merge", "status", "pipeline", "demo"):
        assert f"  {stage}" in result.stdout
    assert "torch" not in loaded_by_help()
    assert time.monotonic() - started < 20  # a busy machine; 0.2 s on an idle one


def loaded_by_help() -> set[str]:
    code = "import sys, tinyonn.cli; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return set(out.split())


@pytest.mark.parametrize("arguments", [["recrd", "x"], ["status"], ["status", "x", "--jsn"], []])
def test_wrong_use_exits_with_2(arguments: list[str]) -> None:
    result = tinyonn_process(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("stage", ["status", "merge"])
def test_a_run_that_is_not_there_is_one_line_and_2(tmp_path: Path, stage: str) -> None:
    result = tinyonn_process(stage, "nothing", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "nothing" in result.stderr
    assert list(tmp_path.iterdir()) == []  # a wrong name leaves nothing behind


def test_a_bad_configuration_is_one_line_and_2(tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("data: {max_token: 12}\n")
    result = tinyonn_process("record", "x", "--config", str(config), cwd=tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "did you mean 'data.max_tokens'" in result.stderr


def test_plan_of_the_4b_model_fits_or_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = str(ROOT / "configs" / "qwen1.5-4b.yaml")
    arguments = ["plan", "qwen", "--config", config, "--ram", "32GiB", "--disk", "200GiB"]
    fits = CliRunner().invoke(app, [*arguments, "--vram", "8GiB", "--json"])
    assert fits.exit_code == 0, fits.stderr
    figures = json.loads(fits.stdout.splitlines()[-1])
    assert figures["stage"] == "plan"
    assert figures["tiers"]["VRAM of a GPU"]["bytes"] <= 8 * GiB
    assert figures["tiers"]["RAM"]["bytes"] <= 32 * GiB
    assert figures["weights"] == 3_950_369_280
    refused = tinyonn_process(*arguments, "--vram", "4GiB", cwd=tmp_path)
    assert refused.returncode == CapacityError.exit_code == 3
    assert len(refused.stderr.splitlines()) == 1
    assert "4.00 GiB are there" in refused.stderr
    assert list(tmp_path.iterdir()) == []  # planning makes nothing


def test_status_says_what_is_committed(run: Path) -> None:
    report = read_status(str(run))
    rows = {part.slice: (part.committed, part.total, part.segments, part.set_aside) for part in report.slices}
    assert rows == {"chat": (8, 8, 2, 1), "code": (4, 6, 1, 0)}
    assert report.samples == 11
    assert report.set_aside == ({"index": 17, "reason": "loss is nan", "slice": "chat"},)
    assert (report.weights, report.tensors) == (144, 2)
    assert report.disk_bytes == sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    assert not report.complete
    text = shown(report)
    assert "sample 17 of chat: loss is nan" in text
    assert "11 samples recorded" in text
    assert "0123456789ab" in text


def test_status_as_json_is_the_last_line_of_stdout(run: Path) -> None:
    result = tinyonn_process("status", "small", "--json", cwd=run.parent.parent)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert {
        "stage": "status",
        "run": "storage/small",
        "committed": 12,
        "total": 14,
    }.items() <= figures.items()
    assert figures["seconds"] >= 0
    assert figures["peak_rss_bytes"] > 2**20


def test_merge_ends_with_one_segment_per_slice_and_holds_the_lock(tmp_path: Path) -> None:
    place = tmp_path / "done"
    make_run(place, [*SEGMENTS, Segment("code", 4, 6, 2)], {"chat": 8, "code": 6})
    assert not is_complete(str(place))
    with RunLock(place):
        busy = tinyonn_process("merge", str(place))
    assert busy.returncode == StoreBusyError.exit_code == 4
    assert len(busy.stderr.splitlines()) == 1
    report = merge_run(str(place))
    assert report.before == {"chat": 2, "code": 2}
    assert report.after == {"chat": 1, "code": 1}
    assert report.complete
    assert is_complete(str(place))
    assert read_status(str(place)).samples == 13
    assert merge_run(str(place)).merges == 0


def test_a_stage_to_skip_must_be_one(tmp_path: Path) -> None:
    refused = tinyonn_process("pipeline", "small", "--skip", "record, training", cwd=tmp_path)
    assert refused.returncode == InputError.exit_code
    assert "--skip 'training' is no stage; the stages are record, score, cluster," in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_new_pipeline_says_what_each_stage_shows(tmp_path: Path) -> None:
    """From the first line on, though there is no folder yet whose log it could be written to."""
    (tmp_path / "small.yaml").write_text("model: {path: nowhere}\n", "utf-8")
    ended = tinyonn_process(
        *("pipeline", "small", "--config", "small.yaml"),
        *("--skip", "score,cluster,assemble,evaluate,profile,train,trained"),
        cwd=tmp_path,
    )
    assert ended.returncode == InputError.exit_code
    first, *_, last = ended.stderr.splitlines()
    assert first.startswith("1 of 1, record: texts go forward and backward")
    assert "nowhere" in last


def test_a_damaged_store_is_4(run: Path) -> None:
    for file in (run / "store").rglob("*"):
        if file.is_file():
            file.write_bytes(b"nonsense")
    result = tinyonn_process("status", str(run))
    assert result.returncode == StoreDamagedError.exit_code == 4
    assert len(result.stderr.splitlines()) == 1


def test_json_keeps_stdout_clean_of_libraries_and_children(tmp_path: Path) -> None:
    """What prints to standard output during a stage, in any way, ends on stderr."""
    code = """
import subprocess, sys, os, tinyonn.command as command
class Report:
    def figures(self): return {"answer": 42, "stage": "overwritten", "peak_rss_bytes": 7}
    def table(self): raise AssertionError
def body(location, config):
    print("printed"); os.write(1, b"written\\n"); subprocess.run(["echo", "child"])
    return Report()
command.run_stage("status", "x", None, True, body, log=False)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    figures = json.loads(result.stdout)
    assert (figures["answer"], figures["stage"], figures["run"]) == (42, "status", "storage/x")
    assert figures["peak_rss_bytes"] == 7
    assert {"printed", "written", "child"} <= set(result.stderr.split())


@pytest.mark.parametrize(
    ("error", "exit_code", "text"),
    [
        (InputError("two\nlines"), 2, "two lines"),
        (MemoryError(), 3, "out of RAM"),
        (OSError(28, "No space left on device", "store/chunk"), 3, "no space left on disk for store/chunk"),
        (KeyboardInterrupt(), 130, "goes on from there"),
    ],
)
def test_what_goes_wrong_is_one_line(
    error: BaseException, exit_code: int, text: str, monkeypatch: Any
) -> None:
    def failing(location: str) -> None:
        raise error

    monkeypatch.setattr("tinyonn.status.read_status", failing)
    result = CliRunner().invoke(app, ["status", "x"])
    assert result.exit_code == exit_code
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_interrupt_ends_cleanly(tmp_path: Path) -> None:
    code = """
import signal, sys, time, typer, tinyonn.command as command
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
def body(location, config):
    print("up", flush=True); time.sleep(60)
try:
    command.run_stage("status", "x", None, False, body, log=False)
except typer.Exit as ending:
    sys.exit(ending.exit_code)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_fault_of_our_own_is_logged_with_its_traceback(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(location: str, config: Config) -> Any:
        raise ZeroDivisionError("a fault")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run_stage("record", "x", None, False, broken)
    assert "ZeroDivisionError: a fault" in (tmp_path / "storage" / "x" / "logs" / "record.log").read_text()


def test_the_log_file_takes_all_and_rotates_and_the_console_the_short_of_it(
    tmp_path: Path, capsys: Any
) -> None:
    path = setup_logging(tmp_path / "logs", "record")
    logger = logging.getLogger("tinyonn.record.driver")
    logger.debug("in detail")
    logger.info("in short")
    assert "in detail" in path.read_text()
    assert capsys.readouterr().err == "in short\n"
    for _ in range(6):
        logger.debug("x" * (FILE_BYTES - 100))
    close_logging()
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["record.log", "record.log.1", "record.log.2", "record.log.3"]
    assert all(file.stat().st_size <= FILE_BYTES for file in path.parent.iterdir())


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="no log can be written there"):
        setup_logging(tmp_path / "file" / "logs", "record")


def test_doctor_finds_this_machine_fit() -> None:
    report = examine(ROOT / "storage")
    states = {finding.what: finding.state for finding in report.findings}
    assert states["python"] == states["packages"] == states["bitsandbytes on cpu"] == "ok"
    assert {"GPU", "CPU", "RAM", "disk", "Ray"} <= {what.split(" ")[0] for what in states}
    assert not report.failed
    assert "NF4 product is right" in shown(report)


def test_doctor_names_what_is_wrong_and_the_remedy(tmp_path: Path, monkeypatch: Any) -> None:
    assert (look_at_python((3, 10, 4)).state, look_at_python((3, 14, 0)).state) == ("fail", "fail")
    assert look_at_ram(GiB).state == "warn"
    assert look_at_disk(tmp_path / "new" / "run", GiB).state == "warn"
    assert look_at_disk(tmp_path / "new" / "run", 100 * GiB).state == "ok"
    monkeypatch.setattr("tinyonn.doctor.nf4_error", lambda device: 1.2)
    assert look_at_nf4()[0].state == "fail"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert look_at_ray().state == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "192.168.1.10:6379")
    assert look_at_ray().state == "warn"
    assert "docs/cluster.md" in look_at_ray().remedy
    monkeypatch.setattr("tinyonn.doctor.free_ram", lambda: 1 // 0)
    broken = {finding.what: finding for finding in examine(tmp_path).findings}
    assert broken["RAM"].state == "fail"
    assert broken["disk"].state in ("ok", "warn")


def test_relative_runs_of_a_ray_job_outlive_its_copy_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("TINYONN_HOME", str(tmp_path / "home"))
    assert run_location("storage/x", "storage") == str(tmp_path / "home" / "storage" / "x")
    assert run_location("x", "storage") == str(tmp_path / "home" / "storage" / "x")
    assert run_location("/mnt/x", "storage") == "/mnt/x"
    assert run_location("x", "s3://bucket") == "s3://bucket/x"
    monkeypatch.delenv("TINYONN_HOME")
    assert run_location("x", "storage") == str(Path.home() / "tiny-onn" / "storage" / "x")
