"""What can be imported without what: the parts that compute need no Ray, store or YAML; the command line is quick."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABSENT = """
ray dask distributed zarr numcodecs icechunk bitsandbytes datasets accelerate pydantic psutil pyarrow rich typer
google_crc32c scipy sklearn
""".split()  # not PyYAML: transformers does not come without it
COMPUTING = """
corpus.file corpus.files corpus.forms corpus.json_rows corpus.messages corpus.tokens dense.checkpoint
dense.gguf_folder dense.load dense.parameters dense.source errors experts machine plan.demands
plan.recording profile.groups profile.kernel profile.measure record.recorder record.worker
reference show.sizes store.records train.data train.losses train.optimizers train.options
train.routing train.samples train.student train.teacher
""".split()
HEAVY = "torch ray dask zarr transformers numba".split()

IMPORT_WITHOUT = """
import sys
from importlib import import_module

absent, names = (argument.split() for argument in sys.argv[1:])
sys.modules.update(dict.fromkeys(absent))
for name in names:
    try:
        import_module(name)
    except ImportError as error:
        print(name, error)
"""


def printed(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_computes_needs_torch_and_transformers_alone() -> None:
    names = [*(f"tinyonn.{name}" for name in COMPUTING), "benchmarks.report"]
    assert printed(IMPORT_WITHOUT, " ".join(ABSENT), " ".join(names)) == ""


def test_a_module_that_needs_what_is_absent_is_noticed() -> None:
    assert printed(IMPORT_WITHOUT, "pydantic", "tinyonn.config").startswith("tinyonn.config ")


@pytest.mark.parametrize("name", ["tinyonn", "tinyonn.cli"])
def test_the_start_loads_nothing_heavy(name: str) -> None:
    loaded = printed(f"import sys, {name}; print(*sys.modules)").split()
    assert name in loaded
    assert sorted(set(loaded) & set(HEAVY)) == []
