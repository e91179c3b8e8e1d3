from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dense.architectures import make_model
from tinyonn.config import ModelConfig
from tinyonn.corpus.file import Sample
from tinyonn.errors import InputError
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.layerwise import prune, prune_model, second_moments


def problem(outputs: int = 12, inputs: int = 20, tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and inputs that depend on one another."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator)
    X_TI = torch.randn(tokens, inputs, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), X_TI


def step_by_step(W_OI: torch.Tensor, H_II: torch.Tensor, mask_OI: torch.Tensor, damping: float) -> np.ndarray:
    """Optimal Brain Surgeon, column after column, with the inverse of what is left of H computed anew each time."""
    W, H = W_OI.double().numpy().copy(), H_II.double().numpy()
    H = H + damping * np.diag(H).mean() * np.eye(len(H))
    for j in range(W.shape[1]):
        inverse = np.linalg.inv(H[j:, j:])
        error = np.where(mask_OI[:, j].numpy(), 0.0, W[:, j]) / inverse[0, 0]
        W[:, j:] -= np.outer(error, inverse[0])
    return np.asarray(W * mask_OI.numpy())


@pytest.mark.parametrize("block", [1, 7, 128])
def test_the_update_is_the_brain_surgeons(block: int) -> None:
    W_OI, X_TI = problem()
    H_II = X_TI.T @ X_TI
    mask = torch.rand(W_OI.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    found = prune(W_OI, H_II, mask, block=block, damping=0.01)
    expected = step_by_step(W_OI, H_II, mask, 0.01)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("keep", [0, 1, 61, 120, 240])
def test_exactly_so_many_are_kept(keep: int) -> None:
    W_OI, X_TI = problem()
    found = prune(W_OI, X_TI.T @ X_TI, keep, block=8)
    assert int((found != 0).sum()) == keep
    if keep == W_OI.numel():
        assert torch.equal(found, W_OI)


def test_outputs_are_nearer_than_those_of_a_mask_alone() -> None:
    W_OI, _ = problem(64, 48)
    generator = torch.Generator().manual_seed(1)
    few, noise = torch.randn(400, 12, generator=generator), torch.randn(400, 48, generator=generator)
    X_TI = few @ torch.randn(12, 48, generator=generator) + 0.5 * noise
    H_II = X_TI.T @ X_TI
    keep = W_OI.numel() // 2
    score = (W_OI.abs() * H_II.diagonal().sqrt()).reshape(-1)
    mask = torch.zeros(W_OI.numel(), dtype=torch.bool)
    mask[score.topk(keep).indices] = True
    mask = mask.view(W_OI.shape)

    def distance(V_OI: torch.Tensor) -> float:
        return float(((W_OI - V_OI) @ X_TI.T).pow(2).mean())

    assert distance(prune(W_OI, H_II, mask)) < 0.7 * distance(W_OI * mask)
    assert distance(prune(W_OI, H_II, keep)) < 0.7 * distance(W_OI * mask)


def test_independent_inputs_leave_values_as_they_are() -> None:
    W_OI, _ = problem()
    found = prune(W_OI, torch.eye(20) * 3.0, 100, block=20)
    kept = found != 0
    assert torch.allclose(found[kept], W_OI[kept], rtol=1e-5)
    assert W_OI[kept].abs().min() >= W_OI[~kept].abs().max()


def test_an_input_that_is_always_zero_and_one_that_is_not_finite() -> None:
    W_OI, X_TI = problem()
    X_TI[:, 5] = 0
    assert torch.isfinite(prune(W_OI, X_TI.T @ X_TI, 100)).all()
    X_TI[3, 4] = float("nan")
    with pytest.raises(InputError, match="no Cholesky factor"):
        prune(W_OI, X_TI.T @ X_TI, 100)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_model_layer_by_layer(name: str, tmp_path: Path) -> None:
    config = ModelConfig(
        path=str(make_model(name, tmp_path)), quantization="none", dtype="float32", device="cpu"
    )
    dense = DenseWeights(config)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 256, 40).astype(np.int32) for _ in range(6)]
    samples = [Sample(i, "a", row, row) for i, row in enumerate(ids)]
    keep = {p.name: p.size // 3 for p in dense.parameters}
    before = {p.name: dense.original(p.name).clone() for p in dense.parameters}
    seen = []
    with dense.replaced({}) as model:
        for tensor, weight in prune_model(dense, samples, keep):
            seen.append(tensor)
            assert int((weight != 0).sum()) == keep[tensor]
            assert torch.equal(model.get_parameter(tensor), weight)
    assert sorted(seen) == sorted(keep)
    assert all(torch.equal(dense.model.get_parameter(n), W) for n, W in before.items())
    first = dense.parameters[0].name
    alone = second_moments(dense, samples, [first])[first]
    inputs = before[first].shape[0 if name == "gpt2" else 1]
    assert alone.shape == (inputs, inputs)
    with pytest.raises(InputError, match="meets no input in 0 calibration samples"):
        second_moments(dense, [], [first])
