"""Every stage killed at moments drawn by a seed, and its workers, and Ray's own processes: the same bits, and no hang.

A life that is killed goes on in the next; the last one of a stage ends by itself, and must have made what an
undisturbed call makes. ``TINYONN_SEED`` draws other moments.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.hardening import lives
from tests.hardening.lives import HANG, PATIENCE, SERVERS, SOON, Bits, Found, Life, World, slack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

TRIES = 6  # lives for a kill: one that comes after the end of its life is tried again, sooner


@dataclass(frozen=True)
class Case:
    """A stage, how it is called, what is killed one after another, and the latest moment, as of `Life.kill`."""

    stage: str
    arguments: tuple[str, ...]
    victims: tuple[str, ...]
    span: float
    bits: Found
    after: str | None  # the snapshot with the bits that must come out; None asks an undisturbed life

    @property
    def workers(self) -> bool:
        """Whether it has processes that work."""
        return "worker" in self.victims or "--engine" in self.arguments


RAY = ("--engine", "ray", "--workers", "2")
DASK = ("--engine", "distributed", "--workers", "2")
DENSE = ("{folder}/dense", "--format", "dense")


def exported(run: Path) -> Bits:
    return lives.files(run.parent / "dense")


def shards(run: Path) -> Bits:
    return lives.files(run / "experts", ".safetensors")


def profiled(run: Path) -> Bits:
    return lives.files(run / "profile")


EVALUATE = ("--methods", "default,wanda,magnitude", "--budgets", "0.6", "--samples", "16")
RECORD = ("gcs", "raylet", "driver", "term", "worker", "raylet", "gcs", "term", "worker", "driver")
CASES = [
    Case("record", (), RECORD, 20, lives.records, "score"),
    Case("merge", (), ("driver", "term", "driver", "hup"), 4, lives.records, "score"),
    Case("score", (), ("driver", "term"), 8, lives.rows, "cluster"),
    Case("score", RAY, ("gcs", "raylet", "worker", "term"), 8, lives.rows, "cluster"),
    Case("score", DASK, ("worker", "term"), 5, lives.rows, "cluster"),
    Case("cluster", (), ("driver", "term"), 11, lives.labels, "assemble"),
    Case("cluster", RAY, ("raylet", "gcs", "worker", "driver"), 10, lives.labels, "assemble"),
    Case("cluster", DASK, ("driver", "term"), 8, lives.labels, "assemble"),
    Case("assemble", (), ("driver", "term", "hup"), 20, shards, "profile"),
    Case("assemble", RAY, ("gcs", "raylet", "term", "worker"), 12, shards, "profile"),
    Case("assemble", DASK, ("worker",), 12, shards, "profile"),
    Case("profile", (), ("raylet", "driver", "gcs", "term", "worker"), 12, profiled, "train"),
    Case("train", (), ("driver", "term", "driver", "hup"), 30, lives.training, "after"),
    Case(
        "train", ("--workers", "2"), ("gcs", "worker", "raylet", "term", "driver"), 25, lives.training, None
    ),
    Case("evaluate", EVALUATE, ("driver", "term", "driver", "term"), 14, lives.losses, None),
    Case("export", DENSE, ("driver", "term", "driver", "term"), 6, exported, None),
]
ONE_EACH = {
    "record": "worker", "merge": "driver", "score": "driver", "cluster": "term", "assemble": "driver",
    "profile": "worker", "train": "driver", "evaluate": "term", "export": "driver",
}  # fmt: skip


def name_of(case: Case) -> str:
    return f"{case.stage}-{'-'.join(w.strip('-') for w in case.arguments[:2]) or 'here'}"


def one_kill(stage: str) -> Case:
    """The first case of a stage with one victim."""
    case = next(case for case in CASES if case.stage == stage)
    return replace(case, victims=(ONE_EACH[stage],))


table: list[str] = []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(tmp_path_factory.mktemp("kills"))
    print("\n".join(table))


def test_there_are_sixty() -> None:
    assert sum(len(case.victims) for case in CASES) == 60
    assert {case.stage for case in CASES} == ONE_EACH.keys()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_killed_at_any_moment_it_ends_in_the_same_bits(case: Case, world: World, tmp_path: Path) -> None:
    killed_and_equal(case, world, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", ONE_EACH)
def test_killed_once_it_ends_in_the_same_bits(stage: str, world: World, tmp_path: Path) -> None:
    killed_and_equal(one_kill(stage), world, tmp_path)


def killed_and_equal(case: Case, world: World, tmp_path: Path) -> None:
    """Kill one victim of a case after another, let the last life end, and compare what it made."""
    chance = random.Random(f"{os.environ.get('TINYONN_SEED', '1')} {case.stage} {case.arguments}")
    run = tmp_path / "run"
    if case.after is None:
        undisturbed(case, world, tmp_path / "twin" / "run")
        expected = case.bits(tmp_path / "twin" / "run")
    else:
        expected = case.bits(world.snapshot(case.after))
    shutil.copytree(world.snapshot(case.stage), run)
    span = case.span
    for victim in case.victims:
        for _ in range(TRIES):
            life = Life(world, case.stage, run, case.arguments)
            delay = chance.uniform(0, span / 2 if victim in SERVERS else span)
            if life.kill(victim, delay, case.workers) and ended(case, life, victim, delay):
                break
            life.process.kill()
            life.wait(PATIENCE)
            life.wait_until_alone()
            span *= 0.7
            begin_again(case, world, run)
        else:
            pytest.fail(f"no {victim} could be killed before the end")
    life = Life(world, case.stage, run, case.arguments)
    assert life.wait(PATIENCE) == 0, life.said()
    life.wait_until_alone()
    found = case.bits(run)
    assert found.keys() == expected.keys()
    for name, bits in expected.items():
        assert found[name] == bits, f"{name} has other bits"


def undisturbed(case: Case, world: World, run: Path) -> None:
    shutil.copytree(world.snapshot(case.stage), run)
    life = Life(world, case.stage, run, case.arguments)
    assert life.wait(PATIENCE) == 0, life.said()


def begin_again(case: Case, world: World, run: Path) -> None:
    """From before the stage, after a life that came to its end."""
    for path in run.parent.iterdir():
        if path.is_dir() and path.name != "twin":
            shutil.rmtree(path)
    shutil.copytree(world.snapshot(case.stage), run)


def ended(case: Case, life: Life, victim: str, delay: float) -> bool:
    """Wait for the end that the kill must bring; False if the life had done its work before it noticed."""
    began, load = time.monotonic(), slack()
    if victim == "driver":
        code = life.wait(30)
        assert code == -9
    elif victim in ("term", "hup"):
        code = life.wait(SOON * load)
        if code in (0, -15, -1):  # all is done; Python itself was ending, and dies as any process does
            return False
        assert code == (143 if victim == "term" else 129), (code, life.said())
        assert "goes on from there" in life.said() or delay < 1  # Python itself was still starting
    elif victim == "worker":
        code = life.wait(PATIENCE)
        starting = "did not start" in life.said()  # a Dask cluster's worker, before there was a cluster
        assert code == (4 if starting else 0), (code, life.said())
    else:
        code = life.wait(HANG)
        if code == 0:
            return False
        # Ray's C++ ends a process at once, and without a word, that asks a scheduler for workers which has just died.
        if not (victim == "raylet" and code == 1):
            assert code == 4, (code, life.said())
            assert "Ray's" in life.said() and "goes on from there" in life.said()
    seconds = time.monotonic() - began
    assert "Traceback" not in life.said() and "core_worker" not in life.said(), life.said()
    life.wait_until_alone()
    where = f"{case.stage:9} {' '.join(case.arguments[:2]):20} {victim:7} {delay:5.1f} s in"
    table.append(f"{where}: exit {code:4} after {seconds:5.1f} s")
    print(table[-1], flush=True)
    return True
