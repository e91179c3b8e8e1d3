"""Gradients held to a limit; those that are no numbers, and steps that stand out, told apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.train.layers import Model, bits
from tinyonn.train import optimizers


def test_clipping_scales_to_the_limit_together() -> None:
    model = Model()
    model.give_gradients(0)
    parameters = list(model.parameters())
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    assert optimizers.clip_gradients(parameters, None).norm == pytest.approx(float(flat.double().norm()))
    before = [bits(parameter.grad) for parameter in parameters if parameter.grad is not None]
    loose = optimizers.clip_gradients(parameters, 1e9)
    assert loose.scale == 1
    assert [bits(parameter.grad) for parameter in parameters if parameter.grad is not None] == before
    clipped = optimizers.clip_gradients(parameters, 2.0)
    assert clipped.norm == loose.norm
    assert clipped.scale == pytest.approx(2 / loose.norm)
    assert optimizers.clip_gradients(parameters, 2.0).norm == pytest.approx(2.0, rel=1e-6)
    now = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    torch.testing.assert_close(now, flat * clipped.scale)
    assert optimizers.clip_gradients([nn.Parameter(torch.ones(2))], 1.0).norm == 0


def test_gradients_that_are_not_finite_are_named_and_left() -> None:
    model = Model()
    model.give_gradients(0)
    assert optimizers.first_non_finite(model.named_parameters()) is None
    assert model.down.values.grad is not None
    model.down.values.grad[3] = math.nan
    found = optimizers.clip_gradients(model.parameters(), 1.0)
    assert not found.finite
    assert found.scale == 1
    assert optimizers.first_non_finite(model.named_parameters()) == "down.values"
    model.down.values.grad[:] = 3e30  # squares beyond float32
    assert optimizers.clip_gradients(model.parameters(), 1.0).finite


def test_spikes_stand_out_from_the_median() -> None:
    watch = optimizers.SpikeWatch(factor=5.0, window=8)
    assert [watch.observe(value) for value in (100.0, 1.0, 1.0, 2.0, 1.0)] == [False] * 5
    assert watch.observe(5.1)
    assert not watch.observe(5.0)
    assert watch.observe(math.nan)
    other = optimizers.SpikeWatch(factor=5.0, window=8)
    other.load_state(watch.state())
    assert [other.observe(value) for value in (7.0, 20.0)] == [watch.observe(value) for value in (7.0, 20.0)]
