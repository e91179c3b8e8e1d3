"""``kill -9`` while scoring and clustering: the old rows and labels or the new ones, never a mixture."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cluster.crash_child import CELLS, SCORES
from tests.recorded import make_run, parameters, score
from tinyonn.run import open_run

KILLS = 20


def rows_of(folder: Path) -> dict[str, bytes]:
    run = open_run(folder)
    return {
        p.name: np.asarray(run.rows(p.name)).tobytes() + np.asarray(run.affinity(p.name)).tobytes()
        for p in parameters()
    }


def check(folder: Path, expected: dict[float, dict[str, bytes]]) -> tuple[float | None, int | None]:
    """Rows are those of their settings, labels those of their summary; which settings, which number of cells."""
    run = open_run(folder)
    reader = run.store.reader()
    rows, labels = reader.stage("rows"), reader.stage("labels")
    if rows is None:
        assert labels is None
        return None, None
    preset = rows["weights"]["gradient"]
    assert rows_of(folder) == expected[preset]
    affinity = reader.stage("affinity")
    assert affinity is not None
    assert affinity["weights"] == rows["weights"]
    if labels is None:
        return preset, None
    sizes = np.zeros(256, int)
    for parameter in parameters():
        sizes += np.bincount(np.asarray(run.labels(parameter.name)).reshape(-1), minlength=256)
    cells = [cell["size"] for cell in labels["cells"]]
    assert sizes[: len(cells)].tolist() == cells
    assert sizes[255] == labels["trunk"]
    assert sizes.sum() == sum(parameter.size for parameter in parameters())
    return preset, len(cells)


@pytest.mark.slow
def test_killed_while_scoring_and_clustering(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    expected = {}
    for preset, config in SCORES.items():
        twin = tmp_path / preset
        shutil.copytree(folder, twin)
        score(twin, config)
        expected[config.exponents[1]] = rows_of(twin)
    chance = random.Random(2)
    seen = set()
    root = Path(__file__).parents[2]
    for kill in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.crash_child", str(folder), str(kill)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        assert child.stdout is not None
        for _ in range(chance.randint(0, 4)):
            assert child.stdout.readline() in ("scored\n", "clustered\n")
        time.sleep(chance.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        seen.add(check(folder, expected))
    assert {cells for _, cells in seen} >= set(CELLS), f"the kills did not fall into the work: {seen}"
    assert {preset for preset, _ in seen} >= {0.75, -1.0}
