"""What can be wrong with what a user gives: one clear message, its exit code, no traceback, and no harm done.

Each through ``tinyonn record`` as a user would. Where no Ray is needed to find the fault, none is started.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from typer.testing import CliRunner, Result

from tests.dense.architectures import make_model
from tests.record.runs import POISON, make_sick_model, reasons
from tinyonn.cli import app
from tinyonn.run import open_run
from tinyonn.show.logs import close_logging
from tinyonn.store.lock import RunLock

pytestmark = pytest.mark.timeout(900)  # the worst of machines

ROOT = Path(__file__).parents[1]
Rows = list[dict[str, Any] | bytes]


class Room:
    """A folder with a model, a corpus and a configuration, to be spoilt."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.config: dict[str, dict[str, Any]] = {
            "model": {"path": str(model), "quantization": "none", "dtype": "float32", "device": "cpu"},
            "data": {"path": str(folder / "rows.jsonl"), "slice": "kind", "max_tokens": 64},
            "record": {"segment": 2, "workers": 1},
        }
        self.write(good_rows())

    def write(self, rows: Rows) -> None:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (self.folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    def command(self, stage: str, *arguments: str) -> list[str]:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config), "utf-8")
        return [stage, str(self.run), "--config", str(path), *arguments]

    def call(self, stage: str, *arguments: str) -> Result:
        return CliRunner().invoke(app, self.command(stage, *arguments))

    def refused(self, *parts: str, code: int = 2, arguments: tuple[str, ...] = ()) -> str:
        """``tinyonn record`` ends with `code` and one line that matches every pattern; no Ray is left."""
        result = self.call("record", *arguments)
        assert not ray.is_initialized()
        return check_refusal(result.exit_code, result.stdout, result.stderr, code, *parts)

    def status(self) -> dict[str, Any]:
        result = self.call("status", "--json")
        assert result.exit_code == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return found


def check_refusal(exit_code: int, out: str, err: str, code: int, *parts: str) -> str:
    assert exit_code == code, err
    assert "Traceback" not in out + err
    assert "Logging error" not in err
    message = err.splitlines()[-1]
    assert message.startswith("tinyonn: ")
    for part in parts:
        assert re.search(part, message), f"{part!r} not in {message!r}"
    return message


def good_rows(count: int = 12) -> Rows:
    return [{"text": f"some text, number {number}", "kind": "ab"[number % 2]} for number in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sick_model(tmp_path_factory.mktemp("bad") / "model")


@pytest.fixture
def room(tmp_path: Path, model: Path) -> Room:
    return Room(tmp_path, model)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts or joins a Ray here has not looked at its input first."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a Ray was started")

    monkeypatch.setattr(ray, "init", started)


@pytest.fixture(autouse=True)
def _closed_logs() -> Iterator[None]:
    yield
    close_logging()


def spoil_many_lines(room: Room) -> None:
    room.write([*good_rows(), b"{", b'{"text": "cut', b"[1]"])


def spoil_bytes(room: Room) -> None:
    room.write([*good_rows(), *[b'{"text": "\xff\xfe", "kind": "a"}'] * 3])


def empty_texts(room: Room) -> None:
    room.write([{"text": " ", "kind": "a"}] * 3)


def empty_file(room: Room) -> None:
    room.write([])


def truncate_parquet(room: Room) -> None:
    path = room.folder / "rows.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 5000, "kind": ["a"] * 5000}), path)
    path.write_bytes(path.read_bytes()[:-100])
    room.config["data"]["path"] = str(path)


def spoil_parquet(room: Room) -> None:
    path = room.folder / "rows.parquet"
    texts = [os.urandom(20).hex() for _ in range(5000)]
    pq.write_table(pa.table({"text": texts, "kind": ["a"] * 5000}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:20000] + bytes(60000) + whole[80000:])
    room.config["data"]["path"] = str(path)


def unknown_key(room: Room) -> None:
    room.config["data"]["max_token"] = 64


def wrong_value(room: Room) -> None:
    room.config["record"]["workers"] = 0


