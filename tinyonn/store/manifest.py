"""What a run is made of: its manifest, its segments and their names. Pure; knows nothing of Icechunk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError, StoreDamagedError

VERSION = 2
GROWN = 3  # of the layout of a run whose corpus has grown


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
    """What decides the bits of a run; committed before anything else and changed only where the corpus grows.

    Attributes
    ----------
    model, data, config : dict
        Fingerprints of the model and of the corpus, and the options that decide bits. Values are JSON.
    slices : dict of str to int
        Samples in each slice.
    grown : dict of str to tuple of int
        Samples that a slice had before the corpus grew, each time, ascending. Segments do not cross these places.
    segment_size : int
        Samples per segment; the last one of a slice may be shorter.
    parameters : tuple of Parameter
        Every recorded tensor, model order.
    seed : int
        Of the dithering.
    max_live : int
        Live segments per slice that merging aims at while recording.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    config: dict[str, Any]
    slices: dict[str, int]
    segment_size: int
    parameters: tuple[Parameter, ...]
    seed: int = 0
    max_live: int = 3
    grown: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.segment_size < 1 or self.max_live < 1:
            raise ValueError(
                f"segment_size {self.segment_size} and max_live {self.max_live} must be 1 or more"
            )
        if any(count < 1 for count in self.slices.values()):
            raise ValueError(f"every slice needs at least one sample, got {self.slices}")
        object.__setattr__(self, "parameters", tuple(self.parameters))
        object.__setattr__(self, "grown", {name: tuple(ends) for name, ends in self.grown.items()})

    @property
    def version(self) -> int:
        """Of the store's layout."""
        return GROWN if self.grown else VERSION

    def parts(self, slice: str) -> list[tuple[int, int]]:
        """Half-open ranges of the slice's samples: what it began with, and what came each time it grew."""
        return list(pairwise([0, *self.grown.get(slice, ()), self.slices[slice]]))

    def leaves(self, slice: str) -> list[Segment]:
        """The slice's segments as they are dealt, in order."""
        return [leaf for part in self.parts(slice) for leaf in self.leaves_of(slice, part)]

    def leaves_of(self, slice: str, part: tuple[int, int]) -> list[Segment]:
        """The segments of one of the slice's `parts`."""
        size = self.segment_size
        return [Segment(slice, first, min(first + size, part[1])) for first in range(*part, size)]

    def grow(self, data: dict[str, Any], slices: dict[str, int]) -> Manifest:
        """The manifest of the same run with a corpus that has grown.

        Parameters
        ----------
        data : dict
            Fingerprint of the corpus.
        slices : dict of str to int
            Samples in each slice: those that were there, with as many or more, and new ones.
        """
        if any(slices.get(name, 0) < count for name, count in self.slices.items()):
            raise ValueError(f"a corpus of {self.slices} does not grow to {slices}")
        more = {name for name, count in self.slices.items() if slices[name] > count}
        grown = {
            name: (*self.grown.get(name, ()), count) for name, count in self.slices.items() if name in more
        }
        order = {name: slices[name] for name in (*self.slices, *sorted(slices.keys() - self.slices.keys()))}
        return replace(self, data=data, slices=order, grown={**self.grown, **grown})

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
        if not self.grown:
            del tree["grown"]
        return {**tree, "version": self.version}

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
        if tree.get("version") not in (VERSION, GROWN):
            raise InputError(
                f"the run has layout version {tree.get('version')}, this Tiny-ONN reads versions {VERSION} and "
                f"{GROWN}; record it anew"
            )
        try:
            known = {item.name: tree[item.name] for item in fields(cls) if item.name != "grown"}
            known["grown"] = tree.get("grown", {})
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
