"""Cluster a scored run on a Ray cluster: Dask's tasks run as Ray tasks.

    ray job submit --working-dir . -- python jobs/cluster.py storage/my-run

The same as ``tinyonn cluster --engine ray``; the store must be where all machines reach it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyonn.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["cluster", "--engine", "ray"]
    main()
