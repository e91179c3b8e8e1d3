"""A model's head and calls, found by running its own code without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.dense.architectures import COMMON
from tests.dense.conftest import ModelFactory
from tinyonn.config import ModelConfig
from tinyonn.dense.head import head_of
from tinyonn.dense.load import check_calls, load_shape
from tinyonn.errors import InputError

CONFIG = LlamaConfig(**COMMON)


def shape_of(folder: object) -> Any:
    return load_shape(ModelConfig(path=str(folder), quantization="none"))


@pytest.mark.parametrize(
    ("name", "before", "scale", "cap"),
    [
        ("qwen2_tied", 1.0, 1.0, None),
        ("gemma2", 1.0, 1.0, 4.0),
        ("granite", 1.0, 1 / 6, None),
        ("cohere", 1.0, 0.3, None),
        ("minicpm3", 0.25, 1.0, None),
        ("opt", 1.0, 1.0, None),
    ],
)
def test_scales_and_caps_are_found_on_the_meta_device(
    name: str, before: float, scale: float, cap: float | None, model_of: ModelFactory
) -> None:
    shape = shape_of(model_of(name))
    head = head_of(shape)
    assert head.module is shape.get_output_embeddings()
    assert (head.before, head.cap) == (before, cap)
    assert head.scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "minicpm3"])
def test_hidden_states_and_head_are_the_models_own_logits(name: str, model_of: ModelFactory) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of(name)).eval()
    calls: list[str] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append("head"))
    head, ids = head_of(model), torch.arange(40, 52)[None]
    assert calls == []
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(head(hidden), model(input_ids=ids).logits, rtol=1e-6, atol=1e-7)
    assert calls == ["head", "head"]


class Shifted(LlamaForCausalLM):
    def forward(self, *args: Any, **options: Any) -> Any:
        found = super().forward(*args, **options)
        found.logits = found.logits + 1
        return found


class Squashed(Shifted):
    def forward(self, *args: Any, **options: Any) -> Any:
        found = LlamaForCausalLM.forward(self, *args, **options)
        found.logits = 5 * torch.atan(found.logits)
        return found


class Cut(Shifted):
    def forward(self, *args: Any, **options: Any) -> Any:
        found = LlamaForCausalLM.forward(self, *args, **options)
        found.logits = found.logits[..., :-4]
        return found


class Turned(LlamaForCausalLM):
    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        found = self.model(input_ids=input_ids)
        found.logits = self.lm_head(found.last_hidden_state.flip(-1))
        return found


class Twice(Turned):
    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        found = self.model(input_ids=input_ids)
        found.logits = self.lm_head(found.last_hidden_state) + self.lm_head(found.last_hidden_state)
        return found


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Shifted, "Shifted changes its logits after the head by neither a scale nor a soft cap"),
        (Squashed, "Squashed changes its logits"),
        (Cut, "Cut changes its logits"),
        (Turned, "Turned changes the hidden states before its head"),
        (Twice, "its head is called 2 times"),
    ],
)
def test_any_other_arithmetic_is_refused(kind: type, message: str) -> None:
    with torch.device("meta"):
        model = kind(CONFIG)
    with pytest.raises(InputError, match=message):
        head_of(model)
    assert "forward" not in model.lm_head.__dict__ and "forward" not in model.model.__dict__


class Looped(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[1].mlp = self.model.layers[0].mlp


class Idle(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.spare = torch.nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Looped, r"model\.layers\.0\.mlp\.gate_proj is called 2 times"),
        (Idle, r"spare is called 0 times"),
    ],
)
def test_a_module_called_twice_or_never_is_refused(kind: type, message: str) -> None:
    with torch.device("meta"):
        model = kind(CONFIG)
    with pytest.raises(InputError, match=message):
        check_calls(model)
