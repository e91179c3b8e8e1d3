"""Scores and clusters a run again and again, in turns with other settings; made to be killed.

python -m tests.cluster.crash_child FOLDER TURN
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from tests.cluster.runs import cluster, of_cluster
from tests.recorded import score
from tinyonn.config import ScoreConfig

SCORES = {"balanced": ScoreConfig(), "source": ScoreConfig(weights="source")}
CELLS = (7, 11)


def main(folder: str, turn: int) -> None:
    """Print a line after each stage."""
    for number in count(turn):
        score(folder, list(SCORES.values())[number % 2])
        print("scored", flush=True)
        cluster(Path(folder), of_cluster(cells=CELLS[number % 2], seed=number), fresh=True)
        print("clustered", flush=True)


if __name__ == "__main__":
    main(str(Path(sys.argv[1])), int(sys.argv[2]))
