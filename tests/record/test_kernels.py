"""The kernels for CUDA give the CPU's bits: in Triton's interpreter here, compiled where there is a GPU.

Their compiler needs no card, so that they compile is tested everywhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is an optional package")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_give_the_cpus_bits(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    succeeds("kernels_child.py", device, interpreted=device == "cpu")


@pytest.mark.parametrize("capability", ["90", "89"])
def test_kernels_compile_for_hopper_and_for_consumer_cards(capability: str) -> None:
    pytest.importorskip("triton", minversion="3.3", reason="its compiler is called otherwise")
    succeeds("compiles_child.py", capability, interpreted=False)


def succeeds(script: str, argument: str, interpreted: bool) -> None:
    env = {**os.environ, "TRITON_INTERPRET": str(int(interpreted)), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(HERE / script), argument], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
