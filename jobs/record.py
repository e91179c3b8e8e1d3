"""Record a corpus through a model on a Ray cluster.

    ray job submit --working-dir . -- python jobs/record.py storage/my-run --config configs/demo.yaml

The same as ``tinyonn record``: inside a Ray job it uses the job's cluster, without one it starts a local Ray.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyonn.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "record")
    main()
