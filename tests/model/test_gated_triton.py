"""Training of sparse experts by the GPU's kernels, beside dense float64 weights and the CPU's way.

In Triton's interpreter; the same scripts run compiled on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is an optional package")

PRELUDE = """
import sys
import torch
import torch.utils.checkpoint
import tinyonn.model.batched_tinyonn as batched
from tests.model.test_batched import GATES, VALUE_GATES, by_definition, exact, leaves, run
from tinyonn.model import gated_triton_tinyonn as kernels

device = sys.argv[1]
torch.manual_seed(0)
kernels.ROWS = 32  # the interpreter runs one program at a time
# The interpreter cuts a float32 off where a GPU rounds it
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2 if device == "cpu" else 1e-2}


def there(matrix, *others):
    tensors = [None if one is None else one.detach().to(device) for one in others]
    return matrix._replace(**{name: getattr(matrix, name).to(device) for name in matrix._fields[:3]}), *tensors


def beside(found, wanted, limit):
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    found, wanted = found.detach().cpu().double(), wanted.detach().double()
    assert found.isfinite().all()
    assert (found - wanted).abs().max() <= limit * wanted.abs().max(), float((found - wanted).abs().max())
"""

KERNELS = """
# 37 x 150 fills no whole number of blocks; the fourth sample has no gate that is on
for values_dtype, dtype in ((torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)):
    for tokens in (1, 5, 70) if values_dtype != dtype else (70,):
        matrix, labels_OI, W_OI, (X, _, gates, bias), G = leaves(37, 150, values_dtype, dtype, tokens)
        gates = gates.detach().clone()
        gates[3] = 0
        weights_BOI = torch.stack([by_definition(labels_OI, W_OI.float(), one) for one in gates]).to(dtype)
        limit = TOLERANCE[dtype]
        matrix, X_d, gates_d, bias_d, G_d = there(matrix, X, gates, bias, G)
        dense = kernels.spread(matrix)
        assert torch.equal(dense.groups_OI.cpu().long(), labels_OI % 256)
        assert torch.equal(dense.values_OI.cpu()[labels_OI >= 0], W_OI[labels_OI >= 0])
        dense.values_OI[labels_OI.to(device) < 0] = torch.nan  # where no entry is, may lie anything
        wide = [one.detach().double() for one in (X, weights_BOI, G)]
        beside(kernels.gated_product(X_d, dense, gates_d), wide[0] @ wide[1].mT, limit)
        Y = kernels.gated_product(X_d, dense, gates_d, bias_d)
        beside(Y, wide[0] @ wide[1].mT + bias.double(), limit)
        assert torch.equal(Y[3], bias_d.expand(tokens, -1))
        assert torch.equal(kernels.gated_product(X_d, dense, gates_d, bias_d), Y)
        of_X = kernels.gated_product(G_d, dense, gates_d, transposed=True)
        beside(of_X, wide[2] @ wide[1], limit)
        assert not of_X[3].any()
        D_OI = kernels.gated_gradient(G_d, X_d, dense, gates_d)
        gates_BOI = torch.nn.functional.pad(gates, (0, 1))[:, labels_OI].double()
        beside(D_OI, (wide[2].mT @ wide[0] * gates_BOI).sum(0), 1e-5)
        assert torch.equal(kernels.gated_gradient(G_d, X_d, dense, gates_d), D_OI)

    W_BOI = torch.full((5, 37, 150), torch.nan, dtype=dtype, device=device)
    kernels.dense_weights(dense, gates_d, W_BOI)
    one_OI = torch.full((37, 150), torch.nan, dtype=dtype, device=device)
    kernels.dense_weight(matrix, gates_d[2], one_OI)
    assert torch.equal(one_OI, W_BOI[2])
    # float32 to the bit; a bfloat16 is cut off by the interpreter
    torch.testing.assert_close(W_BOI.cpu(), weights_BOI, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)

    D_POI = torch.randn(3, 37, 150, device=device).to(dtype)
    D_POI[:, labels_OI.to(device) < 0] = torch.nan
    found = torch.ones(matrix.values.numel(), device=device)
    kernels.gather(matrix, D_POI, gates_d[:3], found)
    by_group = [labels_OI == group for group in range(5)]
    taken = D_POI.cpu().double()
    wanted_OI = (taken * gates_BOI[:3]).sum(0)
    beside(found, 1 + torch.cat([wanted_OI[mask] for mask in by_group]), 1e-6)
    products = taken * W_OI.double()
    beside(kernels.gate_sums(matrix, D_POI), torch.stack([products[:, mask].sum(1) for mask in by_group], 1), 1e-5)

