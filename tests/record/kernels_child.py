"""The recorder's kernels for CUDA beside the CPU's own; in Triton's interpreter on a CPU, compiled on a GPU.

TRITON_INTERPRET=1 python tests/record/kernels_child.py cpu
python tests/record/kernels_child.py cuda
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from tinyonn.record import device as dispatch
from tinyonn.record import kernels_triton as kernels
from tinyonn.record.activations import add_dense_levels, input_bins
from tinyonn.record.gradients import LevelSink
from tinyonn.record.levels import levels_torch
from tinyonn.record.sums import embedding_gradient

DEVICE = sys.argv[1]


def slot(device: str = DEVICE) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def half_octave(values: torch.Tensor) -> int:
    return int((values.float().abs().view(torch.int32) >> 22).max())


def wide(*shape: int) -> torch.Tensor:
    """Over forty octaves."""
    return torch.randn(shape) * torch.exp2(torch.randint(-30, 10, shape).float())


def check_levels(dtype: torch.dtype) -> None:
    values = wide(10_001).to(dtype)
    for spoilt, top_is in (
        ([], None),
        ([float("nan")], 511),
        ([-float("inf")], 510),
        ([1e-41, -1e-45], None),
    ):
        values[100 : 100 + len(spoilt)] = torch.tensor(spoilt, dtype=dtype)
        sums, top = torch.full((10_001,), 7, dtype=torch.uint8, device=DEVICE), slot()
        kernels.add_levels(values.to(DEVICE), 220, sums, top)
        assert torch.equal(sums.cpu() - 7, levels_torch(values, 220))
        assert int(top) == (half_octave(values) if top_is is None else top_is)
        values[100:102] = 1.0


def check_product() -> None:
    """Small integers: every order of additions gives the same sums, and a bfloat16 rounds them."""
    for tokens, rows, columns in ((1, 33, 70), (37, 40, 64), (70, 65, 130)):
        A, B = (torch.randint(-8, 9, (tokens, n)).to(torch.bfloat16) for n in (rows, columns))
        product = (A.float().T @ B.float()).to(torch.bfloat16)
        sums, top = torch.full((rows, columns), 3, dtype=torch.uint8, device=DEVICE), slot()
        kernels.add_product_levels(A.to(DEVICE), B.to(DEVICE), 254, sums, top)
        assert torch.equal(sums.cpu() - 3, levels_torch(product, 254)), (tokens, rows, columns)
        assert int(top) == half_octave(product)
        for value in (float("nan"), float("inf")):
            A[0, 2] = value
            top = slot()
            kernels.add_product_levels(A.to(DEVICE), B.to(DEVICE), 254, sums, top)
            assert int(top) >= 510, value
    A = torch.full((1, 64), 1.0, dtype=torch.bfloat16)
    A[0, 1] = 1 + 2**-7
    A = torch.cat(
        [A, torch.full((1, 64), 2.0**-9, dtype=torch.bfloat16)]
    )  # 1 + 2^-7 + 2^-9 squared lies between
    sums = torch.zeros((64, 64), dtype=torch.uint8, device=DEVICE)
    kernels.add_product_levels(A.to(DEVICE), (A * 1.4922).to(DEVICE), 250, sums, slot())
    rounded = (A.float().T @ (A * 1.4922).float()).to(torch.bfloat16)
    assert torch.equal(sums.cpu(), levels_torch(rounded, 250))


def check_bins(dtype: torch.dtype) -> None:
    for tokens in (1, 31, 32, 33, 100):
        X = (wide(tokens, 300) * (torch.rand(300) < 0.9)).to(dtype)
        for spoilt in (1.0, float("inf"), -float("nan")):
            X[0, 7] = spoilt
            tops = slot("cpu"), slot()
            dispatch.INTERPRETED = False
            expected = input_bins(X, tops[0])
            dispatch.INTERPRETED = DEVICE == "cpu"
            found = input_bins(X.to(DEVICE), tops[1])
            assert torch.equal(found.cpu(), expected), (tokens, dtype)
            assert int(tops[0]) == int(tops[1])
            assert (int(tops[0]) < 510) == (spoilt == 1.0)


def check_rows(dtype: torch.dtype) -> None:
    ids = torch.randint(0, 30, (200,))
    ids[::3] = 11  # a frequent token
    G = wide(200, 300).to(dtype)
    dispatch.INTERPRETED = False
    rows, values = embedding_gradient(ids, G, 1.7)
    sums, top = torch.zeros((40, 300), dtype=torch.uint8), slot("cpu")
    LevelSink(sums, 220).add_rows(rows, values, top)
    dispatch.INTERPRETED = DEVICE == "cpu"
    found_rows, found = embedding_gradient(ids.to(DEVICE), G.to(DEVICE), 1.7)
    assert torch.equal(found_rows.cpu(), rows)
    assert torch.equal(found.cpu(), values)
    found_sums, found_top = torch.zeros((40, 300), dtype=torch.uint8, device=DEVICE), slot()
    kernels.add_row_levels(ids.to(DEVICE), G.to(DEVICE), 1.7, 220, found_sums, found_top)
    assert torch.equal(found_sums.cpu(), sums)
    assert int(found_top) == int(top)
    band = torch.ones(10, 300, device=DEVICE)
    kernels.add_rows(ids.to(DEVICE), G.to(DEVICE), 1.7, band, 5)
    expected = torch.ones(10, 300).index_add(
        0, rows[(rows >= 5) & (rows < 15)] - 5, values[(rows >= 5) & (rows < 15)]
    )
    assert torch.equal(band.cpu(), expected)


def check_dense(dtype: torch.dtype) -> None:
    W, rows, columns = wide(70, 90).to(dtype), wide(70).square(), wide(90).square()
    sums = torch.full((2, 70, 90), 4, dtype=torch.uint8)
    found = sums.clone().to(DEVICE)
    threshold = 2.0 ** (-3 / 8)
    add_dense_levels(
        W.float().numpy(), rows.numpy(), columns.numpy(), 220, threshold, sums[0].numpy(), sums[1].numpy()
    )
    kernels.add_dense_levels(
        W.to(DEVICE), rows.to(DEVICE), columns.to(DEVICE), 220, threshold, found[0], found[1]
    )
    assert torch.equal(found.cpu(), sums)
    assert 0 < int((sums[1] - 4).sum()) < 70 * 90
    above = np.nextafter(np.float32(threshold), np.float32(2))  # the threshold lies between two float32
    edge = torch.from_numpy(
        np.array([[np.nextafter(np.float32(threshold), np.float32(0)), threshold, above]], "f")
    )
    counts = torch.zeros((2, 1, 3), dtype=torch.uint8, device=DEVICE)
    squares = torch.zeros(1, device=DEVICE), torch.ones(3, device=DEVICE)
    kernels.add_dense_levels(edge.to(DEVICE), *squares, 220, threshold, counts[0], counts[1])
    assert counts[1].cpu().tolist() == [(edge[0].numpy().astype(np.float64) > threshold).astype(int).tolist()]


torch.manual_seed(0)
dispatch.INTERPRETED = DEVICE == "cpu"
for dtype in (torch.float32, torch.bfloat16):
    check_levels(dtype)
    check_bins(dtype)
    check_rows(dtype)
    check_dense(dtype)
check_product()
