"""Published methods beside straightforward implementations of their papers' pseudo-code, loop by loop in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dense.architectures import ARCHITECTURES, make_model
from tinyonn.config import ModelConfig
from tinyonn.corpus.file import Sample
from tinyonn.errors import InputError
from tinyonn.evaluate import gradients
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.gradients import float_gradients, windows
from tinyonn.evaluate.layerwise import Passes, prune, prune_model, second_moments, updated_wanda, wanda

Array = np.ndarray[Any, np.dtype[np.float64]]


def layer(outputs: int = 10, inputs: int = 32, tokens: int = 90, seed: int = 0) -> tuple[Array, Array]:
    """A matrix, and inputs of unlike sizes that depend on one another."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(inputs, inputs)) * rng.lognormal(size=inputs)
    return rng.normal(size=(outputs, inputs)), rng.normal(size=(tokens, inputs)) @ mix


def wanda_of_the_paper(W: Array, X: Array, sparsity: float) -> Array:
    """Sun et al. 2023, Algorithm 1: ``metric = |W| · ‖X_j‖₂``; in each row the smallest are set to zero."""
    W = W.copy()
    for i in range(W.shape[0]):
        metric = [abs(W[i, j]) * sum(x * x for x in X[:, j]) ** 0.5 for j in range(W.shape[1])]
        smallest = sorted(range(W.shape[1]), key=lambda j: metric[j])
        for j in smallest[: round(W.shape[1] * sparsity)]:
            W[i, j] = 0.0
    return W


def sparsegpt_of_the_paper(W: Array, X: Array, sparsity: float, block: int, damping: float) -> Array:
    """Frantar & Alistarh 2023, Algorithm 1, with blocksize B = B_s and H = X Xᵀ + λ I."""
    W, (rows, columns) = W.copy(), W.shape
    H = np.zeros((columns, columns))
    for x in X:
        H += np.outer(x, x)
    H += damping * np.mean(np.diag(H)) * np.eye(columns)
    inverse = np.linalg.cholesky(np.linalg.inv(H)).T  # upper: Hinv = Uᵀ U
    M = np.ones_like(W)
    for i in range(0, columns, block):
        E = np.zeros((rows, block))
        for j in range(i, i + block):
            if (j - i) % block == 0:
                worth = {
                    (r, c): W[r, c] ** 2 / inverse[c, c] ** 2
                    for r in range(rows)
                    for c in range(i, i + block)
                }
                for r, c in sorted(worth, key=lambda at: worth[at])[: round(sparsity * rows * block)]:
                    M[r, c] = 0.0
            for r in range(rows):
                E[r, j - i] = (1 - M[r, j]) * W[r, j] / inverse[j, j]
                for c in range(j, i + block):
                    W[r, c] -= E[r, j - i] * inverse[j, c]
        for r in range(rows):
            for c in range(i + block, columns):
                W[r, c] -= sum(E[r, j - i] * inverse[j, c] for j in range(i, i + block))
    return W * M


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_wanda_is_the_papers(share: float) -> None:
    W, X = layer()
    expected = wanda_of_the_paper(W, X, 1 - share)
    weight, inputs = torch.from_numpy(W).float(), torch.from_numpy(X).float()
    found = wanda(weight, inputs.square().sum(0), round(share * W.size))
    assert torch.equal(found != 0, torch.from_numpy(expected != 0))
    assert torch.equal(found[found != 0], weight[found != 0])
    assert torch.equal(wanda(weight, inputs.T @ inputs, round(share * W.size)) != 0, found != 0)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("block", [32, 16, 4])
