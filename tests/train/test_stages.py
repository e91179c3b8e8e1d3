"""Norms and surprise against plain sums, and the stage rules by what they let through."""

from __future__ import annotations

import math

import pytest
import torch

from tests.train.layers import EXPERTS, GROUPS, Model, bits, group_slices, sparse_layer
from tinyonn.train import stages
from tinyonn.train.stages import RunningMean

ALL_ON = torch.ones(EXPERTS, dtype=torch.bool)


def test_expert_norms_are_exact_for_small_groups_beside_large_ones() -> None:
    layer = sparse_layer(9, 17, seed=3, empty=2)
    grad = torch.zeros(layer.values.numel())
    for number, part in enumerate(group_slices(layer)):
        grad[part] = 10.0 ** (
            10 * number - 25
        )  # from 1e-25 to 1e25: squares beyond float32, ratios beyond float64
    found = stages.expert_norms(grad, layer.row_pointer, 9, GROUPS)
    assert found.dtype == torch.float64
    for number, part in enumerate(group_slices(layer)):
        size = part.stop - part.start
        assert float(found[number]) == pytest.approx(size * 10.0 ** (20 * number - 50), rel=1e-6)
    assert float(found[2]) == 0
    with pytest.raises(ValueError, match="7 groups of 9 rows"):
        stages.expert_norms(grad, layer.row_pointer, 9, 7)


def test_surprise_is_the_rms_over_all_layers() -> None:
    model = Model()
    with pytest.raises(ValueError, match="no sparse layers"):
        stages.group_surprise(model.norm)
    assert torch.equal(stages.group_surprise(model), torch.zeros(GROUPS).double())
    model.give_gradients(1)
    layers = [model.up, model.down]
    for group, found in enumerate(stages.group_surprise(model).tolist()):
        parts = [
            layer.values.grad[group_slices(layer)[group]] for layer in layers if layer.values.grad is not None
        ]
        assert found == pytest.approx(float(torch.cat(parts).double().square().mean().sqrt()))
    model.down.values.grad = None  # a layer without gradient counts as one of zeros
    entries = sum(group_slices(layer)[0].stop for layer in layers)
    assert model.up.values.grad is not None
    expected = math.sqrt(float(model.up.values.grad[group_slices(model.up)[0]].square().sum()) / entries)
    assert float(stages.group_surprise(model)[0]) == pytest.approx(expected)


def test_surprise_of_a_group_without_gradient_stays() -> None:
    model, surprise = Model(), stages.Surprise(GROUPS, decay=0.5)
    model.give_gradients(1)
    first = surprise.observe(model)
    torch.testing.assert_close(surprise.mean, first)  # corrected: one value's mean is the value
    allowed = torch.ones(GROUPS, dtype=torch.bool)
    allowed[1] = False
    model.give_gradients(2)
    stages.mask_value_gradients(model, allowed)
    second = surprise.observe(model)
    assert float(second[1]) == 0
    assert float(surprise.mean[1]) == float(first[1])
    torch.testing.assert_close(surprise.mean[0], (0.25 * first[0] + 0.5 * second[0]) / 0.75)


def test_a_running_mean_goes_on_from_its_state() -> None:
    mean = RunningMean(2, decay=0.7)
    assert bool(mean.mean.isnan().all())
    mean.update(torch.tensor([1.0, math.nan]))
    mean.update(torch.tensor([3.0, math.inf]))
    assert math.isnan(float(mean.mean[1]))
    other = RunningMean(2, decay=0.7)
    other.load_state(mean.state())
    for one in (mean, other):
        one.update(torch.tensor([5.0, 2.0]))
    assert bits(mean.mean) == bits(other.mean)
    assert float(mean.mean[1]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="2 values does not fit 3"):
        RunningMean(3).load_state(mean.state())
    with pytest.raises(ValueError, match="decay"):
        RunningMean(1, 1.0)


