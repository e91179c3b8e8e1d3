"""What a run is made of: its manifest, its segments and their names. Pure; knows nothing of Icechunk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tinyonn.base.parameters import Parameter
from tinyonn.errors import InputError, StoreDamagedError

VERSION = 2


@dataclass(frozen=True, order=True)
class Segment:
    """A contiguous range of samples of one slice, as committed or merged.

    Attributes
    ----------
    slice : str
        Name of the slice.
    first, last : int
        Half-open range of positions in the slice's stored order.
    samples : int
        Good samples in the range: the segment's weight in averages. 0 if all were set aside: no arrays then.
    set_aside : tuple of dict
        ``{"index": row of the source, "reason": text}`` for each sample that was set aside.
    """

    slice: str
    first: int
    last: int
    samples: int = 0
    set_aside: tuple[dict[str, Any], ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """``slice/first-last``: the name that seeds the dithering."""
        return f"{self.slice}/{self.first}-{self.last}"

    @property
    def path(self) -> str:
        """Path of the segment's group in the repository."""
        return f"segments/{self.name}"

    @property
    def range(self) -> tuple[int, int]:
        """``(first, last)``, half-open."""
        return self.first, self.last

    def contains(self, other: Segment) -> bool:
        """Whether `other` lies in this segment's range."""
        return self.slice == other.slice and self.first <= other.first and other.last <= self.last

    def overlaps(self, other: Segment) -> bool:
        """Whether the two share a position."""
        return self.slice == other.slice and self.first < other.last and other.first < self.last


def parse_segment(name: str, samples: int = 0, set_aside: tuple[dict[str, Any], ...] = ()) -> Segment:
    """Turn ``slice/first-last`` back into a segment."""
    place, _, span = name.rpartition("/")
    first, _, last = span.partition("-")
    if not (place and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise StoreDamagedError(
            f"{name!r} is not a segment's name; expected slice/first-last, such as python/0-16"
        )
    return Segment(place, int(first), int(last), samples, set_aside)


@dataclass(frozen=True)
class Manifest:
    """What decides the bits of a run; committed before anything else and never changed.

    Attributes
    ----------
    model, data, config : dict
        Fingerprints of the model and of the corpus, and the options that decide bits. Values are JSON.
    slices : dict of str to int
        Samples in each slice.
    segment_size : int
        Samples per segment; the last one of a slice may be shorter.
    parameters : tuple of Parameter
        Every recorded tensor, model order.
    seed : int
        Of the dithering.
    max_live : int
        Live segments per slice that merging aims at while recording.
    version : int
        Of the store's layout.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    config: dict[str, Any]
    slices: dict[str, int]
    segment_size: int
    parameters: tuple[Parameter, ...]
    seed: int = 0
    max_live: int = 3
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.segment_size < 1 or self.max_live < 1:
            raise ValueError(
                f"segment_size {self.segment_size} and max_live {self.max_live} must be 1 or more"
            )
        if any(count < 1 for count in self.slices.values()):
            raise ValueError(f"every slice needs at least one sample, got {self.slices}")
        object.__setattr__(self, "parameters", tuple(self.parameters))

    def leaves(self, slice: str) -> list[Segment]:
        """The slice's segments as they are dealt, in order."""
        count, size = self.slices[slice], self.segment_size
        return [Segment(slice, first, min(first + size, count)) for first in range(0, count, size)]

    def parameter(self, name: str) -> Parameter:
        """The parameter called `name`.

        Raises
        ------
        InputError
            If the run has no such parameter.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        example = self.parameters[0].name if self.parameters else "none"
        raise InputError(
            f"no parameter {name!r} in this run; it has {len(self.parameters)}, such as {example!r}; "
            "`parameters` lists them"
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; `from_json` is its inverse."""
        tree = {item.name: getattr(self, item.name) for item in fields(self)}
        tree["parameters"] = [{**asdict(p), "shape": list(p.shape)} for p in self.parameters]
        return tree

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Manifest:
        """Read a manifest.

        Raises
        ------
        InputError
            If it was written by another version of the layout.
        StoreDamagedError
            If fields are missing.
        """
        if tree.get("version") != VERSION:
            raise InputError(
                f"the run has layout version {tree.get('version')}, this Tiny-ONN reads version {VERSION}; "
                "record it anew"
            )
        try:
            known = {item.name: tree[item.name] for item in fields(cls)}
            known["parameters"] = tuple(
                Parameter(p["name"], tuple(p["shape"]), p["layer"], p["kind"]) for p in known["parameters"]
            )
            return cls(**known)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreDamagedError(
                f"the run's manifest is unreadable ({error!r}); record into another folder"
            ) from None

    def differences(self, other: Manifest) -> list[str]:
        """One line for each place where the two differ: ``model.weights: 'a' in the run, 'b' now``."""
        return _differences("", self.to_json(), other.to_json())


def _differences(path: str, stored: Any, current: Any) -> list[str]:
    if isinstance(stored, dict) and isinstance(current, dict):
        lines: list[str] = []
        for key in sorted(stored.keys() | current.keys()):
            lines += _differences(f"{path}.{key}" if path else key, stored.get(key), current.get(key))
        return lines
    if isinstance(stored, list) and isinstance(current, list) and path == "parameters":
        if stored == current:
            return []
        before, after = {p["name"]: p for p in stored}, {p["name"]: p for p in current}
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        what = f"{len(changed)} of {len(stored)} differ, first {changed[0]!r}" if changed else "another order"
        return [f"parameters: {what}"]
    stored, current = _plain(stored), _plain(current)
    return [] if stored == current else [f"{path}: {stored!r} in the run, {current!r} now"]


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON would give them back."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
