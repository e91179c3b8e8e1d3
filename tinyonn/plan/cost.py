"""What recording costs in time, by constants that stand here and nowhere else, and the segment size from it.

Per sample: 2 flop per weight and token forward, 2 backward to the inputs, 2 for the weight gradient; with
several windows the first four are spent for each window, and gradient checkpointing adds a forward pass. On a
CPU every weight's level is also found and summed. Per segment: every tensor's arrays and every weight's
record are made and written.

The segment size decides the bits of a run, so it depends on the model and the data, never on a measured time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal

from tinyonn.dense.parameters import Parameter

Device = Literal["cpu", "cuda"]

# A worker of one thread on a two-core x86 machine, bf16, as measured; a consumer card, half used, as assumed.
FLOP_PER_SECOND: dict[Device, float] = {"cpu": 90e9, "cuda": 20e12}
LEVEL_SECONDS: dict[Device, float] = {"cpu": 1e-9, "cuda": 0.0}  # per weight and sample
TENSOR_SECONDS = 3e-3  # of a commit, per tensor: metadata, codebooks, tables
RECORD_SECONDS = 25e-9  # of a commit, per weight: encoding, compression, writing

SEGMENTS = 64  # that a run should have
COMMIT_SHARE = 0.03  # of the recording that committing may cost at most
LOST_SECONDS = 15 * 60  # of one worker's work that a crash may lose at most; wins over the share
EXACT_SAMPLES = 65535 // 15  # levels of so many samples fit in a uint16


def sample_seconds(
    weights: int, tokens: float, device: Device, windows: int = 1, checkpointing: bool = False
) -> float:
    """Seconds that one worker takes for one sample of `tokens` tokens."""
    passes = (6 if checkpointing else 4) * windows + 2
    return passes * weights * max(tokens, 1.0) / FLOP_PER_SECOND[device] + weights * LEVEL_SECONDS[device]


def commit_seconds(weights: int, tensors: int) -> float:
    """Seconds that encoding and committing one segment takes."""
    return tensors * TENSOR_SECONDS + weights * RECORD_SECONDS


def segment_size(
    parameters: Sequence[Parameter], samples: int, mean_tokens: float, slices: int, device_kind: Device
) -> int:
    """Samples per segment for ``record.segment: auto``.

    About 64 segments a run, as many in each slice; more samples where committing would cost over 3 % of
    recording; no more than 15 minutes of a worker's work, nor than a uint16 can sum.

    Parameters
    ----------
    parameters : sequence of Parameter
    samples : int
        Of all slices together.
    mean_tokens : float
    slices : int
        Number of slices; a segment never crosses one.
    device_kind : str
        ``cpu`` or ``cuda``: what the run is made for, not what is free at the moment.

    Returns
    -------
    int, at least 1
    """
    weights = sum(parameter.size for parameter in parameters)
    each = sample_seconds(weights, mean_tokens, device_kind)
    many = ceil(samples / max(1, slices) / max(1, round(SEGMENTS / max(1, slices))))
    cheap = ceil(commit_seconds(weights, len(parameters)) / (COMMIT_SHARE * each))
    return max(1, min(max(many, cheap), int(LOST_SECONDS / each), EXACT_SAMPLES))
