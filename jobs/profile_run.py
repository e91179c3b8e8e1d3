"""Profile a run's samples on a Ray cluster: what every expert did on every sample.

    ray job submit --working-dir . -- python jobs/profile_run.py storage/my-run --config configs/demo.yaml

The same as ``tinyonn profile``: inside a Ray job it uses the job's cluster; all machines must reach the run's folder.
(Not called profile.py, which would stand in the way of the standard library's module of that name.)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyonn.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "profile")
    main()
