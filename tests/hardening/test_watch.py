"""The watch over Ray, where what it looks at is gone altogether."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tinyonn import endings
from tinyonn.dense.copies import copy_file
from tinyonn.errors import EngineLostError, InputError, StoreError
from tinyonn.workers import alive
from tinyonn.workers.alive import Watch


def reaped() -> psutil.Process:
    """A process that has ended and whose end somebody has asked for: it has no name any more."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    child.communicate(b"\n")
    with pytest.raises(psutil.NoSuchProcess):
        process.name()
    return process


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], str]], Watch]:
    """A watch over a Ray whose scheduler is such a process."""
    monkeypatch.setattr(alive, "_servers", lambda: [("raylet", reaped())])
    monkeypatch.setattr(alive, "SURE", 0.05)
    monkeypatch.setattr(alive, "LOOK", 0.05)
    monkeypatch.setattr(endings, "end", lambda error: None)
    return lambda held: Watch(None, held)


def stands_on(one: Watch) -> None:
    """What a stage does that asks from time to time."""
    deadline = time.monotonic() + 20
    with one:
        while time.monotonic() < deadline:
            one.check()
            time.sleep(0.02)


def test_a_scheduler_that_has_gone_without_a_trace_is_missed(
    watch: Callable[[Callable[[], str]], Watch],
) -> None:
    one = watch(lambda: "7 of 9 samples stay")
    with pytest.raises(EngineLostError, match=r"raylet.*7 of 9 samples stay"):
        stands_on(one)


def test_a_store_that_cannot_be_asked_either_does_not_hide_it(
    watch: Callable[[Callable[[], str]], Watch],
) -> None:
    def held() -> str:
        raise StoreError("no answer")

    one = watch(held)
    with pytest.raises(EngineLostError, match="what was committed stays"):
        stands_on(one)


def test_an_answer_that_comes_late_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is looked at twice; a cluster that has answered in between is there."""
    monkeypatch.setattr(alive, "_raylet_here", list)
    monkeypatch.setattr(alive, "LOOK", 0.02)
    monkeypatch.setattr(alive, "SURE", 0.2)
    one = Watch("there:6379", lambda: "nothing")
    monkeypatch.setattr(one, "_listen", lambda: None)
    one._heard -= alive.ANSWER + 1
    with one:
        time.sleep(0.1)
        one._heard = time.monotonic()
        time.sleep(0.4)
        assert one.lost is None


def test_a_model_in_a_folder_of_a_snapshot_is_copied_and_no_further(tmp_path: Path) -> None:
    repository, target = tmp_path / "models--a--b", tmp_path / "out"
    folder = repository / "snapshots" / "0123" / "int8"
    for made in (folder, repository / "blobs", target):
        made.mkdir(parents=True)
    (repository / "blobs" / "ab").write_text("{}", "utf-8")
    (folder / "tokenizer.json").symlink_to("../../../blobs/ab")
    copy_file(folder / "tokenizer.json", target)
    assert (target / "tokenizer.json").read_text("utf-8") == "{}"
    (tmp_path / "key").write_text("secret", "utf-8")
    (folder / "vocab.json").symlink_to(tmp_path / "key")
    with pytest.raises(InputError, match=r"vocab\.json is a link to .*key"):
        copy_file(folder / "vocab.json", target)
