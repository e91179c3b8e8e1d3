"""A training that is killed ten times at random steps has the curve of one that nothing disturbed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.trained import make_corpus, make_models, read_curve

STEPS, KILLS = 30, 10


def run(folder: Path, world: int, kill: int) -> None:
    """Train on, until the first worker kills itself; its neighbour then has nobody to talk to."""
    (folder / "store").unlink(missing_ok=True)
    child = [sys.executable, "-m", "tests.train.gloo_child", str(folder)]
    workers = [
        subprocess.Popen([*child, str(rank), str(world), str(kill), str(STEPS)], stderr=subprocess.PIPE)
        for rank in range(world)
    ]
    _, errors = workers[0].communicate(timeout=300)
    assert workers[0].returncode == (-signal.SIGKILL if kill else 0), errors.decode()
    for other in workers[1:]:
        if kill:
            other.kill()
        _, errors = other.communicate(timeout=60)
        assert kill or other.returncode == 0, errors.decode()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_ten_kills(tmp_path: Path, world: int) -> None:
    steps = sorted(random.Random(world).sample(range(1, STEPS), KILLS))
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    for folder in folders.values():
        folder.mkdir()
        make_models(folder / "model")
        make_corpus(folder / "corpus.arrow")
    run(folders["whole"], world, 0)
    for kill in (*steps, 0):
        run(folders["killed"], world, kill)
        if kill:
            assert len(read_curve(folders["killed"] / "train")) == kill
    whole, killed = (read_curve(folder / "train") for folder in folders.values())
    assert [line["step"] for line in killed] == list(range(1, STEPS + 1))
    for one, other in zip(whole, killed, strict=True):
        assert other == (one if world == 1 else pytest.approx(one, rel=1e-4, abs=1e-6))
