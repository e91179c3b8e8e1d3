"""A run whose corpus grows, on a real Ray: only what is new is recorded, and no kill decides a bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.record.runs import assert_same_run, make_sick_model, records_of, write_rows
from tests.store.machines import beating
from tinyonn.config import Config, parse_config
from tinyonn.corpus.file import Corpus
from tinyonn.errors import InputError, StoreBusyError
from tinyonn.record.driver import _Recording, record
from tinyonn.record.identity import recorded_corpus
from tinyonn.status import read_status
from tinyonn.store.repository import Store

FIRST, SECOND = {"a": 9}, {"b": 6, "a": 5}


@dataclass(frozen=True)
class World:
    """A model and two files of rows."""

    folder: Path
    model: Path

    def config(self, sources: int, **record: Any) -> Config:
        """Of the first source, or of both; the second's slice ``a`` is the first's."""
        files = [
            {"path": str(self.folder / name), "slice": "kind"} for name in ("first.jsonl", "second.jsonl")
        ]
        return parse_config(
            {
                "model": {
                    "path": str(self.model),
                    "quantization": "none",
                    "dtype": "float32",
                    "device": "cpu",
                },
                "data": {"sources": files[:sources], "max_tokens": 64},
                "record": {"segment": 4, "calibration": 4, "workers": 1, **record},
            },
            whole=True,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("growth")
    write_rows(folder / "first.jsonl", FIRST, seed=1)
    write_rows(folder / "second.jsonl", SECOND, seed=2)
    return World(folder, make_sick_model(folder / "model"))


@pytest.fixture(scope="module", autouse=True)
def connected(ray_cluster: str) -> Iterator[None]:
    ray.init(address=ray_cluster, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def begun(world: World) -> Path:
    """A complete run of the first source."""
    folder = world.folder / "begun"
    record(str(folder), world.config(1), progress=False)
    return folder


@pytest.fixture(scope="module")
def grown(world: World, begun: Path) -> Path:
    """The same, grown by the second source."""
    folder = Path(shutil.copytree(begun, world.folder / "grown"))
    report = record(str(folder), world.config(2), progress=False)
    assert report.samples_recorded + report.set_aside >= sum(SECOND.values())
    return folder


def stop_at(patch: pytest.MonkeyPatch, method: str, call: int) -> None:
    """Interrupt a recording at a call of one of its steps."""
    real, calls = getattr(_Recording, method), [0]

    def stopping(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return real(self, *args)

    patch.setattr(_Recording, method, stopping)


def test_only_what_is_new_is_recorded(world: World, begun: Path, grown: Path) -> None:
    store = Store.open(grown / "store")
    assert dict(store.manifest.slices) == {"a": 14, "b": 6}
    assert store.manifest.grown == {"a": (9,)}
    assert {segment.name for segment in store.segments()} == {"a/0-14", "b/0-6"}
    before, now = Corpus(begun / "corpus.arrow"), Corpus(grown / "corpus.arrow")
    assert [s.index for s in now.range("a", 0, 9)] == [s.index for s in before.range("a", 0, 9)]
    assert store.calibration == Store.open(begun / "store").calibration
    again = record(str(grown), world.config(2), progress=False)
    assert again.samples_recorded == 0
    assert read_status(str(grown)).complete


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "call"), [("_grow", 1), ("_open_store", 1), ("_commit", 1), ("_commit", 3)]
)
def test_killed_while_it_grows_it_ends_in_the_same_bits(
    world: World,
    begun: Path,
    grown: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: int,
) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "run"))
    with monkeypatch.context() as patch:
        stop_at(patch, method, call)
        with pytest.raises(KeyboardInterrupt):
            record(str(folder), world.config(2), progress=False)
    record(str(folder), world.config(2, workers=2), progress=False)
    assert_same_run(Store.open(grown / "store"), Store.open(folder / "store"))


@pytest.mark.slow
def test_grown_before_it_was_complete_it_ends_in_the_same_bits(
    world: World, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "_commit", 2)
        with pytest.raises(KeyboardInterrupt):
            record(str(tmp_path / "run"), world.config(1), progress=False)
    record(str(tmp_path / "run"), world.config(2, workers=2), progress=False)
    assert_same_run(Store.open(grown / "store"), Store.open(tmp_path / "run" / "store"))


def test_nothing_is_committed_once_another_machine_holds_the_run(
    world: World, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the run over after the first worker has written, as when this one slept."""
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    real = _Recording._commit

    def late(self: _Recording, task: Any) -> None:
        with beating(run / "lock"):
            real(self, task)

    monkeypatch.setattr(_Recording, "_commit", late)
    with pytest.raises(StoreBusyError, match="elsewhere"):
        record(str(run), world.config(2), progress=False)
    before, after = Store.open(begun / "store"), Store.open(run / "store")
    assert [s.name for s in after.segments()] == [s.name for s in before.segments()]


def test_a_source_that_was_recorded_cannot_go(world: World, grown: Path) -> None:
    before = records_of(Store.open(grown / "store"))
    corpus = (grown / "corpus.arrow").read_bytes()
    with pytest.raises(
        InputError, match=r"was begun with something else: .*slices\.b: 6 in the run, None now"
    ):
        record(str(grown), world.config(1), progress=False)
    assert (grown / "corpus.arrow").read_bytes() == corpus
    assert records_of(Store.open(grown / "store")).keys() == before.keys()


def test_later_stages_never_write_over_the_recorded_corpus(world: World, grown: Path, tmp_path: Path) -> None:
    manifest, content = Store.open(grown / "store").manifest, (grown / "corpus.arrow").read_bytes()
    for sources in (1, 2):  # the configuration may have changed since
        assert recorded_corpus(grown, world.config(sources), manifest).fingerprint == manifest.data["corpus"]
    assert (grown / "corpus.arrow").read_bytes() == content
    with pytest.raises(InputError, match="cannot be tokenised anew"):
        recorded_corpus(tmp_path, world.config(2), manifest)
    assert not (tmp_path / "corpus.arrow").exists()


def test_a_corpus_that_has_grown_and_is_not_recorded_yet(
    world: World, begun: Path, grown: Path, tmp_path: Path
) -> None:
    shutil.copy(grown / "corpus.arrow", tmp_path)
    with pytest.raises(InputError, match="not recorded yet"):
        recorded_corpus(tmp_path, world.config(2), Store.open(begun / "store").manifest)
    before, now = Corpus(begun / "corpus.arrow"), Corpus(grown / "corpus.arrow")
    first = now.calibration(12, before.slices)
    assert [sample.index for sample in first] == [sample.index for sample in before.calibration(12)]
