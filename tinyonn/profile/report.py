"""What the profiling stage tells at its end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinyonn.profile.reader import Profile
from tinyonn.sheet import Sheet, pairs, whole
from tinyonn.sizes import format_seconds, format_size


@dataclass(frozen=True)
class ProfileReport:
    """What a call of `profile_run` did and what the profile holds now.

    Attributes
    ----------
    location, folder : str
    source, id : str
        ``assembly`` or ``labels``, and which.
    experts, groups : int
        Without and with the core.
    samples, set_aside : int
        Of the whole profile.
    samples_measured : int
        By this call.
    slices : dict
        Samples by slice.
    loss : float
        Mean over samples, nats per labelled token.
    core_share : float or None
        Of the contribution of all groups, mean over samples; None without a core.
    effective_experts : float
        Exponential of the entropy of the experts' shares of a sample's contribution, mean over samples: the number of
        equally strong experts that would be as spread.
    bytes : int
        On disk.
    workers : int
    seconds_measuring : float
        Summed over the workers of this call.
    samples_per_second : float
        Of this call, loading left out.
    peak_rss_bytes, peak_vram_bytes : int
    seconds : float
    """

    location: str
    folder: str
    source: str
    id: str
    experts: int
    groups: int
    samples: int
    samples_measured: int
    set_aside: int
    slices: dict[str, int]
    loss: float
    core_share: float | None
    effective_experts: float
    bytes: int
    workers: int
    seconds_measuring: float
    samples_per_second: float
    peak_rss_bytes: int
    peak_vram_bytes: int
    seconds: float
    planned_rss_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> Sheet:
        """For people."""
        core = "" if self.core_share is None else f", {self.core_share:.1%} of it through the core"
        rows = {
            "groups": f"{self.experts} experts{' and the core' if self.groups > self.experts else ''} of {self.source} "
            f"{self.id[:12]}",
            "samples": f"{self.samples:,} ({self.samples_measured:,} in this call), {self.set_aside:,} set aside",
            "slices": ", ".join(whole(f"{name} {count:,}") for name, count in self.slices.items()),
            "loss": f"{self.loss:.4f} nats per token",
            "contribution": f"spread over {self.effective_experts:.1f} experts of a sample{core}",
            "on disk": f"{whole(self.folder)}, {format_size(self.bytes)}",
            "speed": f"{self.samples_per_second:,.2f} samples/s with {self.workers} workers",
            "time": format_seconds(self.seconds),
        }
        return pairs(f"profiled {whole(self.location)}", rows)


def spread(profile: Profile) -> tuple[float | None, float]:
    """Mean share of the core, and mean effective number of experts."""
    C_SG = profile.contribution.astype(np.float64)
    experts = C_SG[:, : profile.experts]
    total = C_SG.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = experts / experts.sum(1, keepdims=True)
        entropy = -np.where(p > 0, p * np.log(p), 0.0).sum(1)
        core = (C_SG[:, profile.experts :] / total).sum(1)
    has_core = profile.groups > profile.experts
    mean = float(np.nanmean(core)) if has_core and len(core) else None
    return mean, float(np.exp(entropy).mean()) if len(entropy) else 0.0
