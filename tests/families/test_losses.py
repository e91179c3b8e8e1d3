"""Whatever stands around a head: recorder, evaluation and training have the model's own loss and its gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dense.architectures import VOCAB, make_model
from tests.model.assembled import assembled
from tests.train.defaults import loss_weights
from tinyonn.config import ModelConfig
from tinyonn.corpus.file import Sample
from tinyonn.dense import passes as recording
from tinyonn.dense.load import load_model
from tinyonn.dense.passes import checked_head, forward_backward
from tinyonn.evaluate.loss import batches_of, evaluate_routed, losses
from tinyonn.train.data import collate
from tinyonn.train.student import Student
from tinyonn.train.teacher import Live

NAMES = ["gemma2", "granite", "cohere", "minicpm3"]


def sample_of(size: int = 40) -> Sample:
    ids = np.random.default_rng(0).integers(0, VOCAB - 8, size).astype(np.int32)
    labels = ids.copy()
    labels[: size // 3] = -100
    return Sample(0, "x", ids, labels)


def own_loss(model: Any, sample: Sample) -> torch.Tensor:
    ids, labels = (
        torch.from_numpy(part.astype(np.int64))[None] for part in (sample.input_ids, sample.labels)
    )
    return model(input_ids=ids, labels=labels, use_cache=False).loss  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_the_recorders_loss_and_gradients_are_autograds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "CHUNK_BYTES", 1)  # sixteen tokens at a time
    config = ModelConfig(
        path=str(make_model(name, tmp_path)), quantization="none", dtype="float32", device="cpu"
    )
    model: Any = load_model(config).model
    sample = sample_of()
    head = checked_head(model)
    found: list[torch.Tensor] = []
    layer = model.base_model.layers[-1].mlp
    layer.register_full_backward_hook(lambda module, given, gradients: found.append(gradients[0]))
    own = own_loss(model, sample)
    own.backward()
    loss, _ = forward_backward(model.base_model, head, sample)
    assert loss.item() == pytest.approx(own.item(), rel=1e-6)
    assert len(found) == 2 and found[0].abs().max() > 1e-4
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_and_training_have_the_models_own_loss(name: str, tmp_path: Path) -> None:
    dense, sparse = assembled(make_model(name, tmp_path))
    sample = sample_of()
    own = own_loss(dense, sample).item()
    assert losses(dense, batches_of([sample])).mean == pytest.approx(own, rel=1e-5)
    batch = collate([sample])
    with torch.no_grad():
        measured = Student(sparse, loss_weights(kl=1.0, ce=1.0, hidden=1.0), prompt_loss=True)(
            batch, Live(dense)(batch)
        )
    parts = {part: float(total.total) / total.count for part, total in measured.parts.items()}
    assert parts["ce"] == pytest.approx(own, rel=1e-5)
    assert parts["kl"] == pytest.approx(0, abs=1e-6)
    assert parts["hidden"] == pytest.approx(0, abs=1e-6)
    assert evaluate_routed(dense, [batch]).by_slice == evaluate_routed(sparse, [batch]).by_slice
