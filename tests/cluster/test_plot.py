"""Pictures: both files are there, the page needs no network and holds nothing of the data unescaped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cluster.runs import CONFIG, cluster, job_of, scored_run
from tests.recorded import make_run
from tinyonn.cluster import plot
from tinyonn.cluster.plot import draw_sample, plot_cells
from tinyonn.errors import InputError


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = scored_run(tmp_path_factory.mktemp("plot"), {"code": 30, "<b>prose": 30})
    cluster(folder)
    return folder


@pytest.fixture(autouse=True)
def of_no_model(clustered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "source_of", lambda store, location, config: job_of(Path(location)).source)


def test_pictures_of_the_cells(clustered: Path, tmp_path: Path) -> None:
    png, page = plot_cells(str(clustered), CONFIG, tmp_path / "pictures", sample=300)
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text("utf-8")
    assert "<b>prose" not in text
    assert '<script src="http' not in text
    assert "cell 3, " in text


def test_the_sample_sees_small_cells(clustered: Path) -> None:
    sample, stored = draw_sample(str(clustered), CONFIG, 400)
    assert 400 <= sample.cells.size <= 420
    sizes = np.array([cell["size"] for cell in stored["cells"]])
    drawn = np.bincount(sample.cells, minlength=7)
    assert np.all(drawn > 0)
    assert drawn[sizes.argmin()] / sizes.min() >= drawn[sizes.argmax()] / sizes.max()
    far = np.square(sample.features[:, None] - np.array(stored["means"])[None]).sum(2)
    assert np.mean((far + np.array(stored["handicaps"])).argmin(1) == sample.cells) > 0.99


def test_a_run_without_cells_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(InputError, match="run `tinyonn cluster` first"):
        plot_cells(str(tmp_path), CONFIG, tmp_path / "pictures")