# More columns than 16 bits number, and a group in no row
columns, pointer = (torch.tensor(one, dtype=torch.int32) for one in ([0, 69_999, 5], [0, 2, 2, 2, 2, 2, 3]))
(wide,) = there(batched.ExpertMatrix(torch.tensor([1.0, 2, 3]), columns, pointer, 2, 70_000))
dense = kernels.spread(wide)
places = (dense.groups_OI.cpu() != 255).nonzero().tolist()
assert places == [[0, 0], [0, 69_999], [1, 5]] and dense.groups_OI[1, 5] == 2
try:
    kernels.spread(wide._replace(row_pointer=torch.zeros(511, dtype=torch.int32)))
except ValueError as error:
    assert "255 groups are more than the 254" in str(error)
else:
    raise AssertionError
"""

LAYERS = """
def layer(matrix, parts, G, value_gates, wanted):
    matrix, value_gates_d, *rest = there(matrix, value_gates, G, *parts)
    G_d, *parts_d = rest
    parts_d = [part.requires_grad_(bool(one)) for part, one in zip(parts_d, wanted, strict=True)]
    X, values, gates, bias = parts_d
    Y = batched.batched_linear(X, matrix._replace(values=values), gates, bias, value_gates_d)
    gradients = iter(torch.autograd.grad(Y, [part for part in parts_d if part.requires_grad], G_d))
    return [Y, *[next(gradients) if one else None for one in wanted]]


on_gpu = batched.on_gpu
for values_dtype, dtype in ((torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)):
    matrix, labels_OI, W_OI, parts, G = leaves(37, 150, values_dtype, dtype, 7)
    limit = TOLERANCE[dtype]
    wanted = exact(labels_OI, W_OI, parts, G, VALUE_GATES)
    batched.on_gpu = lambda tensor: tensor.is_cuda
    on_cpu = run(matrix, parts, G, VALUE_GATES)
    batched.on_gpu = on_gpu
    # A router that is held; gates that learn, with weights written in two chunks; a frozen model; values alone
    cases = [((1, 1, 0, 1), 256, 4), ((1, 1, 1, 1), 0, 3), ((1, 0, 0, 0), 256, 4), ((0, 1, 0, 0), 0, 5)]
    for learned, tokens, chunk in cases if values_dtype != dtype else cases[:2]:
        batched.TOKENS_WITHIN, batched.CHUNK_WEIGHTS, batched.CHUNK_BYTES = tokens, chunk, 0
        found = layer(matrix, parts, G, VALUE_GATES, learned)
        for one, other, cpu in zip(found, wanted, on_cpu, strict=True):
            if one is not None:
                assert one.dtype == cpu.dtype
                beside(one, other, limit)
                beside(one, cpu, limit)
    again = layer(matrix, parts, G, VALUE_GATES, learned)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True) if one is not None)

    # One row of gates for all of the input
    batched.TOKENS_WITHIN = 256
    alone = [parts[0][:1], parts[1], parts[2][2:3], parts[3]]
    found = layer(matrix, alone, G[:1], None, [True] * 4)
    for one, other in zip(found, exact(labels_OI, W_OI, alone, G[:1], GATES[2:3]), strict=True):
        beside(one, other, limit)

# The last matrix: float32 values under autocast, two dimensions in the middle
matrix_d, X, values, gates, bias = there(matrix, *parts)
wanted = batched.batched_linear(X.bfloat16(), matrix_d, gates, bias)
with torch.autocast(device, torch.bfloat16):
    Y = batched.batched_linear(X.float()[:, None], matrix_d, gates, bias)
assert Y.dtype == torch.bfloat16 and torch.equal(Y, wanted[:, None])

# No tokens, no samples, no entries
for samples, tokens in ((5, 0), (0, 3)):
    nothing = torch.randn(samples, tokens, 150, device=device, requires_grad=True)
    some = gates[:samples].clone().requires_grad_()
    Y = batched.batched_linear(nothing, matrix_d, some)
    Y.sum().backward()
    assert Y.shape == (samples, tokens, 37) and nothing.grad.shape == nothing.shape and not some.grad.any()
