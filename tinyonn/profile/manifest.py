"""What a profile is a profile of, and the parts that it is measured in. Pure, but for reading the file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tinyonn.errors import InputError
from tinyonn.files import damaged, read_json
from tinyonn.profile.groups import Identity

FORMAT = 1
PART = 32  # samples
MANIFEST = "manifest.json"
TABLES = ("experts", "samples")  # in the order in which they are written


@dataclass(frozen=True)
class Part:
    """The unit of work, of commit and of resume: positions [first, last) of a slice's stored order."""

    slice: str
    first: int
    last: int

    def path(self, folder: Path, table: str) -> Path:
        """Of one of its two files, ``experts`` or ``samples``."""
        return folder / table / f"slice={self.slice}" / f"{self.first}-{self.last}.parquet"


@dataclass(frozen=True)
class Manifest:
    """What a profile is a profile of.

    Attributes
    ----------
    groups : Identity
    model : dict
        Fingerprint of the dense model, with its quantization and type.
    corpus : str
        Fingerprint.
    threads, prompt_tokens, excerpt : int
        CPU threads of a worker; most prompt tokens of a text; characters of an excerpt.
    taken : dict
        Samples by slice, the first in the stored order. May grow.
    part : int
        Samples of a part.
    format : int
    """

    groups: Identity
    model: dict[str, str]
    corpus: str
    threads: int
    prompt_tokens: int
    excerpt: int
    taken: dict[str, int]
    part: int = PART
    format: int = FORMAT

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Manifest:
        """From JSON."""
        return cls(**{**tree, "groups": Identity(**tree["groups"])})

    @property
    def samples(self) -> int:
        """Of all slices."""
        return sum(self.taken.values())

    @property
    def parts(self) -> list[Part]:
        """All, slices in order."""
        return [
            Part(name, first, min(first + self.part, count))
            for name, count in self.taken.items()
            for first in range(0, count, self.part)
        ]

    def difference(self, other: Manifest) -> str | None:
        """The first thing in which another differs, but for what may."""
        for field in fields(self):
            mine, its = getattr(self, field.name), getattr(other, field.name)
            if field.name not in ("taken", "part") and mine != its:
                return f"{field.name}: {_short(mine, its)} instead of {_short(its, mine)}"
        return None


def read_manifest(folder: Path) -> Manifest | None:
    """What a folder holds a profile of; None if it holds none.

    Raises
    ------
    InputError
        It is of another version.
    StoreDamagedError
        It is not what was written.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    remedy = "measure all of it again with --fresh"
    tree = read_json(path, remedy)
    try:
        if tree["format"] != FORMAT:
            raise InputError(f"{path}: format {tree['format']}, this version reads {FORMAT}; {remedy}")
        return Manifest.from_tree(tree)
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"it is no manifest: {error!r}", remedy) from None


def _short(value: Any, other: Any) -> str:
    """A value, or of a large one what differs."""
    if isinstance(value, Identity):
        return value.name
    if isinstance(value, dict):
        name = next(name for name in sorted({*value, *other}) if value.get(name) != other.get(name))
        return f"{name} {str(value.get(name, 'none'))[:16]}"
    return str(value)[:16]
