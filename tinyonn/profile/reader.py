"""Reading a profile: ``open_profile("storage/demo/profile")``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn.errors import InputError
from tinyonn.profile.kernel import Int64
from tinyonn.profile.manifest import Manifest, read_manifest
from tinyonn.profile.tables import STATISTICS, read_part
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
