"""Scores and clusters a run again and again, in turns with other settings; made to be killed.

python -m tests.cluster.crash_child FOLDER TURN
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from tinyonn.cluster.stage import cluster_run
from tinyonn.config import SEED_WEIGHTS, ClusterConfig, ScoreConfig
from tinyonn.score.stage import score_run

SCORES = {"default": ScoreConfig(), "seed": ScoreConfig(weights=SEED_WEIGHTS)}
CELLS = (7, 11)


def main(folder: str, turn: int) -> None:
    """Print a line after each stage."""
    for number in count(turn):
        score_run(folder, list(SCORES.values())[number % 2])
        print("scored", flush=True)
        cluster_run(folder, ClusterConfig(cells=CELLS[number % 2], seed=number, tolerance=0.01), fresh=True)
        print("clustered", flush=True)


if __name__ == "__main__":
    main(str(Path(sys.argv[1])), int(sys.argv[2]))
