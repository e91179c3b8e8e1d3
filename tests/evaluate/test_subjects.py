"""What quantization makes of a model, against rules written down anew; which subjects there are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dense.architectures import make_model
from tests.train.trained import make_models
from tinyonn.config import ModelConfig
from tinyonn.dense.load import load_model
from tinyonn.errors import InputError
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.evaluate.subjects import find_subjects, gobo, int8_rows, load_subject, outliers, round_linear

IDS = torch.arange(24)[None]


def normal(rows: int = 40, columns: int = 48) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[3, 5], weight[7, 9] = 0.9, -0.7
    return weight


def test_int8_by_row() -> None:
    weight = normal()
    found = int8_rows(weight)
    for row, rounded in zip(weight.numpy(), found.numpy(), strict=True):
        scale = np.abs(row).max() / 127
        levels = rounded / scale
        assert np.allclose(levels, np.round(levels), atol=1e-4)
        assert np.abs(levels).max() <= 127.001
        assert np.abs(row - rounded).max() <= scale / 2 * 1.001
    assert torch.equal(int8_rows(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("bits", [3, 4])
def test_gobo_keeps_outliers_and_has_few_other_values(bits: int) -> None:
    weight = normal()
    found = gobo(weight, bits)
    values = weight.numpy().ravel().astype(np.float64)
    deviations = (values - values.mean()) / values.std()
    density = np.exp(-(deviations**2) / 2) / (values.std() * np.sqrt(2 * np.pi))
    exact = np.log(density) < -4
    assert np.array_equal(outliers(weight.numpy().ravel()), exact)
    assert 2 <= exact.sum() < 20
    rounded = found.numpy().ravel()
    assert np.array_equal(rounded[exact], weight.numpy().ravel()[exact])
    centroids = np.unique(rounded[~exact])
    assert len(centroids) <= 2**bits
    distance = np.abs(values[~exact, None] - centroids)
    nearest = centroids[distance.argmin(1)]
    assert (
        np.abs(nearest - rounded[~exact]) > 1e-7
    ).mean() < 0.01  # ties and bounds between the last two rounds
    bins = np.array_split(np.sort(values[~exact]), 2**bits)
    begun = sum(np.abs(part - part.mean()).sum() for part in bins)
    assert np.abs(values - rounded)[~exact].sum() <= begun


def test_gobo_of_what_has_no_spread() -> None:
    assert torch.equal(gobo(torch.full((4, 4), 0.25), 3), torch.full((4, 4), 0.25))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_rows_are_outputs_whatever_the_layer(name: str, tmp_path: Path) -> None:
    config = ModelConfig(
        path=str(make_model(name, tmp_path)), quantization="none", dtype="float32", device="cpu"
    )
    model, before = load_model(config).model, load_model(config).model
    round_linear(model, int8_rows)
    changed = 0
    for (parameter, now), (_, then) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        if torch.equal(now, then):
            continue
        changed += 1
        owner = model.get_submodule(parameter.rpartition(".")[0])
        upright = then if isinstance(owner, torch.nn.Linear) else then.T
        assert torch.equal(now if upright is then else now.T, int8_rows(upright.contiguous()))
    assert changed == len(DenseWeights(config).parameters)


def test_every_dense_subject_loads_and_differs_as_it_should(tmp_path: Path) -> None:
    config = ModelConfig(path=str(make_model("qwen2", tmp_path)), dtype="float32", device="cpu")
    names = ["int8", "gobo4", "gobo3", "llmint8"]
    subjects = find_subjects(names, config, tmp_path / "run", None, {"model.safetensors": "x"})
    assert [subject.name for subject in subjects] == ["original", "nf4", *names]
    logits = {}
    with torch.inference_mode():
        for subject in subjects:
            logits[subject.name] = load_subject(subject, config, tmp_path / "run", None)(IDS).logits.float()
        assert torch.equal(logits["nf4"], DenseWeights(config).model(IDS).logits)
    away = {name: float((found - logits["original"]).square().mean()) for name, found in logits.items()}
    assert 0 == away["original"] < away["int8"] < away["gobo4"] < away["gobo3"]
    assert 0 < away["llmint8"] < away["nf4"]


def test_subjects_that_are_not_there(tmp_path: Path) -> None:
    config = ModelConfig(path=str(make_model("qwen2", tmp_path / "dense")), device="cpu")

    def find(*names: str, gguf: Path | None = None) -> list[str]:
        return [subject.name for subject in find_subjects(names or None, config, tmp_path, gguf, {})]

    assert find() == ["original", "nf4", "int8"]
    for name, remedy in {
        "int5": "int8",
        "int8@3": "trained@5",
        "assembled": "assemble",
        "trained": "train",
    }.items():
        with pytest.raises(InputError, match=remedy):
            find(name)
    with pytest.raises(InputError, match="--gguf"):
        find("gguf", gguf=tmp_path / "none.gguf")


def test_numbers_of_experts(tmp_path: Path) -> None:
    _, student = make_models(tmp_path / "dense")
    student.save_pretrained(tmp_path / "model")
    config = ModelConfig(path=str(tmp_path / "dense"), device="cpu")
    found = find_subjects(["trained", "trained@2"], config, tmp_path, None, {})
    assert [(one.name, one.experts) for one in found[2:]] == [
        *[("trained@6", None), ("trained@3", 3), ("trained@1", 1), ("trained@2", 2)]
    ]
    with pytest.raises(InputError, match="from 1 to 6"):
        find_subjects(["trained@7"], config, tmp_path, None, {})
    assert json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))["router"]
