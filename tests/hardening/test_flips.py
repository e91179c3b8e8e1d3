"""No turned bit of a run's files is silent, and every message names the file."""

from __future__ import annotations

import pytest

from tests.hardening.flips import KINDS, SILENT, UNNAMED, Flip, World, make_world, table, take


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
