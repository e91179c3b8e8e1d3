from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dense.architectures import make_model
from tinyonn.config import ModelConfig
from tinyonn.dense.load import load_model
from tinyonn.evaluate.dense import DenseWeights

IDS = torch.arange(24)[None]


@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_cut_leaves_nothing_behind(path: Path, quantization: str) -> None:
    config = ModelConfig.model_validate(
        {"path": str(path), "quantization": quantization, "dtype": "float32", "device": "cpu"}
    )
    dense = DenseWeights(config)
    quantized = load_model(config).model
    with torch.inference_mode():
        logits = dense.model(IDS).logits
        assert torch.allclose(logits, quantized(input_ids=IDS).logits, atol=1e-4)
    shapes = {name: parameter.shape for name, parameter in dense.model.named_parameters()}
    assert dense.parameters and all(tuple(shapes[p.name]) == p.shape for p in dense.parameters)
    generator = torch.Generator().manual_seed(0)
    masks = {p.name: torch.rand(p.shape, generator=generator) < 0.5 for p in dense.parameters}
    before = {p.name: dense.original(p.name).clone() for p in dense.parameters}
    with dense.masked(masks.items()) as model:
        for name, mask in masks.items():
            assert torch.equal(model.get_parameter(name), before[name] * mask)
        with torch.inference_mode():
            assert not torch.allclose(model(IDS).logits, logits, atol=1e-2)
    with pytest.raises(RuntimeError), dense.masked([(dense.parameters[0].name, torch.zeros(3))]):
        pass
    with torch.inference_mode():
        assert torch.equal(dense.model(IDS).logits, logits)


def test_rows_are_what_a_source_reads(path: Path) -> None:
    config = ModelConfig(path=str(path), quantization="none", device="cpu")
    dense = DenseWeights(config)
    for parameter in dense.parameters:
        rows = dense.rows(parameter.name, 3, 9)
        assert rows.dtype == np.float32
        assert np.array_equal(rows, dense.original(parameter.name)[3:9].float().numpy())
    across = {p.name for p in dense.parameters} if path.name == "gpt2" else set()
    assert dense.transposed == across
