"""``kill -9`` at any moment: what was acknowledged stays, nothing is half there, the end is the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.invariants import check_store, small_manifest
from tests.store.crash_child import MANIFEST
from tinyonn.store.repository import Store

KILLS = 10


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.store.crash_child", str(folder)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )


def test_killed_while_committing_merging_and_cleaning(tmp_path: Path) -> None:
    chance = random.Random(5)
    acknowledged: set[str] = set()
    progress = [0]
    kills = 0
    while kills < KILLS:
        child = start(tmp_path)
        assert child.stdout is not None
        # The first lives end while the store is made; the others while it is in use.
        if kills >= 2:
            assert child.stdout.readline() == "ready\n"
            lines = [child.stdout.readline().strip() for _ in range(chance.randint(1, 4))]
            acknowledged |= {line for line in lines if "/" in line}
            time.sleep(chance.uniform(0, 0.15))
        else:
            time.sleep(chance.uniform(0.8, 2.0))
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
        kills += 1
        acknowledged |= {line for line in rest.split("\n")[:-1] if "/" in line}
        if not Store.exists(tmp_path / "store"):
            assert not acknowledged
            continue
        covered = {
            f"{name}/{first}-{last}" for name, (first, last) in check_store(Store.open(tmp_path / "store"))
        }
        assert acknowledged <= covered, "a commit that was reported is gone"
        progress.append(len(covered))
        assert progress[-1] >= progress[-2]
    assert len(set(progress)) > KILLS // 2, f"the kills did not fall into the work: {progress}"
    last = start(tmp_path)
    output, _ = last.communicate(timeout=240)
    assert output.endswith("complete\n")
    store = Store.open(tmp_path / "store")
    assert [segment.name for segment in store.segments()] == ["code/0-100", "prose/0-60"]
    assert len(check_store(store)) == len(MANIFEST.leaves("code")) + len(MANIFEST.leaves("prose"))
    assert store.manifest == small_manifest({"code": 100, "prose": 60}, segment_size=2)
