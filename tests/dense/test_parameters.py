from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from tests.dense.architectures import ARCHITECTURES, REFUSED, VOCAB
from tests.dense.conftest import ModelFactory
from tinyonn.config import ModelConfig
from tinyonn.dense.load import load_model, load_shape
from tinyonn.dense.parameters import Use, list_parameters, list_uses
from tinyonn.errors import InputError


def config_of(folder: object, **options: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", **options)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_scalar_is_listed_once_in_model_order(
    name: str, quantization: str, model_of: ModelFactory
) -> None:
    plain = load_model(config_of(model_of(name), quantization="none", dtype="float32")).model
    loaded = load_model(config_of(model_of(name), quantization=quantization)).model
    listed = list_parameters(loaded)
    assert [parameter.name for parameter in listed] == [key for key, _ in plain.named_parameters()]
    assert sum(parameter.size for parameter in listed) == sum(tensor.numel() for tensor in plain.parameters())
    shapes = {key: tuple(tensor.shape) for key, tensor in plain.named_parameters()}
    for parameter in listed:
        transposed = name == "gpt2" and quantization == "nf4" and ".h." in parameter.name
        shape = shapes[parameter.name]
        assert parameter.shape == (shape[::-1] if transposed else shape)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_shape_alone_gives_the_same_lists(name: str, quantization: str, model_of: ModelFactory) -> None:
    config = config_of(model_of(name), quantization=quantization)
    loaded, shape = load_model(config).model, load_shape(config)
    assert all(tensor.is_meta for tensor in shape.parameters())
    assert list_parameters(shape) == list_parameters(loaded)
    assert [described(use) for use in list_uses(shape)] == [described(use) for use in list_uses(loaded)]


def described(use: Use) -> tuple[object, ...]:
    return use.parameter_name, use.module_name, use.operation, use.scale, use.eps


def test_kinds_layers_and_roles(model_of: ModelFactory) -> None:
    listed = {p.name: p for p in list_parameters(load_shape(config_of(model_of("qwen2"))))}
    found = {
        name: (listed[name].kind, listed[name].layer, listed[name].role)
        for name in (
            "model.embed_tokens.weight",
            "model.layers.1.self_attn.q_proj.weight",
            "model.layers.1.self_attn.q_proj.bias",
            "model.layers.0.input_layernorm.weight",
            "lm_head.weight",
        )
    }
    assert list(found.values()) == [
        ("embedding", None, "embed_tokens"),
        ("linear", 1, "q_proj"),
        ("bias", 1, "q_proj"),
        ("norm", 0, "input_layernorm"),
        ("linear", None, "lm_head"),
    ]


def test_a_tied_tensor_goes_by_its_first_name_and_has_two_uses(model_of: ModelFactory) -> None:
    model = load_model(config_of(model_of("gemma"))).model
    uses = [use for use in list_uses(model) if use.parameter_name == "model.embed_tokens.weight"]
    assert [(use.module_name, use.operation, use.scale) for use in uses] == [
        ("model.embed_tokens", "embedding", 8.0),  # Gemma scales by the root of its width, 64
        ("lm_head", "linear", 1.0),
    ]
    names = [parameter.name for parameter in list_parameters(model)]
    assert names[0] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_formed_from_the_uses_are_autograds(name: str, model_of: ModelFactory) -> None:
    """The list's whole promise: with X and G of every use, each parameter's gradient can be formed."""
    model = load_model(config_of(model_of(name), quantization="none", dtype="float32")).model
    ids = torch.randint(0, VOCAB - 8, (1, 12), generator=torch.Generator().manual_seed(1))
    uses = list_uses(model)
    inputs: dict[str, torch.Tensor] = {}
    pulls: dict[str, torch.Tensor] = {}

    def watch(module_name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            inputs[module_name] = args[0].detach()
            output.register_hook(lambda gradient: pulls.__setitem__(module_name, gradient))

        return hook

    for module_name, module in {use.module_name: use.module for use in uses}.items():
        module.register_forward_hook(watch(module_name))
    model(input_ids=ids, labels=ids).loss.backward()
    formed: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
    for use in uses:
        formed[use.parameter_name] = formed[use.parameter_name] + form(
            use, inputs[use.module_name], pulls[use.module_name]
        )

    reference = load_model(config_of(model_of(name), quantization="none", dtype="float32")).model
    reference.requires_grad_(True)
    reference(input_ids=ids, labels=ids).loss.backward()
    for key, tensor in reference.named_parameters():
        assert tensor.grad is not None
        torch.testing.assert_close(formed[key], tensor.grad, rtol=1e-4, atol=1e-6, msg=key)


def form(use: Use, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    flat_g = g.reshape(-1, g.shape[-1])
    if use.operation == "bias":
        return flat_g.sum(0)
    if use.operation == "embedding":
        rows = torch.nn.functional.one_hot(x.reshape(-1), use.module.get_parameter("weight").shape[0]).float()
        return use.scale * rows.T @ flat_g[-len(rows) :]
    flat_x = x.reshape(-1, x.shape[-1])
    if use.operation == "linear":
        return flat_g.T @ flat_x
    if use.operation == "conv1d":
        return flat_x.T @ flat_g
    centred = flat_x - flat_x.mean(-1, keepdim=True) if use.operation == "layer_norm" else flat_x
    unit = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + use.eps)
    return (unit * flat_g).sum(0)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", REFUSED)
def test_fused_experts_are_refused_by_name(name: str, quantization: str, model_of: ModelFactory) -> None:
    with pytest.raises(
        InputError, match=r"mlp\.experts\.gate_up_proj.*(Qwen2Moe|Mixtral)Experts.*Supported: nn\.Linear"
    ):
        load_model(config_of(model_of(name), quantization=quantization))


class OddRMSNorm(torch.nn.Module):
    """Bears the name and subtracts the mean all the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


def test_a_norm_that_only_bears_the_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"0\.weight.*OddRMSNorm.*rms_norm"):
        list_uses(torch.nn.Sequential(OddRMSNorm(64)))


class Halved(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (Halved(4, 4), "Halved"),
        (torch.nn.Conv1d(4, 4, 3), "Conv1d"),
        (torch.nn.Embedding(4, 4, max_norm=1.0), "Embedding"),
        (torch.nn.LayerNorm((4, 4)), "LayerNorm"),
    ],
)
def test_other_arithmetic_is_refused(module: torch.nn.Module, kind: str) -> None:
    with pytest.raises(InputError, match=kind):
        list_uses(torch.nn.Sequential(torch.nn.Linear(4, 4), module))
