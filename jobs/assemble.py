"""Assemble a clustered run on a Ray cluster: the shards are dealt to its workers.

    ray job submit --working-dir . -- python jobs/assemble.py storage/my-run --config configs/qwen1.5-4b.yaml

The same as ``tinyonn assemble --engine ray``; run, base model and output must be where all machines reach them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyonn.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["assemble", "--engine", "ray"]
    main()
