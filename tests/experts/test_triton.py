"""The kernels for CUDA in Triton's interpreter, beside plain Torch; the same script runs compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is an optional package")

SCRIPT = """
import sys
import torch
from tests.experts.test_sparse import by_definition, random_matrix
from tinyonn.experts import triton_tinyonn

device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
# 37 rows fill no whole number of blocks; a row of a group has up to 70 entries, more than a block's width
matrix, labels_OI, W_OI = random_matrix(37, 150, 4, dtype, dropped=0.05, skewed=True)
gates_G = torch.tensor([1.0, 0.0, 0.37, 2.5])
values, columns, pointer = (part.to(device) for part in matrix[:3])
found_OI = triton_tinyonn.scatter(values, columns, pointer, gates_G.to(device), 37, 150)
expected_OI = by_definition(labels_OI, W_OI, gates_G)
exact = (gates_G == 1)[labels_OI] | (labels_OI < 0)
assert torch.equal(found_OI.cpu()[exact], expected_OI[exact])
# the interpreter cuts a float32 off where a GPU rounds it: one bfloat16 apart
torch.testing.assert_close(found_OI.cpu(), expected_OI, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)
assert not triton_tinyonn.scatter(values, columns, pointer, torch.zeros(4, device=device), 37, 150).any()

sorted_values = expected_OI[expected_OI != 0]
rows, sorted_columns = expected_OI.nonzero(as_tuple=True)
starts = torch.nn.functional.pad(torch.bincount(rows, minlength=37).cumsum(0), (1, 0)).int()
X_TI = torch.randn(3, 150).to(dtype)
Y_TO = triton_tinyonn.decode(
    X_TI.to(device), sorted_values.to(device), sorted_columns.to(torch.uint16).to(device), starts.to(device)
)
assert Y_TO.dtype == torch.float32
torch.testing.assert_close(Y_TO.cpu(), X_TI.float() @ expected_OI.float().T, rtol=1e-5, atol=1e-4)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_agree_with_torch(device: str, dtype: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    env = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, device, dtype], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
