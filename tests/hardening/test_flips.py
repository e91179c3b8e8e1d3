"""No turned bit of a run's files is silent, and every message names the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hardening.flips import KINDS, SILENT, UNNAMED, Flip, World, flipped, make_world, table, take
from tinyonn.corpus.file import Corpus
from tinyonn.errors import StoreDamagedError
from tinyonn.files import read_json
from tinyonn.record.identity import corpus_of_run, identity_of, recorded_corpus
from tinyonn.run import open_run
from tinyonn.select.selection import read_allocation
from tinyonn.store.repository import Store


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("flips"))


def check(flips: list[Flip]) -> None:
    bad = [flip for flip in flips if flip.outcome in (SILENT, UNNAMED)]
    assert not bad, "\n".join(map(str, [*bad, table(flips)]))


def test_every_kind_of_file_is_there(world: World) -> None:
    for kind in KINDS:
        assert any(path for pattern in kind.patterns for path in world.run.glob(pattern)), kind.name


def test_no_turned_bit_is_silent(world: World) -> None:
    check(list(take(world, 2 * len(KINDS), seed=3)))


@pytest.mark.slow
def test_no_turned_bit_of_many_is_silent(world: World) -> None:
    check(list(take(world, 400, seed=4)))


@pytest.fixture
def damaged(world: World) -> Iterator[Path]:
    """The run's corpus with a turned bit among its tokens."""
    path = world.run / "corpus.arrow"
    content = path.read_bytes()
    token = content.index(Corpus(path).sample("code", 0).input_ids.tobytes())
    path.write_bytes(flipped(content, 8 * token))
    yield path
    world.restore()


def test_a_damaged_corpus_is_made_again(
    world: World, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = world.folder / "whole" / "corpus.arrow"
    manifest = open_run(world.run).manifest
    with pytest.raises(StoreDamagedError, match=r"corpus\.arrow is damaged .*checksum"):
        Corpus(damaged).check()
    assert recorded_corpus(world.run, world.config, manifest).fingerprint == Corpus(whole).fingerprint
    assert damaged.read_bytes() == whole.read_bytes()
    assert f"{damaged} is damaged" in caplog.text and "made anew" in caplog.text


def test_recording_again_makes_a_damaged_corpus_again(world: World, damaged: Path) -> None:
    store = Store.open(world.run / "store")
    corpus = corpus_of_run(world.run, world.config, identity_of(world.config), store.manifest)
    assert corpus.check().fingerprint == Corpus(world.folder / "whole" / "corpus.arrow").fingerprint


def test_a_damaged_corpus_that_would_be_another_stays_and_is_named(
    world: World, damaged: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((world.folder / "rows.jsonl").read_text("utf-8").replace("return", "yield"), "utf-8")
    data = world.config.data.model_copy(update={"path": str(rows)})
    config = world.config.model_copy(update={"data": data})
    manifest, before = open_run(world.run).manifest, damaged.read_bytes()
    identity = identity_of(config)
    attempts: tuple[Callable[[], Corpus], ...] = (
        lambda: recorded_corpus(world.run, config, manifest),
        lambda: corpus_of_run(world.run, config, identity, manifest),
    )
    for attempt in attempts:
        with pytest.raises(
            StoreDamagedError, match=r"corpus\.arrow is damaged .*another corpus; put the file back"
        ):
            attempt()
        assert damaged.read_bytes() == before
        assert not list(world.run.glob("corpus.arrow.*"))


def test_shares_that_cannot_be_are_refused_without_a_digest_too(world: World) -> None:
    path = world.run / "allocation.json"
    tree = read_json(path, "")
    shares = tree["found"][0]["found"]["shares"]
    path.write_text(json.dumps(tree), "utf-8")
    assert read_allocation(path) == tree  # of an earlier version
    shares[min(shares)] = 8.0
    path.write_text(json.dumps(tree), "utf-8")
    with pytest.raises(
        StoreDamagedError, match=r"allocation\.json is damaged \(it gives a tensor the share 8\.0"
    ):
        read_allocation(path)
    world.restore()