def truncate_weights(room: Room) -> None:
    folder = Path(shutil.copytree(room.config["model"]["path"], room.folder / "model"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    room.config["model"]["path"] = str(folder)


COLUMNS = [r"data\.(text = 'body'|slice = 'topic') is not a column", r"its columns are \['text', 'kind'\]"]
CONTEXT = [
    r"data\.max_tokens = 500 is beyond the context of .*, 128 tokens; set data\.max_tokens to 128 or less"
]


def set_option(section: str, key: str, value: Any) -> Callable[[Room], None]:
    return lambda room: room.config[section].__setitem__(key, value)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        pytest.param(spoil_many_lines, ["3 of 15 rows are malformed, row 12 first", "at most 5%"], id="malformed"),
        pytest.param(spoil_bytes, ["3 of 15 rows are malformed", "not UTF-8 at byte 10"], id="not utf-8"),
        pytest.param(empty_texts, ["no usable row among 3", r"empty text \(3 times\)"], id="empty texts"),
        pytest.param(empty_file, ["no readable rows", "one JSON object a line"], id="empty file"),
        pytest.param(truncate_parquet, [r"rows\.parquet: not a readable Parquet.*truncated"], id="cut parquet"),
        pytest.param(spoil_parquet, [r"rows\.parquet: unreadable from row", "fetch it"], id="bad parquet"),
        pytest.param(set_option("data", "text", "body"), COLUMNS, id="text column"),
        pytest.param(set_option("data", "slice", "topic"), COLUMNS, id="slice column"),
        pytest.param(set_option("data", "max_tokens", 500), CONTEXT, id="beyond the context"),
        pytest.param(set_option("data", "path", "./none.jsonl"), [r"'\./none\.jsonl' does not exist"], id="no data"),
        pytest.param(set_option("model", "path", "./none"), [r"'\./none' does not exist"], id="no model"),
        pytest.param(unknown_key, [r"config\.yaml: unknown key 'data\.max_token'.*'data\.max_tokens'"], id="key"),
        pytest.param(wrong_value, [r"record\.workers = 0", "greater than 0"], id="wrong value"),
        pytest.param(set_option("model", "device", "cuda"), [r"model\.device = 'cuda'", "cpu or auto"], id="no gpu",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")),
    ],
)  # fmt: skip
def test_refused_before_anything_starts(room: Room, spoil: Callable[[Room], None], parts: list[str]) -> None:
    spoil(room)
    room.refused(*parts)
    assert not (room.run / "store").exists()
    assert not (room.run / "corpus.arrow").exists()
    again = room.call("status")
    assert check_refusal(again.exit_code, again.stdout, again.stderr, 2)


@pytest.mark.usefixtures("no_ray")
def test_unsupported_modules_are_named_before_the_corpus_is_read(room: Room, tmp_path: Path) -> None:
    room.config["model"]["path"] = str(make_model("qwen2_moe", tmp_path / "moe"))
    room.refused(r"model\.layers\.0\.mlp\.experts", "Qwen2MoeExperts", r"Supported: nn\.Linear")
    assert not (room.run / "corpus.arrow").exists()


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("text", ["model: {path: [", "- a list", "\x00\x01", "model:\n\tpath: x"])
def test_bad_yaml(room: Room, text: str) -> None:
    command = room.command("record")
    (room.folder / "config.yaml").write_text(text, "utf-8")
    result = CliRunner().invoke(app, command)
    check_refusal(
        result.exit_code,
        result.stdout,
        result.stderr,
        2,
        r"config\.yaml: (not a readable YAML|expected a mapping)",
    )


@pytest.mark.usefixtures("no_ray")
def test_a_second_driver(room: Room) -> None:
    with RunLock(room.run):
        room.refused(rf"held by process {os.getpid()} on .* last heard of", "wait for it or stop it", code=4)
    assert sorted(path.name for path in room.run.iterdir()) == ["lock", "logs"]


@pytest.fixture(scope="module")
def recorded(model: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Room:
    """A finished run of a corpus with some of everything in it that is set aside or cut."""
    room = Room(tmp_path_factory.mktemp("recorded"), model)
    rows = good_rows(60)
    rows[3] = {"text": "  ", "kind": "a"}
    rows[7] = b'{"text": "malformed, "kind": "b"}'
    rows[11] = b'{"text": "\xff\xfe", "kind": "b"}'
    rows[15] = {"text": None, "kind": "b"}
    rows[20] = {"text": f"its loss is not a number: {POISON}", "kind": "a"}
    rows[30] = {"text": "longer than a sample may be " * 9, "kind": "a"}
    room.write(rows)
    path = room.folder / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # the last line is cut off
    room.config["record"]["segment"] = 10
    result = room.call("record", "--json", "--address", ray_cluster)
    assert result.exit_code == 0, result.stderr
    assert "Traceback" not in result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["samples"], report["set_aside"], report["truncated"]) == (54, 6, 1)
    return room


def test_bad_samples_are_set_aside_and_listed_by_status(recorded: Room) -> None:
    found = {item["index"]: item["reason"] for item in recorded.status()["set_aside"]}
    assert found.keys() == {3, 7, 11, 15, 20, 59}
    assert found[3] == "empty text"
    assert found[7].startswith("malformed JSON")
    assert found[11] == "not UTF-8 at byte 10 of the line"
    assert found[15] == "'text' is empty"
    assert found[20] == reasons()[POISON]
    assert found[59].startswith("malformed JSON")
    shown = recorded.call("status")
    assert "set aside: sample 20 of a: loss is nan" in shown.stdout
    assert "set aside: sample 59: malformed JSON" in " ".join(shown.stdout.split())


def spoilt_copy(recorded: Room, tmp_path: Path) -> Room:
    """The finished run, in a room where everything may be changed."""
    room = Room(tmp_path, Path(recorded.config["model"]["path"]))
    room.config = {name: dict(section) for name, section in recorded.config.items()}
    shutil.copytree(recorded.run, room.run)
    return room


def another_model(room: Room) -> str:
    room.config["model"]["path"] = str(make_model("qwen2", room.folder / "model", seed=8))
    return r"model\.model\.safetensors: '\w+' in the run, '\w+' now"


def another_tokenizer(room: Room) -> str:
    folder = Path(shutil.copytree(room.config["model"]["path"], room.folder / "model"))
    file = folder / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace('"a":', '"@@":', 1).replace('"b":', '"a":', 1), "utf-8")
    room.config["model"]["path"] = str(folder)
    return r"model\.tokenizer\.json: '\w+' in the run, '\w+' now"


