"""Train an assembled run on a Ray cluster: one worker for each GPU, or for each machine without.

    ray job submit --working-dir . -- python jobs/train.py storage/my-run --config configs/qwen1.5-4b.yaml

The same as ``tinyonn train``: inside a Ray job it uses the job's cluster, without one it trains in this process. The
run's folder must be where all machines reach it: checkpoints lie there, and after a lost worker they are gone on from.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyonn.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
