"""What a worker says of itself. Needs no Ray: workers run without it, too."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from tinyonn.dense.parameters import Parameter
from tinyonn.plan.usage import process_meter


@dataclass(frozen=True)
class WorkerFacts:
    """Where a worker runs and what it has loaded."""

    parameters: tuple[Parameter, ...]
    device: str
    host: str
    pid: int


@dataclass(frozen=True)
class WorkerUse:
    """What a worker has used so far: seconds of recording and of writing, bytes of memory; and which process it is."""

    samples: int
    recording: float
    writing: float
    peak_rss: int
    peak_vram: int
    host: str
    pid: int

    @classmethod
    def now(cls, samples: int, recording: float, writing: float, peak_vram: int) -> WorkerUse:
        """Of this process, with what it holds beside the GPU."""
        peak = process_meter().usage.peak
        return cls(samples, recording, writing, peak, peak_vram, platform.node(), os.getpid())
