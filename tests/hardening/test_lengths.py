"""A process that runs a model does not grow with every new length of a sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
FEW, LENGTHS, LONGEST = 8, 40, 60
HELD = """
import re
from pathlib import Path
def held():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
RECORDER = """
import json
import numpy as np
from tinyonn.corpus.file import Sample
from tinyonn.dense.load import load_model
from tinyonn.config import ModelConfig
from tinyonn.record.worker import calibrate
from tinyonn.record.recorder import Recorder
dense = load_model(ModelConfig(path="reference", quantization="nf4", dtype="bfloat16", device="cpu"))
recorder = Recorder(dense, 1)
def sample(tokens):
    ids = np.arange(tokens, dtype=np.int32)
    return Sample(tokens, "x", ids, ids)
recorder.open(calibrate(recorder, [sample({longest})], [list(recorder.sites)]), spills=True)
sizes = []
for tokens in [*range({longest}, {longest} - {few}, -1), *range({longest} - {lengths}, {longest} - {few})]:
    recorder.record([sample(tokens)])
    sizes.append(held())
print(json.dumps(sizes))
"""
GATES = """
import json
import torch
from tinyonn.dense.load import load_model
from tinyonn.config import ModelConfig
model = load_model(ModelConfig(path="reference", quantization="none", dtype="bfloat16", device="cpu")).model
sizes = []
for tokens in [*range({longest}, {longest} - {few}, -1), *range({longest} - {lengths}, {longest} - {few})]:
    with torch.no_grad():
        model(torch.arange(tokens)[None])
    sizes.append(held())
print(json.dumps(sizes))
"""


def run(code: str, **env: str) -> str:
    known = {name: value for name, value in os.environ.items() if name not in CACHES and "MALLOC" not in name}
    process = subprocess.run(
        [sys.executable, "-c", HELD + code], cwd=ROOT, env={**known, "OMP_NUM_THREADS": "1", **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()[-1]


@pytest.mark.parametrize(("code", "more"), [(RECORDER, 1.1), (GATES, 1.2)], ids=["recorder", "evaluation"])
def test_private_memory_after_many_lengths_is_that_after_few(code: str, more: float) -> None:
    sizes = json.loads(run(code.format(few=FEW, lengths=LENGTHS, longest=LONGEST)))
    assert len(sizes) == LENGTHS
    assert max(sizes) <= more * max(sizes[:FEW])


def test_what_the_user_has_set_stays_and_goes_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyonn.machine import CACHE_ENTRIES, bound_caches, worker_environment

    monkeypatch.setenv(CACHES[0], "7")
    monkeypatch.delenv(CACHES[1], raising=False)
    bound_caches()
    assert [os.environ[name] for name in CACHES] == ["7", str(CACHE_ENTRIES)]
    given = {CACHES[0]: "7", CACHES[1]: str(CACHE_ENTRIES), "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}
    assert worker_environment(3) == given
    monkeypatch.delenv(CACHES[1])


KEEPING = """
import numpy as np
from tinyonn.workers.tasks import THREADS, computing
def churn():
    parts = [np.ones(4 << 20, np.uint8) for _ in range(48)]
    del parts[::2]
    last = np.ones(64, np.uint8)
    del parts
    return held(), last
before = held()
with computing(THREADS, 1):
    during, _ = churn()
after, _ = churn()
print(json.dumps([before, during, after]) if (json := __import__("json")) else "")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_what_tasks_keep_for_each_other_goes_back_when_they_have_ended() -> None:
    before, during, after = json.loads(run(KEEPING))
    assert during > before + (128 << 20)
    assert after < before + (16 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_the_users_own_malloc_settings_stay() -> None:
    _, during, _ = json.loads(run(KEEPING, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536"))
    assert during < json.loads(run(KEEPING))[1]