def another_configuration(room: Room) -> str:
    room.config["record"]["segment"] = 3
    return "segment_size: 10 in the run, 3 now"


def other_data(room: Room) -> str:
    room.config["data"]["path"] = str(room.folder / "rows.jsonl")  # of this room
    return r"data\.corpus: '\w+' in the run, '\w+' now.*slices\.a: 30 in the run, 6 now"


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("change", [another_model, another_tokenizer, another_configuration, other_data])
def test_a_run_resumed_with_something_else(
    recorded: Room, tmp_path: Path, change: Callable[[Room], str]
) -> None:
    room = spoilt_copy(recorded, tmp_path)
    before = room.status()
    difference = change(room)
    room.refused("was begun with something else", difference, "record into another run")
    after = room.status()
    measured = {"seconds": 0, "peak_rss_bytes": 0, "peak_parts_bytes": 0, "disk_bytes": 0}
    assert {**after, **measured} == {**before, **measured}
    name = open_run(room.run).parameters[0].name
    assert (open_run(room.run).records(name) == open_run(recorded.run).records(name)).all()


@pytest.mark.usefixtures("no_ray")
def test_an_unreadable_store(recorded: Room, tmp_path: Path) -> None:
    room = spoilt_copy(recorded, tmp_path)
    for file in (room.run / "store").rglob("*"):
        if file.is_file():
            file.write_bytes(b"garbage" * 100)
    room.refused(str(room.run), "restore|another folder|record", code=4)
    result = room.call("status")
    check_refusal(result.exit_code, result.stdout, result.stderr, 4, str(room.run))


def test_a_model_that_gives_no_number_at_all(room: Room, ray_cluster: str) -> None:
    room.write([{"text": f"number {number} {POISON}", "kind": "a"} for number in range(6)])
    room.refused(
        "none of the 6 calibration samples gives finite values", "loss is nan", "float32",
        arguments=("--address", ray_cluster),
    )  # fmt: skip
    assert room.status()["samples"] == 0


def test_weights_that_are_cut_off(room: Room, ray_cluster: str) -> None:
    truncate_weights(room)
    room.refused("not a readable safetensors file", "fetch", arguments=("--address", ray_cluster))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_the_cluster_does_not_have(room: Room, ray_cluster: str) -> None:
    room.config["model"]["device"] = "cuda"
    room.refused(
        "no machine of the Ray cluster has a GPU", "cpu or auto", arguments=("--address", ray_cluster)
    )


def test_a_cluster_that_is_not_there(room: Room) -> None:
    room.refused(
        r"no Ray cluster answers at 127\.0\.0\.1:9",
        "leave the address out",
        arguments=("--address", "127.0.0.1:9"),
    )


def test_a_cluster_with_another_token(room: Room, ray_cluster: str, tmp_path: Path) -> None:
    """In a process of its own: Ray reads the token once."""
    (tmp_path / "token").write_text("0" * 64)
    command = [sys.executable, "-m", "tinyonn", *room.command("record", "--address", ray_cluster)]
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    parts = (rf"no Ray cluster answers at {ray_cluster}", "give every machine the same token")
    check_refusal(result.returncode, result.stdout, result.stderr, 2, *parts)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 64 MiB, or None where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True, check=False
    )
    yield None if made.returncode else place
    if not made.returncode:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    ballast.write(bytes(size))
            except OSError:
                continue


@pytest.mark.slow
def test_a_disk_that_fills_up_while_recording(room: Room, disk: Path | None, ray_cluster: str) -> None:
    room.write(good_rows(80))
    room.run = (disk or room.folder) / "run"
    command = [sys.executable, "-m", "tinyonn", *room.command("record", "--address", ray_cluster)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = room.run / "logs" / "record.log"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count("committed ") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if disk is not None:
        fill(disk)
    else:  # the driver may write no file above a kilobyte: no snapshot any more
        psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (1000, 1000))
    out, err = process.communicate(timeout=200)
    check_refusal(process.returncode, out, err, 3, "no space left", "free some")
    status = room.status()
    assert 0 < status["samples"] < 80
    run = open_run(room.run)
    for parameter in run.parameters:
        assert run.mean(parameter.name).shape == (3, *parameter.shape)
    if disk is not None:
        (disk / "ballast").unlink()
    result = room.call("record", "--json", "--address", ray_cluster)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["samples"] == 80
    assert room.status()["merged"]


def test_a_disk_that_is_full_from_the_start(room: Room, disk: Path | None, ray_cluster: str) -> None:
    if disk is None:
        pytest.skip("needs a small file system, which may not be mounted here")
    fill(disk)
    room.run = disk / "run"
    room.refused("no space left", "free some", code=3, arguments=("--address", ray_cluster))
