"""Compressed expert matrices beside their definition: a sum over groups of gate times a masked dense matrix."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tinyonn.model.sparse_tinyonn as sparse
from tinyonn.model import cpu_tinyonn
from tinyonn.model.sparse_tinyonn import (
    ExpertMatrix,
    choose_path,
    costs,
    dense_of,
    gated_linear,
    gpu_costs,
    merge,
    sparse_linear,
)

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Below and above what Numba compiles for; columns that are and are not a multiple of a step of masks
SHAPES = [(7, 13), (96, 512), (129, 705)]


def random_matrix(
    out: int,
    inputs: int,
    groups: int,
    dtype: torch.dtype = torch.float32,
    dropped: float = 0.2,
    seed: int = 0,
    skewed: bool = False,
) -> tuple[ExpertMatrix, torch.Tensor, torch.Tensor]:
    """A matrix, the group of each weight (-1: dropped) and the dense weight."""
    generator = torch.Generator().manual_seed(seed)
    W_OI = torch.randn(out, inputs, generator=generator).to(dtype)
    share = torch.ones(groups)
    share[0] += 2 if skewed else 0
    labels_OI = torch.multinomial(share, out * inputs, replacement=True, generator=generator).view(
        out, inputs
    )
    labels_OI[torch.rand(out, inputs, generator=generator) < dropped] = -1
    return compress(W_OI, labels_OI, groups), labels_OI, W_OI


def compress(W_OI: torch.Tensor, labels_OI: torch.Tensor, groups: int) -> ExpertMatrix:
    masks = [labels_OI == group for group in range(groups)]
    values = torch.cat([W_OI[mask] for mask in masks])
    columns = torch.cat([mask.nonzero()[:, 1] for mask in masks])
    counts = torch.cat([mask.sum(1) for mask in masks])
    pointer = functional.pad(counts.cumsum(0), (1, 0)).int()
    narrow = torch.uint16 if W_OI.shape[1] <= 65536 else torch.int32
    return ExpertMatrix(values, columns.to(narrow), pointer, *W_OI.shape)


def by_definition(labels_OI: torch.Tensor, W_OI: torch.Tensor, gates_G: torch.Tensor) -> torch.Tensor:
    gates_OI = torch.cat([gates_G, torch.zeros(1)])[labels_OI]
    return (W_OI.float() * gates_OI).to(W_OI.dtype)


@BOTH
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_the_dense_weight_is_the_definitions_to_the_bit(out: int, inputs: int, dtype: torch.dtype) -> None:
    matrix, labels_OI, W_OI = random_matrix(out, inputs, 5, dtype)
    for gates in ([1.0] * 5, [0.0] * 5, [1, 0, 0.3, 0, 2.7]):
        gates_G = torch.tensor(gates)
        assert torch.equal(dense_of(matrix, gates_G), by_definition(labels_OI, W_OI, gates_G))


def test_full_cover_with_gates_of_one_is_the_dense_layer() -> None:
    matrix, _, W_OI = random_matrix(96, 512, 6, torch.bfloat16, dropped=0)
    X = torch.randn(2, 5, 512).bfloat16()
    bias = torch.randn(96).bfloat16()
    ones = torch.ones(6)
    assert torch.equal(dense_of(matrix, ones), W_OI)
    expected = functional.linear(X, W_OI, bias)
    assert torch.equal(gated_linear(X, matrix, ones, bias), expected)
    assert torch.equal(sparse_linear(X, merge(matrix, ones, "dense"), bias), expected)


@BOTH
@pytest.mark.parametrize("form", ["dense", "rows", "masks"])
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_form_and_kernel(
    out: int, inputs: int, form: sparse.Form, dtype: torch.dtype, threads: int
) -> None:
    matrix, labels_OI, W_OI = random_matrix(out, inputs, 5, dtype, skewed=True)
    gates_G = torch.tensor([0.5, 0, 1, 0, 1.7])
    if form == "masks" and (dtype == torch.float32 or not cpu_tinyonn.expands()):
        with pytest.raises(ValueError, match="no kernel"):
            merge(matrix, gates_G, "masks")
        return
    merged = merge(matrix, gates_G, form)
    expected_OI = by_definition(labels_OI, W_OI, gates_G)
    assert merged.entries == int((expected_OI != 0).sum())
    assert torch.equal(merged.dense(), expected_OI)
    assert torch.equal(merged.dense(2, 5), expected_OI[2:5])
    bias = torch.randn(out).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernels = {"rows": (sparse._decode, sparse._token_major), "masks": (sparse._decode,)}.get(form, ())
        for tokens in (1, 2, 5, 8, 19, 70):
            X_TI = torch.randn(tokens, inputs).to(dtype)
            expected = X_TI.double() @ expected_OI.double().T
            for kernel in kernels:  # float32 sums of exact products
                error = (kernel(X_TI, merged) - expected).abs().max()
                assert error < 2e-6 * expected.abs().max(), (kernel.__name__, tokens)
            found = sparse_linear(X_TI[None], merged, bias)
            assert found.shape == (1, tokens, out) and found.dtype == dtype
            torch.testing.assert_close(
                found[0].double(), expected + bias.double(), rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-4,
                atol=1e-4 if dtype == torch.float32 else 0.1,
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)


def test_kernels_without_torchs_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, labels_OI, W_OI = random_matrix(129, 705, 3)
    merged = merge(matrix, torch.ones(3), "rows")
    X_TI = torch.randn(3, 705)
    monkeypatch.setattr(cpu_tinyonn, "_parallel", lambda: None)  # as on a Torch with another OpenMP
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = sparse._decode(X_TI, merged)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(
        found, X_TI @ by_definition(labels_OI, W_OI, torch.ones(3)).T, rtol=1e-4, atol=1e-4
    )


def test_gradients_against_finite_differences() -> None:
    matrix, _, _ = random_matrix(6, 11, 4, torch.float64)
    X = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    values = matrix.values.clone().requires_grad_()
    gates_G = torch.tensor([1, 0.1, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def layer(*parts: torch.Tensor) -> torch.Tensor:
        X, values, gates_G, bias = parts
        return gated_linear(X, matrix._replace(values=values), gates_G, bias)

    assert torch.autograd.gradcheck(layer, (X, values, gates_G, bias))


@BOTH
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_gradients_against_autograd_of_the_dense_layer(out: int, inputs: int, dtype: torch.dtype) -> None:
    """A group whose gate is 0 has a gradient too; checkpointing changes none."""
    matrix, labels_OI, W_OI = random_matrix(out, inputs, 4, dtype)
    gates = torch.tensor([1, 0, 0.5, 2.0])
    X_TI = torch.randn(9, inputs).to(dtype)
    G_TO = torch.randn(9, out).to(dtype)

    W64, gates64 = W_OI.double().requires_grad_(), gates.double().requires_grad_()
    X64 = X_TI.double().requires_grad_()
    gates_OI = torch.cat([gates64, gates64.new_zeros(1)])[labels_OI]
    (X64 @ (W64 * gates_OI).T).backward(G_TO.double())
    assert X64.grad is not None and W64.grad is not None and gates64.grad is not None
    exact = (X64.grad, torch.cat([W64.grad[labels_OI == group] for group in range(4)]), gates64.grad)

    found = []
    for saves in (True, False):
        leaves = [part.clone().requires_grad_() for part in (X_TI, matrix.values, gates)]
        arguments = leaves[0], matrix._replace(values=leaves[1]), leaves[2]
        Y = gated_linear(*arguments) if saves else checkpoint(gated_linear, *arguments, use_reentrant=False)
        Y.backward(G_TO)
        found.append([leaf.grad for leaf in leaves])
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for grad, again, expected in zip(*found, exact, strict=True):
        assert grad is not None and torch.equal(grad, again)
        assert (grad - expected).abs().max() <= limit * expected.abs().max()


def test_more_columns_than_sixteen_bits_count() -> None:
    matrix, labels_OI, W_OI = random_matrix(2, 70_000, 2)
    merged = merge(matrix, torch.ones(2))
    X_TI = torch.randn(1, 70_000)
    expected = X_TI @ by_definition(labels_OI, W_OI, torch.ones(2)).T
    torch.testing.assert_close(sparse_linear(X_TI, merged), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        (torch.ones(3), r"\[3\] do not fit 4 groups"),
        (torch.ones(4, dtype=torch.int64), "int64"),
        (torch.tensor([1, -0.5, 1, 1]), "gate 1 is -0.5; a gate is at least 0"),
        (torch.tensor([1, 1, 1, math.nan]), "gate 3 is nan"),
        (torch.tensor([math.inf, 1, 1, 1]), "gate 0 is inf"),
    ],
)
def test_gates_that_do_not_fit_are_refused(gates: torch.Tensor, said: str) -> None:
    matrix, _, _ = random_matrix(7, 13, 4)
    for call in (dense_of, merge, lambda matrix, gates: gated_linear(torch.ones(1, 13), matrix, gates)):
        with pytest.raises(ValueError, match=said):
            call(matrix, gates)


def test_an_input_that_does_not_fit_is_refused() -> None:
    matrix, _, _ = random_matrix(7, 13, 4)
    with pytest.raises(ValueError, match=r"\[2, 12\] does not fit a layer of 13 inputs"):
        sparse_linear(torch.ones(2, 12), merge(matrix, torch.ones(4)))
    with pytest.raises(ValueError, match="does not fit"):
        gated_linear(torch.tensor(1.0), matrix, torch.ones(4))


def test_no_tokens_and_no_active_groups() -> None:
    matrix, _, _ = random_matrix(96, 512, 4)
    merged = merge(matrix, torch.zeros(4), "rows")
    assert merged.entries == 0
    assert sparse_linear(torch.ones(1, 512), merged).tolist() == [[0.0] * 96]
    assert sparse_linear(torch.ones(2, 0, 512), merged).shape == (2, 0, 96)


def test_the_cost_model() -> None:
    out, inputs = 6912, 2560
    shares = (0.01, 0.03, 0.1, 0.31, 1)
    paths = [choose_path(out, inputs, int(share * out * inputs), 1, False) for share in shares]
    assert paths == ["decode"] * 4 + ["dense"]
    assert choose_path(out, inputs, 1000, 1, True) == "dense"
    assert choose_path(out, inputs, out * inputs // 10, 512, False) == "prefill"
    assert choose_path(64, 64, 400, 1, False) == "dense"  # a call costs more than what it saves
    forms = ("rows", "masks", "dense")
    for share, expected in zip((0.01, 0.1, 0.31, 1), ("rows", "rows", "masks", "dense"), strict=True):
        known = costs(out, inputs, int(share * out * inputs), 1)
        assert min(forms, key=lambda one: known[one]) == expected
    for share, expected in zip(
        (0.01, 0.1, 0.31, 0.6, 1), ("rows", "rows", "rows", "dense", "dense"), strict=True
    ):
        known = gpu_costs(out, inputs, int(share * out * inputs))
        assert min(forms, key=lambda one: known[one]) == expected


@pytest.mark.parametrize("without", ["numba triton", ""])
def test_saved_files_alone_with_and_without_compilers(without: str, tmp_path: Path) -> None:
    """As a package of its own beside a model, with nothing written there."""
    package = tmp_path / "saved"
    package.mkdir()
    source = Path(sparse.__file__).parent
    for name in ("sparse", "batched", "matrix", "cpu", "llvm", "triton", "gated_triton"):
        shutil.copy(source / f"{name}_tinyonn.py", package)
    files = sorted(package.iterdir())
    script = f"""
import sys
for name in {without.split()!r}:
    sys.modules[name] = None
import torch
from saved.sparse_tinyonn import ExpertMatrix, gated_linear, merge, sparse_linear
assert "tinyonn" not in sys.modules
torch.manual_seed(0)
W = torch.randn(200, 400)
pointer = torch.arange(0, 80001, 400, dtype=torch.int32)
columns = torch.arange(400).repeat(200).to(torch.uint16)
for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
    matrix = ExpertMatrix(W.to(dtype).reshape(-1).requires_grad_(), columns, pointer, 200, 400)
    X = torch.randn(3, 400).to(dtype)
    gate = torch.tensor([0.5], requires_grad=True)
    expected = X @ (0.5 * W.to(dtype)).T
    assert (sparse_linear(X, merge(matrix, gate)) - expected).abs().max() < limit
    Y = gated_linear(X, matrix, gate)
    assert (Y - expected).abs().max() < limit
    Y.sum().backward()
    assert abs(gate.grad - 2 * expected.float().sum()) < 1000 * limit
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(package.iterdir()) == files
