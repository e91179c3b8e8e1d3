from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dense.architectures import make_model
from tinyonn.config import ModelConfig
from tinyonn.corpus.file import Sample
from tinyonn.dense.load import load_model
from tinyonn.errors import InputError
from tinyonn.evaluate.loss import Losses, batches_of, losses, token_losses


def make_samples(seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for index, length in enumerate((5, 9, 9, 30, 17, 2, 12)):
        ids = rng.integers(0, 256, length).astype(np.int32)
        labels = np.where(rng.random(length) < 0.3, -100, ids).astype(np.int32)
        labels[-1] = ids[-1]
        found.append(Sample(index, "ab"[index % 2], ids, labels))
    return found


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_losses_are_those_of_each_sample_alone(name: str, tmp_path: Path) -> None:
    path = make_model(name, tmp_path)
    config = ModelConfig(path=str(path), quantization="none", dtype="float32", device="cpu")
    model = load_model(config).model
    samples = make_samples()
    sums: dict[str, list[float]] = {"a": [], "b": []}
    counts = {"a": 0, "b": 0}
    for sample in samples:
        ids, labels = (torch.from_numpy(x.astype(np.int64))[None] for x in (sample.input_ids, sample.labels))
        count = int((sample.labels[1:] != -100).sum())
        sums[sample.slice].append(model(input_ids=ids, labels=labels).loss.item() * count)
        counts[sample.slice] += count
    found = losses(model, batches_of(samples, tokens=40))
    assert found.tokens == counts
    for slice, total in sums.items():
        assert found.by_slice[slice] == pytest.approx(math.fsum(total) / counts[slice], rel=1e-5)
    assert found.mean == pytest.approx((found.by_slice["a"] + found.by_slice["b"]) / 2)
    assert found.perplexity == pytest.approx(math.exp(found.mean))


def test_batches_do_not_depend_on_the_order_and_hold_the_limit() -> None:
    samples = make_samples()
    batches = batches_of(samples, tokens=40)
    again = batches_of(samples[::-1], tokens=40)
    assert len(batches) == len(again)
    for batch, other in zip(batches, again, strict=True):
        assert torch.equal(batch.ids_BT, other.ids_BT) and batch.slices == other.slices
        assert batch.ids_BT.numel() <= 40
    assert sum(len(batch.slices) for batch in batches) == len(samples)


def test_a_sample_without_a_token_to_predict_does_not_count() -> None:
    first_only = Sample(0, "a", np.arange(4, dtype=np.int32), np.array([0, -100, -100, -100], np.int32))
    with pytest.raises(InputError, match="none of the 1 samples has a labelled token"):
        batches_of([first_only])
    assert len(batches_of([first_only, *make_samples()], tokens=10_000)[0].slices) == len(make_samples())


def test_chunks_of_logits_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 32, bias=False)
    hidden = torch.randn(3, 40, 8, generator=generator)
    labels = torch.randint(0, 32, (3, 40), generator=generator)
    labels[:, ::3] = -100
    with torch.no_grad():
        whole = token_losses(head, hidden, labels)
        monkeypatch.setattr("tinyonn.evaluate.loss.HEAD_BYTES", 1)
        assert torch.allclose(token_losses(head, hidden, labels), whole, rtol=1e-6)
    assert whole.numel() == int((labels != -100).sum())


def test_perplexity_beyond_a_float_is_infinite() -> None:
    assert Losses({"a": 800.0}, {"a": 1}).perplexity == math.inf
