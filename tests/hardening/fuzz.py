"""What every random input must keep to: time, memory, and how examples are drawn."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase

SECONDS = 10.0
BYTES = 2 << 30
COMMON: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate),
}


@contextmanager
def bounded() -> Iterator[None]:
    """No more than `SECONDS` of CPU, six times that by the clock, and `BYTES` of RAM."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.monotonic(), time.process_time()
    yield
    assert time.process_time() - cpu < SECONDS
    assert time.monotonic() - started < 6 * SECONDS  # on a machine that does other things
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
