from __future__ import annotations

from typing import Any

import pytest

from tests.dense.conftest import ModelFactory, few_threads, model_of
from tests.model.assembled import assembled
from tinyonn.experts import TinyONNForCausalLM

__all__ = ["few_threads", "model_of", "pair"]


@pytest.fixture
def pair(model_of: ModelFactory) -> tuple[Any, TinyONNForCausalLM]:
    """A base and a model with four experts and 60 % of its weights."""
    return assembled(model_of("qwen2"), kept=0.6)
