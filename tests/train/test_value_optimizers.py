"""AdamW and Muon for sparse values are Torch's where nothing is masked; updates have one size at every density."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.layers import group_slices, sparse_layer
from tinyonn.model.linear_tinyonn import ExpertLinear
from tinyonn.train.expert_optimizers import (
    SparseAdamW,
    SparseMuon,
    iterated,
    orthogonalised,
    runs,
)


def test_neighbouring_groups_make_one_run() -> None:
    found = runs([True, True, True, False, True, True], [3, 0, 2, 4, 1, 0])
    assert [(run.groups, run.sizes, run.entries) for run in found] == [
        ([0, 2], [3, 2], slice(0, 5)),
        ([4], [1], slice(9, 10)),
    ]


def test_sparse_adamw_is_adamw() -> None:
    layer = sparse_layer(24, 16)
    plain = nn.Parameter(layer.values.detach().clone())
    ours = SparseAdamW([("layer", layer)], 0.01, (0.8, 0.9), 1e-6, 0.3)
    theirs = torch.optim.AdamW([plain], 0.01, (0.8, 0.9), 1e-6, 0.3)
    for seed in range(5):
        plain.grad = layer.values.grad = torch.randn(
            plain.shape, generator=torch.Generator().manual_seed(seed)
        )
        ours.step()
        theirs.step()
    torch.testing.assert_close(layer.values.detach(), plain.detach(), rtol=1e-6, atol=1e-7)


def test_a_gpus_step_of_adamw_gives_the_bits_of_the_step_by_slices() -> None:
    sizes = [5, 0, 9, 3, 1]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sum(sizes), generator=generator)
    grads = [torch.randn(values.shape, generator=generator) for _ in range(4)]
    grads[1][5:14] = 0  # a group that rests for a step
    grads[2][:5] = 0
    for grad in grads:
        grad[17:] = 0  # one that is never touched
    pointer = torch.tensor([0, *sizes]).cumsum(0).int()
    found = []
    for way in ("update_runs", "update_together"):
        layer: Any = SimpleNamespace(
            values=nn.Parameter(values.clone()), row_pointer=pointer, out_features=1, groups=len(sizes)
        )
        optimizer = SparseAdamW([("layer", layer)], 0.01, (0.8, 0.9), 1e-6, 0.3)
        with torch.no_grad():
            for grad in grads:
                getattr(optimizer, way)(layer.values, grad, optimizer.param_groups[0])
        found.append((layer.values.detach(), *optimizer.state[layer.values].values()))
    assert found[0][1].tolist() == [3, 0, 3, 4, 0]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def dense(layer: ExpertLinear, values: torch.Tensor) -> torch.Tensor:
    """The values in a dense matrix, entry by entry."""
    W_OI = torch.zeros(layer.out_features, layer.in_features)
    pointer, columns = layer.row_pointer.tolist(), layer.columns.tolist()
    for number in range(len(pointer) - 1):
        for place in range(pointer[number], pointer[number + 1]):
            W_OI[number % layer.out_features, columns[place]] = values[place]
    return W_OI


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_sparse_muon_of_all_entries_is_muon(shape: tuple[int, int]) -> None:
    layer = sparse_layer(*shape, kept=1.0)
    plain = nn.Parameter(dense(layer, layer.values.detach()))
    ours = SparseMuon([("layer", layer)], 0.02, 0.9, weight_decay=0.1)
    theirs = torch.optim.Muon([plain], 0.02, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        layer.values.grad = torch.randn(layer.values.shape, generator=generator)
        plain.grad = dense(layer, layer.values.grad)
        ours.step()
        theirs.step()
    torch.testing.assert_close(dense(layer, layer.values.detach()), plain.detach(), rtol=1e-6, atol=1e-7)


def test_a_gpus_step_of_muon_is_the_step_by_slices() -> None:
    found = []
    for way in ("update_runs", "update_together"):
        layer = sparse_layer(24, 16)
        optimizer = SparseMuon([("layer", layer)], 0.02, 0.9, weight_decay=0.1)
        resting = group_slices(layer)[1]
        before = layer.values.detach()[resting].clone()
        for seed in range(3):
            grad = torch.randn(layer.values.shape, generator=torch.Generator().manual_seed(seed))
            grad[resting] = 0
            with torch.no_grad():
                getattr(optimizer, way)(layer.values, grad, optimizer.param_groups[0])
        assert torch.equal(layer.values.detach()[resting], before)
        found.append((layer.values.detach(), optimizer.state[layer.values]["momentum_buffer"]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kept", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_sparse_muons_updates_have_the_size_of_adamws(kept: float, masked: bool) -> None:
    layer = sparse_layer(96, 64, kept)
    before = layer.values.detach().clone()
    optimizer = SparseMuon([("layer", layer)], lr=1.0)
    layer.values.grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    if masked:
        layer.values.grad[group_slices(layer)[1].start :] = 0
    optimizer.step()
    moved = (layer.values.detach() - before)[layer.values.grad != 0]
    assert 0.1 < float(moved.square().mean().sqrt()) < 0.3
    assert float((moved * layer.values.grad[layer.values.grad != 0]).sum()) < 0  # downhill


def test_newton_schulz_of_ours_is_torchs() -> None:
    for shape in ((5, 9), (9, 5)):
        M_OI = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(iterated(M_OI), orthogonalised(M_OI), rtol=0, atol=0.01)
        assert bool(((torch.linalg.svdvals(iterated(M_OI).float()) - 1).abs() < 0.5).all())
