"""A sample's profile against a float64 copy of the model and autograd, on every architecture."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.dense.architectures import ARCHITECTURES
from tests.profile.oracle import ArrayGroups, added, random_group, totals_of
from tests.record.oracle import float64_copy, statistics
from tests.record.runs import LATE, POISON, load_token, make_sick_model, reasons
from tests.record.test_oracle import samples_of
from tinyonn.config import ModelConfig
from tinyonn.corpus.file import Sample
from tinyonn.corpus.tokens import prompt_length
from tinyonn.dense.load import DenseModel, load_model
from tinyonn.dense.parameters import Parameter, list_parameters
from tinyonn.errors import InputError
from tinyonn.profile.groups import Identity
from tinyonn.profile.measure import Measured, Measurer
from tinyonn.record.recorder import BadSampleError, Recorder
from tinyonn.record.worker import calibrate
from tinyonn.store.records import TensorCalibration

GROUPS = 6


def settings(folder: Path, quantization: str = "none", **options: object) -> ModelConfig:
    return ModelConfig(path=str(folder), quantization=quantization, dtype="float32", device="cpu", **options)


def grouped(dense: DenseModel) -> ArrayGroups:
    """Random groups of all linear tensors, the head's too where it is not tied."""
    tensors = tuple(p for p in list_parameters(dense.model) if p.kind == "linear")
    arrays = {p.name: random_group(p.shape, GROUPS, number) for number, p in enumerate(tensors)}
    return ArrayGroups(arrays, tensors, Identity("assembly", "test", GROUPS))


def calibrated(config: ModelConfig, samples: list[Sample]) -> dict[str, TensorCalibration]:
    recorder = Recorder(load_model(config))
    return calibrate(recorder, samples, [list(recorder.sites)])


def assert_same(one: Measured, other: Measured) -> None:
    assert one.loss == other.loss
    for mine, its in zip(one.totals, other.totals, strict=True):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_sample_against_autograd_in_float64(
    name: str, quantization: str, model_of: Callable[[str], Path]
) -> None:
    config = settings(model_of(name), quantization)
    samples = samples_of(3)
    calibration = calibrated(config, samples)
    dense = load_model(config)
    twin, groups = float64_copy(dense.model), grouped(dense)
    measurer = Measurer(dense, groups, calibration)
    for sample in samples:
        found = measurer.run(sample)
        exact = statistics(twin, sample)
        weights = dict(twin.named_parameters())
        parts = []
        for parameter in groups.tensors:
            W, frozen = weights[parameter.name], calibration[parameter.name]
            assert W.grad is not None
            known = W.detach().numpy(), W.grad.numpy(), exact[parameter.name][0]
            bases = frozen.act_base, frozen.grad_base
            parts.append(totals_of(*known, groups.read(parameter.name), GROUPS, bases))
        wanted = added(parts)
        # Rounding may move a value across the edge of a level, seldom and by one.
        for levels, right in ((found.totals.act, wanted.act), (found.totals.grad, wanted.grad)):
            assert np.abs(levels - right).max() <= 2 + 1e-4 * right.max()
        np.testing.assert_allclose(found.totals.contribution, wanted.contribution, rtol=1e-4)
        error = 1e-4 * wanted.contribution.max()
        np.testing.assert_allclose(found.totals.pull, wanted.pull, rtol=0, atol=error)


def test_another_order_of_samples_and_checkpointing_change_no_bit(
    model_of: Callable[[str], Path],
) -> None:
    folder, samples = model_of("qwen2"), samples_of(2)
    calibration = calibrated(settings(folder), samples)
    found = []
    for checkpointing in (False, True):
        dense = load_model(settings(folder, checkpointing=checkpointing))
        measurer = Measurer(dense, grouped(dense), calibration)
        found += [{s.index: measurer.run(s) for s in order} for order in (samples, samples[::-1])]
    for other in found[1:]:
        for index, measured in found[0].items():
            assert_same(measured, other[index])


def test_a_sample_that_is_not_finite_is_refused_with_the_recorders_reason_and_leaves_no_trace(
    tmp_path: Path,
) -> None:
    config = settings(make_sick_model(tmp_path / "model"))
    dense = load_model(config)
    chance = random.Random(0)
    words = "".join(chance.choices(string.ascii_lowercase, k=20))
    ids = {
        sign: [load_token(tmp_path / "model", letter) for letter in words + sign + "."]
        for sign in ("", LATE, POISON)
    }
    samples = {sign: Sample(0, "x", *(np.array(tokens, np.int32),) * 2) for sign, tokens in ids.items()}
    measurer = Measurer(dense, grouped(dense), calibrated(config, [samples[""]]))
    before = measurer.run(samples[""])
    for sign, reason in reasons().items():
        with pytest.raises(BadSampleError, match=reason):
            measurer.run(samples[sign])
        assert_same(measurer.run(samples[""]), before)


def test_groups_of_a_tensor_that_the_model_lacks_are_refused(model_of: Callable[[str], Path]) -> None:
    dense = load_model(settings(model_of("qwen2")))
    stranger = Parameter("model.layers.9.mlp.up_proj.weight", (4, 4), 9, "linear")
    arrays = {stranger.name: np.zeros((4, 4), np.uint8)}
    with pytest.raises(InputError, match=r"layers\.9"):
        Measurer(dense, ArrayGroups(arrays, (stranger,), Identity("labels", "x", 1)), {})


@pytest.mark.parametrize(
    ("labels", "limit", "length"),
    [
        ([-100, -100, 5, 6, -100, 7], 64, 2),  # a chat: what comes before the first answer
        ([-100, -100, 5, 6], 1, 2),  # however long
        ([4, 5, 6, 7, 8], 64, 2),  # a text: half
        ([4, 5, 6, 7, 8], 1, 1),
        ([4, 5], 64, 1),
        ([-100, -100], 64, 2),
    ],
)
def test_a_prompt_ends_where_the_labels_begin(labels: list[int], limit: int, length: int) -> None:
    assert prompt_length(np.array(labels, np.int32), limit) == length
