"""What a step leaves untouched, that it is AdamW or Muon elsewhere, and a state that comes back to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from tests.train.defaults import optimizer_options
from tests.train.layers import GROUPS, Model, bits, group_slices, sparse_layer
from tinyonn.errors import InputError
from tinyonn.model.linear_tinyonn import ExpertLinear
from tinyonn.train import optimizers as built
from tinyonn.train.optimizers import build_optimizers
from tinyonn.train.options import OptimizerOptions
from tinyonn.train.stages import mask_value_gradients

RULES = ["adamw", "muon"]


def options(experts: str = "adamw", **changes: object) -> OptimizerOptions:
    given: dict[str, object] = {
        "router_lr": 2e-3,
        "experts": experts,
        "experts_lr": 1e-4,
        "experts_decay": 0.1,
        "trunk_lr": 1e-3,
        "trunk_decay": 0.1,
        "norms_lr": 2e-3,
    }
    return optimizer_options(**{**given, **changes})


def step(model: Model, optimizers: list[Optimizer], seed: int, allowed: torch.Tensor | None = None) -> None:
    model.give_gradients(seed)
    if allowed is not None:
        mask_value_gradients(model, allowed)
    for optimizer in optimizers:
        optimizer.step()


def of_group(model: Model, optimizers: list[Optimizer], group: int) -> list[bytes]:
    """Bytes of all that is known of a group: values, moments, count of steps."""
    found = []
    for layer in (model.up, model.down):
        part = group_slices(layer)[group]
        found.append(bits(layer.values[part]))
        for field, value in optimizers[-1].state[layer.values].items():
            found.append(bits(value[group] if field == "step" else value[part]))
    return found


@pytest.mark.parametrize("rule", RULES)
def test_a_masked_group_stays_as_it_is(rule: str) -> None:
    """With momentum from before, and weight decay: not a bit of a masked group moves, and every other one does."""
    model = Model()
    optimizers = build_optimizers(model, options(rule))
    for seed in range(3):
        step(model, optimizers, seed)
    allowed = torch.tensor([True, False, True, True, False, True])
    before = [of_group(model, optimizers, group) for group in range(GROUPS)]
    step(model, optimizers, 3, allowed)
    after = [of_group(model, optimizers, group) for group in range(GROUPS)]
    for group in range(GROUPS):
        same = [old == new for old, new in zip(before[group], after[group], strict=True)]
        assert (
            all(same) if not allowed[group] else not any(same[len(same) // 2 :])
        )  # group 3 of `up` is empty
    allowed[1] = True
    step(model, optimizers, 4, allowed)
    assert of_group(model, optimizers, 1) != after[1]
    assert of_group(model, optimizers, 4) == before[4]


@pytest.mark.parametrize("rule", RULES)
def test_a_step_with_all_groups_masked_changes_no_values(rule: str) -> None:
    model = Model()
    optimizers = build_optimizers(model, options(rule))
    step(model, optimizers, 0)
    before = [of_group(model, optimizers, group) for group in range(GROUPS)]
    step(model, optimizers, 1, torch.zeros(GROUPS, dtype=torch.bool))
    assert [of_group(model, optimizers, group) for group in range(GROUPS)] == before
    model.up.values.grad = model.down.values.grad = None
    optimizers[-1].step()
    assert [of_group(model, optimizers, group) for group in range(GROUPS)] == before


def test_a_group_masked_for_a_while_goes_on_as_if_those_steps_had_not_been() -> None:
    one, other = Model(), Model()
    of_one, of_other = build_optimizers(one, options()), build_optimizers(other, options())
    without = torch.tensor([True, True, False, True, True, True])
    for seed, allowed in ((0, None), (1, without), (2, without), (3, None)):
        step(one, of_one, seed, allowed)
    for seed in (0, 3):
        step(other, of_other, seed)
    assert of_group(one, of_one, 2) == of_group(other, of_other, 2)
    assert of_group(one, of_one, 1) != of_group(other, of_other, 1)


def test_parts_of_a_model_get_their_rules() -> None:
    model = Model()
    found = {
        group["name"]: (
            type(optimizer).__name__,
            set(group["param_names"]),
            group["peak"],
            group["weight_decay"],
        )
        for optimizer in build_optimizers(
            model, options("muon", router_lr=0.5, router_decay=0.2, experts_lr=0.25)
        )
        for group in optimizer.param_groups
    }
    assert found == {
        "router.matrices": ("Muon", {"router.main.weight"}, 0.5, 0.2),
        "router.rest": ("AdamW", {"router.conv.weight"}, 0.5, 0.2),
        "router.vectors": ("AdamW", {"router.main.bias", "router.conv.bias"}, 0.5, 0.0),
        "trunk.matrices": ("AdamW", {"head.weight"}, 1e-3, 0.1),
        "trunk.vectors": ("AdamW", {"norm.weight", "norm.bias"}, 2e-3, 0.0),
        "experts": ("SparseMuon", {"up.values", "down.values"}, 0.25, 0.1),
    }


def test_what_is_frozen_requires_no_gradient_and_is_in_no_optimizer() -> None:
    model = Model()
    before = {name: bits(parameter) for name, parameter in model.named_parameters()}
    optimizers = build_optimizers(model, optimizer_options(router_lr=2e-3, experts="frozen", norms_lr=0.0))
    assert {group["name"].partition(".")[0] for one in optimizers for group in one.param_groups} == {"router"}
    step(model, optimizers, 0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith("router")
        assert (bits(parameter) != before[name]) == name.startswith("router")
    again = build_optimizers(model, optimizer_options(router="frozen", experts="adamw", norms_lr=0.0))
    assert [group["name"] for one in again for group in one.param_groups] == ["experts"]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "up.values",
        "down.values",
    }
    build_optimizers(model, optimizer_options(router="frozen", experts="frozen", norms_lr=1e-3))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "norm.weight",
        "norm.bias",
    }
    with pytest.raises(InputError, match="nothing would be trained"):
        build_optimizers(model, optimizer_options(router="frozen", experts="frozen", norms_lr=0.0))


def test_a_model_without_experts_trains_its_trunk() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    (optimizer,) = build_optimizers(model, options())
    assert [group["name"] for group in optimizer.param_groups] == ["trunk.matrices", "trunk.vectors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_lr": -1.0}, "experts_lr is -1"),
        ({"router_lr": math.nan}, "router_lr is nan"),
        ({"router": "sgd"}, "router is 'sgd'; use adamw, muon or frozen"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        optimizer_options(**changes)


def test_rates_are_peaks_times_factors_or_as_given() -> None:
    optimizers = build_optimizers(Model(), options(experts_lr=0.2, router_lr=0.1))
    rates = built.set_rates(optimizers, 0.5, {"router": 0.3})
    assert rates["experts"] == pytest.approx(0.2 * 0.5)
    assert rates["router.matrices"] == rates["router.vectors"] == 0.3
    assert rates["trunk.matrices"] == pytest.approx(0.5e-3)
    assert all(group["lr"] == rates[group["name"]] for one in optimizers for group in one.param_groups)
    assert built.set_rates(optimizers, 1.0)["experts"] == 0.2


@pytest.mark.parametrize("rule", RULES)
def test_training_goes_on_from_files_to_the_bit(rule: str, tmp_path: Path) -> None:
    """Four steps at a stretch, and two, files, two: the same parameters and moments, masked steps included."""
    allowed = torch.tensor([True, False, True, True, False, True])
    model = Model()
    optimizers = build_optimizers(model, options(rule))
    for seed in range(2):
        built.set_rates(optimizers, 0.3)
        step(model, optimizers, seed, allowed if seed else None)
    tensors, settings = built.state_tensors(optimizers)
    save_file(tensors, tmp_path / "state.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(settings))
    resumed = Model()
    resumed.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    of_resumed = build_optimizers(resumed, options(rule))
    built.load_state_tensors(
        of_resumed,
        load_file(tmp_path / "state.safetensors"),
        json.loads((tmp_path / "state.json").read_text()),
    )
    for seed in range(2, 4):
        step(model, optimizers, seed, allowed)
        step(resumed, of_resumed, seed, allowed)
    for (name, one), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert bits(one) == bits(other), name
    ours, theirs = built.state_tensors(optimizers), built.state_tensors(of_resumed)
    assert ours[0].keys() == theirs[0].keys()
    assert all(bits(ours[0][key]) == bits(theirs[0][key]) for key in ours[0])
    assert ours[1] == theirs[1]


def test_a_taken_state_does_not_move_with_training() -> None:
    model = Model()
    optimizers = build_optimizers(model, options())
    step(model, optimizers, 0)
    tensors, _ = built.state_tensors(optimizers)
    before = {key: bits(tensor) for key, tensor in tensors.items()}
    step(model, optimizers, 1)
    assert {key: bits(tensor) for key, tensor in tensors.items()} == before


def test_a_state_of_another_run_is_refused() -> None:
    model = Model()
    optimizers = build_optimizers(model, options())
    step(model, optimizers, 0)
    tensors, settings = built.state_tensors(optimizers)
    with pytest.raises(InputError, match=r"trains .*trunk.*resume with the options"):
        built.load_state_tensors(build_optimizers(Model(), options(trunk_lr=0.0)), tensors, settings)
    other = Model()
    other.up = sparse_layer(24, 16, 0.3)
    of_other = build_optimizers(other, options())
    before = bits(next(other.parameters()))
    with pytest.raises(InputError, match=r"up\.values/exp_avg is .* resume with the assembly"):
        built.load_state_tensors(of_other, tensors, settings)
    assert not of_other[-1].state
    assert bits(next(other.parameters())) == before
    renamed = {**settings, "experts": {**settings["experts"], "param_names": ["down.values", "up.values"]}}
    with pytest.raises(InputError, match="parameters of experts are others"):
        built.load_state_tensors(optimizers, tensors, renamed)
    with pytest.raises(InputError, match=r"experts/left\.values/step"):
        built.load_state_tensors(optimizers, {"experts/left.values/step": torch.zeros(GROUPS)}, settings)


def test_gradients_of_a_real_model_move_the_experts_that_ran(tmp_path: Path) -> None:
    """One backward pass with two of four experts on: those and the core learn, the others stay to the bit."""
    from tests.dense.architectures import make_model
    from tests.model.assembled import assembled

    _, model = assembled(make_model("qwen2", tmp_path / "model"), experts=4)
    optimizers = build_optimizers(
        model,
        optimizer_options(router_lr=2e-3, experts="adamw", experts_lr=1e-4, experts_decay=0.1, norms_lr=0.0),
    )
    layers = [module for module in model.modules() if isinstance(module, ExpertLinear)]
    before = [layer.values.detach().clone() for layer in layers]
    ids = torch.arange(24).view(1, -1)
    output = model(input_ids=ids, labels=ids, gates=torch.tensor([1.0, 0.0, 0.0, 1.0]))
    output.loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    for old, layer in zip(before, layers, strict=True):
        same = [bits(old[part]) == bits(layer.values[part]) for part in group_slices(layer)]
        assert same == [False, True, True, False, False]
