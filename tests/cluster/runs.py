"""A scored run without a model, whose weights are drawn, and its clustering."""

from __future__ import annotations

from pathlib import Path

from tests.recorded import make_run, score, weights
from tinyonn.cluster.report import ClusterReport
from tinyonn.cluster.stage import Job
from tinyonn.config import ClusterConfig, Config, ExpertsConfig, RouterConfig
from tinyonn.run import Run
from tinyonn.score.source import RunSource
from tinyonn.store.repository import Store
from tinyonn.workers.tasks import THREADS, EngineOptions

CONFIG = Config(
    cluster=ClusterConfig(cells=7), experts=ExpertsConfig(budget=0.4), router=RouterConfig(top_k=2)
)


def scored_run(folder: Path, slices: dict[str, int] | None = None) -> Path:
    """Recorded and scored."""
    make_run(folder, slices) if slices else make_run(folder)
    score(folder)
    return folder


def job_of(
    folder: Path, config: Config = CONFIG, options: EngineOptions = THREADS, fresh: bool = False
) -> Job:
    """Of the run as it is scored now."""
    store = Store.open(folder / "store", read_only=False)
    return Job(store, str(folder), config, RunSource(Run(store), weights, labels=False), options, fresh)


def cluster(
    folder: Path, config: Config = CONFIG, options: EngineOptions = THREADS, fresh: bool = False
) -> ClusterReport:
    """Clustered."""
    return job_of(folder, config, options, fresh).run()


def of_cluster(config: Config = CONFIG, **options: object) -> Config:
    """With other options of the clustering."""
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=options)})
