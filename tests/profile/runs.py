"""A run of a small model with bad samples in its corpus: recorded, scored, clustered, assembled."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.record.runs import config_of, make_sick_model, serial_run, write_rows
from tinyonn.cluster.stage import cluster_run
from tinyonn.config import ClusterConfig, Config, ExpertsConfig
from tinyonn.experts.assemble import assemble_run
from tinyonn.score.stage import score_run

CELLS = 5
SLICES = {"even": 70, "odd": 10, "sick": 2}  # of even there are three parts


@dataclass(frozen=True)
class World:
    """The run, its corpus's rows and its configuration."""

    folder: Path
    rows: list[dict[str, str]]
    config: Config

    def copy(self, folder: Path) -> Path:
        """The run again, to write into."""
        shutil.copytree(self.folder, folder)
        return folder


def make_world(folder: Path) -> World:
    """All stages before the profile."""
    rows = write_rows(folder / "rows.jsonl", SLICES)
    config = config_of(make_sick_model(folder / "model"), folder / "rows.jsonl", workers=1, segment=32)
    config = config.model_copy(update={"cluster": ClusterConfig(cells=CELLS)})
    run = folder / "run"
    serial_run(run, config)
    score_run(str(run), config)
    cluster_run(str(run), config)
    assemble(run, config)
    return World(run, rows, config)


def assemble(run: Path, config: Config, budget: float = 0.4) -> str:
    """Assemble the run; the id."""
    return assemble_run(str(run), config.model, ExpertsConfig(budget=budget)).assembly


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a profile."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