@pytest.mark.parametrize(
    ("surprise", "active", "act_k", "min_k", "expected"),
    [
        ([5, 1, 4, 2, 3], [1, 1, 1, 1, 1], None, 2, [1, 3]),
        ([5, 1, 4, 2, 3], [1, 0, 1, 0, 0], None, 2, [1, 3]),  # all get gradients, also those that did not run
        ([5, 1, 4, 2, 3], [1, 0, 1, 0, 0], 0, 2, [0, 2]),  # those that ran alone
        ([5, 1, 4, 2, 3], [1, 0, 1, 0, 0], 3, 2, [1, 2]),  # and one more, the least surprised
        ([5, 1, 4, 2, 3], [1, 0, 1, 0, 0], 99, 99, [0, 1, 2, 3, 4]),
        ([2, 2, 1, 2, 2], [1, 1, 1, 1, 1], None, 3, [0, 1, 2]),  # ties by number
        ([0, 7, math.nan, 9, 8], [1, 1, 1, 1, 1], None, 3, [1, 3, 4]),  # without gradient last
        ([5, 1, 4, 2, 3], [0, 0, 0, 0, 0], 0, 2, []),
        ([5, 1, 4, 2, 3], [1, 1, 1, 1, 1], None, 0, []),
    ],
)
def test_stage1_mask(
    surprise: list[float], active: list[int], act_k: int | None, min_k: int, expected: list[int]
) -> None:
    given = torch.tensor(surprise, dtype=torch.float64)
    allowed = stages.stage1_mask(given, torch.tensor(active).bool(), act_k, min_k)
    assert allowed.nonzero().flatten().tolist() == expected


def test_stage1_mask_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="min_k -1"):
        stages.stage1_mask(torch.ones(EXPERTS), ALL_ON, None, -1)


def test_masked_gradients_are_zero_and_no_others_change() -> None:
    model = Model()
    model.give_gradients(4)
    before = {name: bits(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    allowed = torch.tensor([True, False, True, False, False, True])
    kept = {
        (layer, group): bits(layer.values.grad[part])
        for layer in (model.up, model.down)
        for group, part in enumerate(group_slices(layer))
        if layer.values.grad is not None
    }
    stages.mask_value_gradients(model, allowed)
    for (layer, group), old in kept.items():
        assert layer.values.grad is not None
        part = layer.values.grad[group_slices(layer)[group]]
        assert bits(part) == old if bool(allowed[group]) else not bool(part.any())
    for name, parameter in model.named_parameters():
        if not name.endswith("values"):
            assert parameter.grad is not None
            assert bits(parameter.grad) == before[name]
    with pytest.raises(ValueError, match=r"5 groups.*up has 6"):
        stages.mask_value_gradients(model, ALL_ON)


def test_k_grows_with_surprise() -> None:
    surprise = torch.tensor([0.0, 0.5, 1.0, 1.26, 2.0, 50.0, math.inf, math.nan])
    assert stages.dynamic_k(surprise, 1.0, 10, 4, 30).tolist() == [4, 5, 10, 13, 20, 30, 30, 30]
    assert stages.dynamic_k(surprise[:6], 2.0, 10, 4, 30, power=0.5).tolist() == [4, 5, 7, 8, 10, 30]
    assert stages.dynamic_k(surprise[:6], math.nan, 10, 4, 30).tolist() == [10] * 6
    assert stages.dynamic_k(surprise[:6], 0.0, 10, 12, 30).tolist() == [12] * 6
    assert stages.dynamic_k(surprise[:6], 1.0, 10, 4, 30, power=0).tolist() == [10] * 6
    with pytest.raises(ValueError, match="between 5 and 4"):
        stages.dynamic_k(surprise, 1.0, 10, 5, 4)


def test_predictive_integrity() -> None:
    assert stages.predictive_integrity(2.0, 2.0, 1.0) == pytest.approx(math.exp(-1))
    assert stages.predictive_integrity(3.0, 2.0, 4.0, alpha=0.5, gamma=0.25) == pytest.approx(
        math.exp(-0.5 * (0.75 * 1.5 + 0.25 * 4))
    )
    assert stages.predictive_integrity(0.0, 2.0, 0.0) == 1
    assert stages.predictive_integrity(1.0, 0.0, 1.0) == 0
    assert stages.predictive_integrity(math.nan, 1.0, 1.0) == 0
    assert stages.predictive_integrity(1.0, 1.0, math.inf) == 0
    assert stages.predictive_integrity(1.0, 1.0, 1.0) > stages.predictive_integrity(1.0, 1.0, 1.1)


def test_the_learning_rate_follows_integrity_within_bounds() -> None:
    assert stages.integrity_scale(0.4, 0.4) == 1
    assert stages.integrity_scale(0.3, 0.4) == pytest.approx(0.75)
    assert stages.integrity_scale(0.01, 0.4) == 0.5
    assert stages.integrity_scale(0.9, 0.4, 0.5, 1.2) == 1.2
    assert stages.integrity_scale(0.4, math.nan) == 1
    assert stages.integrity_scale(math.nan, 0.4) == 0.5
    with pytest.raises(ValueError, match=r"1\.1 and 1\.5"):
        stages.integrity_scale(1, 1, 1.1, 1.5)
