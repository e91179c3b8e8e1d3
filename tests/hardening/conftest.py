"""Folders of models, saved once and copied where they are damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.train.trained import make_models
from tinyonn.experts.folder import open_assembled
from tinyonn.train.checkpoint import save_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of several shards, as `tinyonn train` and ``save_pretrained`` write it."""
    folder = tmp_path_factory.mktemp("saved")
    _, model = make_models(folder / "base")
    save_model(model, folder / "model", {"steps": 3}, folder / "base", torch.float32)
    open_assembled(folder / "model").save_pretrained(folder / "sharded", max_shard_size="40KB")
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "model", tmp_path / "model"))


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))