def test_sparsegpt_is_the_papers(share: float, block: int) -> None:
    W, X = layer()
    expected = sparsegpt_of_the_paper(W, X, 1 - share, block, 0.01)
    weight, inputs = torch.from_numpy(W).float(), torch.from_numpy(X).float()
    found = prune(weight, inputs.T @ inputs, round(share * W.size), block=block, damping=0.01)
    assert torch.equal(found != 0, torch.from_numpy(expected != 0))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_rows_keep_as_many_as_one_another_and_together_exactly_so_many() -> None:
    weight = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    for keep in (0, 1, 6, 7, 30, 76, 77):
        found = (wanda(weight, torch.ones(11), keep) != 0).sum(1)
        assert int(found.sum()) == keep and int(found.max() - found.min()) <= 1
    W, X = layer()
    H = torch.from_numpy(X.T @ X).float()
    updated = updated_wanda(torch.from_numpy(W).float(), H, 160)
    assert int((updated != 0).sum()) == 160 and not torch.equal(
        updated, wanda(torch.from_numpy(W).float(), H, 160)
    )


def model_of(name: str, folder: Path) -> tuple[DenseWeights, list[Sample]]:
    path = str(make_model(name, folder))
    dense = DenseWeights(ModelConfig(path=path, quantization="none", dtype="float32", device="cpu"))
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, length).astype(np.int32) for length in (12, 30, 7)]
    return dense, [Sample(number, "a", row, row) for number, row in enumerate(rows)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_that_are_done_are_not_run_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, samples = model_of(name, tmp_path)
    keep = {p.name: p.size // 2 for p in dense.parameters}
    found = {}
    for how in (prune, wanda):
        with dense.replaced({}):
            found[how] = {n: W.clone() for n, W in prune_model(dense, samples, keep, how)}
    monkeypatch.setattr(Passes, "go_on", lambda *_: None)  # every pass through all layers
    for how, pruned in found.items():
        with dense.replaced({}):
            for tensor, weight in prune_model(dense, samples, keep, how):
                assert torch.equal(weight, pruned[tensor]), tensor
    assert not any("forward" in vars(module) for module in dense.model.modules())


def test_an_inputs_own_moment_alone(tmp_path: Path) -> None:
    dense, samples = model_of("qwen2", tmp_path)
    names = [p.name for p in dense.parameters[:4]]
    whole, alone = (second_moments(dense, samples, names, diagonal) for diagonal in (False, True))
    for name in names:
        torch.testing.assert_close(whole[name].diagonal(), alone[name])


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_float_gradients_are_autograds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, samples = model_of(name, tmp_path)
    names = [p.name for p in dense.parameters]
    sizes = float_gradients(dense, samples, names, tmp_path / "whole")
    largest = max(p.size for p in dense.parameters)
    monkeypatch.setattr(gradients, "WINDOW_BYTES", 8 * largest)
    assert [name for window in windows(dense, names) for name in window] == names
    assert len(list(windows(dense, names))) > 1
    parts = float_gradients(dense, samples, names, tmp_path / "parts")
    expected = {name: torch.zeros_like(dense.original(name)) for name in names}
    dense.model.requires_grad_(True)
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
        dense.model.zero_grad()
        dense.model(input_ids=ids, labels=ids).loss.backward()
        for tensor in names:
            gradient = dense.model.get_parameter(tensor).grad
            assert gradient is not None
            expected[tensor] += gradient.abs() / len(samples)
    for tensor in names:
        scale = float(expected[tensor].max())
        np.testing.assert_allclose(sizes(tensor), expected[tensor].numpy(), rtol=1e-3, atol=1e-5 * scale)
        np.testing.assert_array_equal(parts(tensor), sizes(tensor))


def test_gradients_that_are_not_finite(tmp_path: Path) -> None:
    dense, samples = model_of("qwen2", tmp_path)
    name = dense.parameters[0].name
    with torch.no_grad():
        dense.module(name).get_parameter("weight")[0, 0] = float("inf")
    with pytest.raises(
        InputError, match=r"gradients that are not finite in 3 calibration samples; leave out"
    ):
        float_gradients(dense, samples, [name], tmp_path / "gradients")
