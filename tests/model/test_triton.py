"""The kernels for CUDA in Triton's interpreter, beside plain Torch; the same script runs compiled on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is an optional package")

SCRIPT = """
import sys
import torch
from tests.model.test_sparse import by_definition, compress, random_matrix
from tinyonn.model import triton_tinyonn
from tinyonn.model.sparse_tinyonn import dense_of, merge, sparse_linear

device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
forms = ("dense", "rows") if dtype == torch.float32 else ("dense", "rows", "masks")
# the interpreter cuts a float32 off where a GPU rounds it: one bfloat16 apart
cut = 2**-7 if dtype == torch.bfloat16 else 0

def moved(matrix):
    return matrix._replace(values=matrix.values.to(device), columns=matrix.columns.to(device),
                           row_pointer=matrix.row_pointer.to(device))

# 37 rows fill no whole number of programs; columns fill no word, no block of 256, no tile
for out, inputs, tokens in ((37, 150, (1, 8)), (5, 1030, (1, 2, 3, 4, 9)), (1, 32, (1,))):
    _, labels_OI, W_OI = random_matrix(out, inputs, 4, dtype, dropped=0.3, skewed=True)
    W_OI[0, 3] = 0  # stored, and worth nothing
    if out > 3:
        labels_OI[2] = 0  # a full row: every bit of a word, the sign too
        labels_OI[3] = -1  # an empty row
    matrix = compress(W_OI, labels_OI, 4)
    gates_G = torch.tensor([1.0, 0.0, 0.37, 2.5])
    expected_OI = by_definition(labels_OI, W_OI, gates_G)
    whole_OI = dense_of(moved(matrix), gates_G.to(device)).cpu()
    exact = (gates_G == 1)[labels_OI] | (labels_OI < 0)
    assert torch.equal(whole_OI[exact], expected_OI[exact])
    torch.testing.assert_close(whole_OI, expected_OI, rtol=cut, atol=0)
    assert not dense_of(moved(matrix), torch.zeros(4, device=device)).any()
    bias_O = torch.randn(out).to(dtype)
    for form in forms:
        merged = merge(moved(matrix), gates_G.to(device), form)
        assert torch.equal(merged.dense().cpu(), whole_OI)
        assert torch.equal(merged.dense(out // 3, out - 1).cpu(), whole_OI[out // 3 : out - 1])
        if form != "dense":
            assert merged.entries == merged.starts[-1] == (whole_OI != 0).sum()
            packed = merged.places if form == "rows" else merged.values
            assert merged.entries == packed.numel()
            if form == "masks":
                assert torch.equal(merged.values.cpu(), whole_OI[whole_OI != 0])
        X_TI = torch.randn(max(tokens), inputs).to(dtype).to(device)
        if out == 1:
            empty = merge(moved(matrix), torch.zeros(4, device=device), form)
            assert empty.entries == 0 or form == "dense"
            assert not sparse_linear(X_TI[:1], empty).any() and not empty.dense().any()
        for count in tokens:
            expected_TO = X_TI[:count].cpu().double() @ whole_OI.double().T
            if form != "dense" and count % 2:  # float32 sums of exact products
                found_TO = sparse_linear(X_TI[:count].float(), merged).cpu()
                assert (found_TO - expected_TO).abs().max() < 2e-6 * max(1, expected_TO.abs().max()), (form, count)
                continue
            found_TO = sparse_linear(X_TI[None, :count], merged, bias_O.to(device)).cpu()
            assert found_TO.shape == (1, count, out) and found_TO.dtype == dtype
            torch.testing.assert_close(found_TO[0].double(), expected_TO + bias_O.double(), rtol=cut, atol=1e-4)

if dtype == torch.bfloat16:  # the most entries that a row may have: 65,504 before its last word
    W_OI = torch.ones(1, 65536, dtype=dtype, device=device)
    values, masks, starts, skips = triton_tinyonn.compress_masks(W_OI)
    assert (masks == -1).all() and starts.tolist() == [0, 65536]
    assert skips.cpu()[0, -3:].tolist() == [65440, 65472, 65504]
    assert torch.equal(triton_tinyonn.expand_masks(values, masks, starts, skips, 65536), W_OI)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_and_what_calls_them_agree_with_torch(device: str, dtype: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    env = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, device, dtype], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.uint16: "u16"
}  # fmt: skip


class Compiled:
    """In the place of a kernel: compiles what a call would launch, and launches nothing."""

    def __init__(self, kernel: Any, capability: int, done: list[Any]) -> None:
        self.kernel, self.capability, self.done = kernel, capability, done

    def __getitem__(self, grid: Any) -> Compiled:
        return self

    def __call__(self, *arguments: Any, **options: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, aligned = {}, {}, {}
        for place, (parameter, argument) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            if isinstance(argument, torch.Tensor):
                signature[parameter.name] = f"*{TYPES[argument.dtype]}"
                aligned[place,] = [["tt.divisibility", 16]]
                if argument.dtype == torch.int32:  # counts that a later step would allocate by
                    argument.zero_()
            elif parameter.is_constexpr or argument == 1:  # as a launch takes a one
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = argument
            else:
                signature[parameter.name] = "i32"
                if argument % 16 == 0:
                    aligned[place,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, aligned)
        done = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        if self.kernel.__name__ in ("_scatter", "_pack", "_expand_rows"):
            assert "st.global.v" not in done.asm["ptx"]  # a gather said to be contiguous stays a gather
        if constants.get("TOKENS") == 1:
            layouts = re.findall(r"sizePerThread = \[([^]]*)", done.asm["ttgir"])
            assert set("".join(layouts)) <= set("1, ")
            # what the last sums take; a tile that is moved through shared memory on its way takes two more a step
            assert done.asm["ptx"].count("bar.sync") <= 8
        self.done.append(self.kernel.__name__)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [89, 90])
def test_kernels_compile_without_a_gpu(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler refuses what the interpreter lets pass, an annotation that is not Triton's for one."""
    from tinyonn.model import triton_tinyonn as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled: list[str] = []
    launched = {
        "_scatter",
        "_count",
        "_pack",
        "_expand_rows",
        "_expand_masks",
        "_decode_rows",
        "_decode_masks",
    }
    for name in launched:
        monkeypatch.setattr(kernels, name, Compiled(getattr(kernels, name), capability, compiled))
    W_OI = torch.zeros(64, 2560, dtype=torch.bfloat16)
    entries = W_OI.numel() // 10
    values, columns = W_OI.new_zeros(entries), torch.zeros(entries, dtype=torch.uint16)
    kernels.scatter(values, columns, torch.zeros(129, dtype=torch.int32), torch.ones(2), *W_OI.shape)
    _, starts = kernels.compress_rows(W_OI)
    words = torch.zeros(entries, dtype=torch.int32)
    _, masks, starts_O, skips = kernels.compress_masks(W_OI)
    kernels.expand_rows(words, starts, 2560)
    kernels.expand_masks(values, masks, starts_O, skips, 2560)
    for tokens, bias in ((1, None), (5, W_OI[0, :64])):
        kernels.decode_rows(W_OI[:tokens], words, starts, bias)
        kernels.decode_masks(W_OI[:tokens], values, masks, starts_O, skips, bias)
    assert set(compiled) == launched
