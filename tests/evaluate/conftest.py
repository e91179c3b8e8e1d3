from __future__ import annotations

from pathlib import Path

import pytest

from tests.experts.runs import clustered_run
from tinyonn.config import Config


@pytest.fixture(scope="package")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A clustered run of a small random model, and its configuration."""
    folder = tmp_path_factory.mktemp("evaluate")
    return folder / "run", clustered_run(folder)
