"""Reading a profile: ``open_profile("storage/demo/profile")``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn.errors import InputError
from tinyonn.profile.dataset import STATISTICS, Manifest, read_manifest, read_part
from tinyonn.profile.kernel import Int64
from tinyonn.show.sheet import Sheet, pairs, whole
from tinyonn.show.sizes import format_seconds, format_size
from tinyonn.store.records import Float64

Float32 = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Profile:
    """What every group of weights did on every sample. S samples, slice after slice in stored order; G groups.

    Attributes
    ----------
    manifest : Manifest
        What it is a profile of.
    samples : int64 [S]
        Row of the source.
    positions : int64 [S]
        Place in the slice's stored order: ``corpus.sample(slice, position)``.
    slices : list of str
        Of every sample.
    losses : float64 [S]
        Of the dense model, nats per labelled token.
    tokens, labelled, prompts : int64 [S]
        All tokens; those that the loss is taken on; those from which gates are chosen.
    excerpts : list of str
        First characters.
    act, grad : int64 [S, G]
        Summed levels of act and grad of a group's weights.
    contribution, pull : float32 [S, G]
        Sum of ``|w g|``, sum of ``w g``.
    set_aside : dict
        Reason by row of the source.
    """

    manifest: Manifest
    samples: Int64
    positions: Int64
    slices: list[str]
    losses: Float64
    tokens: Int64
    labelled: Int64
    prompts: Int64
    excerpts: list[str]
    act: Int64
    grad: Int64
    contribution: Float32
    pull: Float32
    set_aside: dict[int, str]

    @property
    def groups(self) -> int:
        """Experts and, of an assembled model, the core, which is the last."""
        return self.manifest.groups.groups

    @property
    def experts(self) -> int:
        """Groups but for the core."""
        return self.manifest.groups.experts


def open_profile(folder: str | Path, expect: str | None = None) -> Profile:
    """Open a profile.

    Parameters
    ----------
    folder : str or path
        ``<run>/profile``.
    expect : str, optional
        Id of the assembly (or of the labels) whose groups it must be of.

    Raises
    ------
    InputError
        None is there, it is not complete, or it is of other groups.
    StoreDamagedError
        A file is damaged; names it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} holds no profile; run `tinyonn profile` first")
    if expect is not None and manifest.groups.id != expect:
        raise InputError(
            f"{folder} is a profile of {manifest.groups.name}, not of {expect}; run `tinyonn profile` with --fresh, "
            "which measures the present model"
        )
    parts = manifest.parts
    left = [part for part in parts if not part.path(folder, "samples").is_file()]
    if left:
        raise InputError(
            f"{folder} is not complete: {len(left)} of {len(parts)} parts are missing, positions {left[0].first}-"
            f"{left[0].last} of slice {left[0].slice} first; run `tinyonn profile` again, it goes on from there"
        )
    return _join(folder, manifest)


def _join(folder: Path, manifest: Manifest) -> Profile:
    groups = manifest.groups.groups
    columns: dict[str, list[Any]] = {}
    slices: list[str] = []
    set_aside: dict[int, str] = {}
    excerpts: list[str] = []
    for part in manifest.parts:
        samples, arrays, aside = read_part(folder, part, groups)
        set_aside |= aside
        slices += [part.slice] * len(samples)
        excerpts += samples.column("excerpt").to_pylist()
        numbers = ("sample", "position", "loss", "tokens", "labelled", "prompt")
        for name, values in {name: samples.column(name).to_numpy() for name in numbers}.items():
            columns.setdefault(name, []).append(values)
        for name in STATISTICS:
            columns.setdefault(name, []).append(arrays[name])

    def joined(name: str, kind: type = np.int64) -> Any:
        return np.concatenate(columns[name]).astype(kind, copy=False)

    return Profile(
        manifest,
        joined("sample"),
        joined("position"),
        slices,
        joined("loss", np.float64),
        joined("tokens"),
        joined("labelled"),
        joined("prompt"),
        excerpts,
        joined("act"),
        joined("grad"),
        joined("contribution", np.float32),
        joined("pull", np.float32),
        set_aside,
    )


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
