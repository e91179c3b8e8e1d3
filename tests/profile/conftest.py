from __future__ import annotations

import pytest

from tests.dense.conftest import few_threads, model_of
from tests.profile.runs import World, make_world

__all__ = ["few_threads", "model_of"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("profile"))