none = matrix_d._replace(
    values=values[:0], columns=matrix_d.columns[:0], row_pointer=torch.zeros_like(matrix_d.row_pointer)
)
assert torch.equal(batched.batched_linear(X, none, gates, bias), bias.expand(5, 7, 37))
# An expert and the core without entries, then all of it: forward and backward as by the CPU's way
for lost in ((1, 4), (0, 1, 2, 3, 4)):
    sizes = matrix.row_pointer.long().diff().clone()
    for group in lost:
        sizes[37 * group : 37 * (group + 1)] = 0
    starts = matrix.row_pointer.long()
    kept = torch.cat([torch.arange(a, a + n) for a, n in zip(starts[:-1].tolist(), sizes.tolist(), strict=True)])
    less = matrix._replace(
        columns=matrix.columns[kept], row_pointer=torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    )
    fewer = [parts[0], parts[1].detach()[kept].requires_grad_(), *parts[2:]]
    less = less._replace(values=fewer[1])
    found = layer(less, fewer, G, VALUE_GATES, [True] * 4)
    checkpointed = batched.batched_linear
    batched.batched_linear = lambda *given: torch.utils.checkpoint.checkpoint(checkpointed, *given, use_reentrant=False)
    again = layer(less, fewer, G, VALUE_GATES, [True] * 4)
    batched.batched_linear = checkpointed
    batched.on_gpu = lambda tensor: tensor.is_cuda
    wanted = run(less, fewer, G, VALUE_GATES)
    batched.on_gpu = on_gpu
    for one, other, cpu in zip(found, again, wanted, strict=True):
        assert torch.equal(one, other)
        beside(one, cpu, 1e-2) if cpu.numel() else None
"""

# What the compiler, unlike the interpreter, would refuse
COMPILES = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource
from tinyonn.model import gated_triton_tinyonn as kernels

arch, shared = int(sys.argv[1]), int(sys.argv[2])
WHOLE = {"groups_ptr": "*u8", "columns_ptr": "*u16", "pointer_ptr": "*i32"}
floats = ("gates_ptr", "D_ptr", "sums_ptr", "of_values_ptr", "values_ptr", "V_ptr")


def compiled(kernel, warps=4, stages=3, ones=(), halves=(), **constants):
    names = kernel.arg_names
    constants.update(dict.fromkeys(ones, 1))
    signature, aligned = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*bf16" if name in halves else WHOLE.get(name, "*fp32" if name in floats else "*bf16")
        else:
            signature[name] = "i32"
        if name not in constants:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert made.asm["cubin"] and made.metadata.shared <= shared, (kernel.__name__, made.metadata.shared)


large = shared > kernels.LARGE_SHARED
tile = kernels.TILES[large][-1]
for one in ("inputs_stride", "out_stride"):
    sizes = dict(OUT=tile.rows, TOKENS=tile.columns, DEPTH=tile.depth)
    compiled(kernels._product, tile.warps, tile.stages, (one,), TABLE=256, BIAS=True, WIDEN=False, **sizes)
tile = kernels.GRADIENT_TILES[large]
sizes = dict(OUT=tile.rows, INPUTS=tile.columns, DEPTH=tile.depth)
compiled(kernels._gradient, tile.warps, tile.stages, TABLE=256, WIDEN=False, **sizes)
if not large:  # one kind of card is enough for the others
    sys.exit()
entries = {"ROWS": kernels.ROWS, "ENTRIES": kernels.ENTRIES}
for gated in (False, True):
    compiled(kernels._spread, GATED=gated, halves=("V_ptr",) if gated else (), **entries)
compiled(kernels._fill, warps=8, TABLE=256, BLOCK=kernels.WEIGHTS)
compiled(kernels._gather, **entries)
compiled(kernels._gate_sums, warps=8, ROWS=kernels.SUM_ROWS, ENTRIES=kernels.ENTRIES, halves=("D_ptr",))
"""


def succeeds(script: str, *arguments: str, interpreted: bool = False) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", [KERNELS, LAYERS], ids=["kernels", "layers"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_beside_dense_weights(device: str, script: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    succeeds(PRELUDE + script, device, interpreted=device == "cpu")


@pytest.mark.parametrize(("arch", "shared"), [("90", "232448"), ("89", "101376")])
def test_compiles_for_cards_of_much_and_little_shared_memory(arch: str, shared: str) -> None:
    """Without one: the compiler that Triton brings needs none."""
    pytest.importorskip("triton", minversion="3.3", reason="its compiler is called otherwise")
    succeeds(COMPILES, arch, shared)
