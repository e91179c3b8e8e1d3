"""The models of the dense room, for tests of this room too, and a folder of sources."""

from pathlib import Path

import pytest

from tests.corpus.sources import Room
from tests.dense.conftest import ModelFactory, few_threads, model_of

__all__ = ["few_threads", "model_of"]


@pytest.fixture
def room(tmp_path: Path, model_of: ModelFactory) -> Room:
    return Room(tmp_path, model_of("qwen2"))
