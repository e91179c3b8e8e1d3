"""The assembled and profiled run that stage, group and tuning are tested on, made once."""

from __future__ import annotations

import pytest

from tests.train.runs import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))
