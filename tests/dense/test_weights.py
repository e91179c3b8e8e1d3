from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from tests.dense.architectures import ARCHITECTURES, make_model
from tinyonn.config import ModelConfig
from tinyonn.dense.load import load_model
from tinyonn.dense.parameters import list_uses
from tinyonn.dense.weights import BaseWeights
from tinyonn.errors import InputError


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_tensors_are_those_of_the_loaded_model(name: str, quantization: str, tmp_path: Path) -> None:
    config = ModelConfig(path=str(make_model(name, tmp_path)), quantization=quantization)
    model, weights = load_model(config).model, BaseWeights(config)
    compared = 0
    for use in list_uses(model):
        loaded = use.module.get_parameter("bias" if use.operation == "bias" else "weight")
        if not weights.has(use.parameter_name):
            assert name in ("qwen2_tied", "gemma", "gpt2")
            continue
        compared += 1
        if (state := getattr(loaded, "quant_state", None)) is not None:
            assert torch.equal(weights.matrix(use.parameter_name), dequantize_4bit(loaded.data, state))
        elif use.operation == "conv1d":
            assert torch.equal(weights.matrix(use.parameter_name), loaded.T)
        else:
            assert torch.equal(weights.tensor(use.parameter_name), loaded)
    assert compared > 10


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_rows_are_rows_of_the_matrix(name: str, quantization: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 40, "intermediate_size": 72} if name == "qwen2" else {"n_embd": 40}
    config = ModelConfig(path=str(make_model(name, tmp_path, **shape)), quantization=quantization)
    weights = BaseWeights(config)
    tensor = "model.layers.1.mlp.up_proj.weight" if name == "qwen2" else "transformer.h.1.mlp.c_fc.weight"
    matrix = weights.matrix(tensor)
    for first, last in ((0, 1), (3, 17), (8, 40), (39, matrix.shape[0])):
        assert torch.equal(weights.rows(tensor, first, last), matrix[first:last])


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    weights = BaseWeights(ModelConfig(path=str(make_model("qwen2", tmp_path))))
    with pytest.raises(InputError, match=r"no tensor model\.layers\.9\.x\.weight"):
        weights.tensor("model.layers.9.x.weight")
