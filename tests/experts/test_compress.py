from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyonn.experts.shards import compress, expand, stored_bytes, sums_by_group


def arrays(out: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    W = torch.from_numpy(rng.normal(size=(out, inputs)).astype(np.float32)).to(dtype)
    W[0, 0] = 0
    group = rng.choice(np.array([0, 1, 2, 4, 255], np.uint8), (out, inputs))
    return W, group


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kept_weight_is_there_once_in_its_group(dtype: torch.dtype) -> None:
    W, group = arrays(37, 50, dtype)
    found = compress(W, group, 5)
    wanted = [
        (g, i, j, W[i, j].item()) for g in range(5) for i in range(37) for j in range(50) if group[i, j] == g
    ]
    pointer = found.row_pointer.tolist()
    entries = [
        (row // 37, row % 37, int(found.columns[place]), found.values[place].item())
        for row in range(5 * 37)
        for place in range(pointer[row], pointer[row + 1])
    ]
    assert entries == wanted
    assert found.sizes.tolist() == [int((group == g).sum()) for g in range(5)]
    assert sum(t.nbytes for t in found[:3]) == stored_bytes(37, 50, 5, len(wanted), dtype.itemsize)


def test_back_again() -> None:
    W, group = arrays(20, 30, torch.bfloat16)
    dense, groups = expand(compress(W, group, 5), 20, 30, np.array([True, False, True, False, True]))
    assert np.array_equal(groups, group)
    kept = torch.from_numpy(np.isin(group, [0, 2, 4]))
    assert torch.equal(dense, torch.where(kept, W, torch.zeros_like(W)))


def test_columns_beyond_65536_take_more_bytes() -> None:
    W = torch.ones(1, 70_000, dtype=torch.bfloat16)
    found = compress(W, np.zeros((1, 70_000), np.uint8), 1)
    assert found.columns.dtype == torch.int32
    assert int(found.columns[-1]) == 69_999
    assert sum(t.nbytes for t in found[:3]) == stored_bytes(1, 70_000, 1, 70_000)


def test_worths_add_up() -> None:
    group = np.array([[0, 1, 1], [255, 0, 7]], np.uint8)
    records = np.array([[1, 2, 3], [4, 5, 6]], np.uint16) << 12
    worth = np.arange(16, dtype=np.float64) ** 2
    assert sums_by_group(group, records, worth, 2).tolist() == [1 + 25, 4 + 9, 16 + 36]
