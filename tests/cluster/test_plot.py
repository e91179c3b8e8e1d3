"""Pictures: both files are there, the page needs no network and holds nothing of the data unescaped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.recorded import make_run
from tinyonn.cluster.plot import draw_sample, plot_cells
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import ClusterConfig, ScoreConfig
from tinyonn.errors import InputError
from tinyonn.run import open_run
from tinyonn.score.stage import score_run


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("plot"), {"code": 30, "<b>prose": 30})
    score_run(str(folder), ScoreConfig())
    cluster_run(str(folder), ClusterConfig(cells=9))
    return folder


def test_pictures_of_the_cells(clustered: Path, tmp_path: Path) -> None:
    png, page = plot_cells(str(clustered), tmp_path / "pictures", sample=300)
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text("utf-8")
    assert "<b>prose" not in text
    assert '<script src="http' not in text
    assert "cell 3, " in text


def test_the_sample_sees_small_cells(clustered: Path) -> None:
    run = open_run(clustered)
    stored = run.store.reader().stage("labels")
    assert stored is not None
    sample = draw_sample(run, stored, 400, seed=1)
    assert 400 <= sample.cells.size <= 420
    sizes = np.array([cell["size"] for cell in stored["cells"]])
    drawn = np.bincount(sample.cells, minlength=9)
    assert np.all(drawn > 0)
    assert drawn[sizes.argmin()] / sizes.min() >= drawn[sizes.argmax()] / sizes.max()
    centres = np.array(stored["centres"]) * np.array(stored["scale"])
    nearest = ((sample.features[:, None] - centres[None]) ** 2).sum(2).argmin(1)
    assert np.mean(nearest == sample.cells) > 0.999


def test_a_run_without_cells_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(InputError, match="run `tinyonn cluster` first"):
        plot_cells(str(tmp_path), tmp_path / "pictures")
