"""The profile on disk: a Parquet dataset in parts, whole or not there, that any tool reads.

```
profile/manifest.json                              what it is a profile of; written first
profile/experts/slice=NAME/FIRST-LAST.parquet      sample, expert, act, grad, contribution, pull
profile/samples/slice=NAME/FIRST-LAST.parquet      sample, position, loss, tokens, labelled, prompt, excerpt
```

``sample`` is the row of the source; ``FIRST-LAST`` a half-open range of positions in the slice's stored order;
``expert`` counts the groups, the core last. A part's samples come last, so that a part is complete once they are there.
Samples that were set aside stand in the metadata ``set_aside`` of that file, as JSON.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinyonn.errors import InputError, StoreDamagedError, first_line
from tinyonn.files import damaged, read_json, write_json, write_whole
from tinyonn.profile.groups import Identity
from tinyonn.profile.measure import PartProfile

FORMAT = 1
PART = 32  # samples
MANIFEST = "manifest.json"
TABLES = ("experts", "samples")  # in the order in which they are written
STATISTICS = ("act", "grad", "contribution", "pull")
SET_ASIDE = b"set_aside"
GROUPS = b"groups"
DIGEST = b"digest"


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


class Dataset:
    """A profile's folder, for the one process that writes it.

    Parameters
    ----------
    folder : Path
    manifest : Manifest
        What is to be measured. Of the same groups, model and corpus a profile that is there goes on, with the larger
        number of samples.
    fresh : bool
        Begin anew, whatever is there.

    Raises
    ------
    InputError
        The folder holds a profile of something else.
    """

    def __init__(self, folder: Path, manifest: Manifest, fresh: bool = False) -> None:
        self.folder = folder
        stored = None if fresh else read_manifest(folder)
        if stored is not None and (difference := manifest.difference(stored)):
            raise InputError(
                f"{folder} holds a profile of something else ({difference}); give what it was measured with, "
                "or measure all of it again with --fresh"
            )
        if stored is None:
            (folder / MANIFEST).unlink(missing_ok=True)
            for table in TABLES:
                shutil.rmtree(folder / table, ignore_errors=True)
        else:
            taken = {name: max(count, stored.taken.get(name, 0)) for name, count in manifest.taken.items()}
            manifest = replace(manifest, taken=taken, part=stored.part)
        self.manifest = manifest
        if manifest != stored:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / MANIFEST, asdict(manifest), indent=1)
        self._drop_others()

    def missing(self) -> list[Part]:
        """Parts that are still to be measured."""
        return [p for p in self.manifest.parts if not holds(self.folder, p, self.manifest.groups.id)]

    def write(self, part: Part, found: PartProfile) -> None:
        """Write a part; once it returns, the part is on the disk."""
        write_part(self.folder, part, found, self.manifest.groups.id)

    def _drop_others(self) -> None:
        """Remove what was half written, and the shorter last parts of a profile that has grown."""
        ours = {part.path(self.folder, table) for part in self.manifest.parts for table in TABLES}
        for table in TABLES:
            for path in (self.folder / table).glob("slice=*/*"):
                if path not in ours:
                    path.unlink()


def write_part(folder: Path, part: Part, found: PartProfile, groups: str) -> None:
    """Write a part; once it returns, the part is on the disk."""
    known = {GROUPS: groups.encode()}
    _write_table(part.path(folder, "experts"), experts_table(found), known)
    known[SET_ASIDE] = json.dumps(found.set_aside).encode()
    _write_table(part.path(folder, "samples"), samples_table(found), known)


def holds(folder: Path, part: Part, groups: str) -> bool:
    """Whether a part is there, of these groups."""
    try:
        found = [pq.read_metadata(part.path(folder, table)).metadata or {} for table in TABLES]
    except (OSError, pa.ArrowException):
        return False
    return all(metadata.get(GROUPS) == groups.encode() for metadata in found)


def experts_table(found: PartProfile) -> pa.Table:
    """A row for every sample and group."""
    samples = found.samples
    groups = samples[0].totals.act.size if samples else 0
    columns: dict[str, Any] = {
        "sample": pa.array(np.repeat([sample.index for sample in samples], groups), pa.int64()),
        "expert": pa.array(np.tile(np.arange(groups), len(samples)), pa.int16()),
    }
    for name, kind in zip(STATISTICS, (pa.int64(), pa.int64(), pa.float64(), pa.float64()), strict=True):
        parts = [getattr(sample.totals, name) for sample in samples]
        columns[name] = pa.array(np.concatenate(parts) if parts else [], kind)
    return pa.table(columns)


def samples_table(found: PartProfile) -> pa.Table:
    """A row for every sample."""
    kinds = {
        "index": pa.int64(),
        "position": pa.int64(),
        "loss": pa.float64(),
        "tokens": pa.int32(),
        "labelled": pa.int32(),
        "prompt": pa.int32(),
        "excerpt": pa.string(),
    }
    table = {name: pa.array([getattr(s, name) for s in found.samples], kind) for name, kind in kinds.items()}
    return pa.table(table).rename_columns({"index": "sample"})


def read_part(folder: Path, part: Part, groups: int) -> tuple[pa.Table, dict[str, Any], dict[int, str]]:
    """Samples, statistics by name as arrays [samples, groups], and what was set aside.

    Raises
    ------
    StoreDamagedError
        A file is damaged; names it.
    """
    samples, experts = (_read_table(part.path(folder, table)) for table in ("samples", "experts"))
    aside = json.loads((samples.schema.metadata or {}).get(SET_ASIDE, b"{}"))
    wanted = np.repeat(_values(samples, "sample"), groups)
    rows = _values(experts, "expert")
    if not (
        np.array_equal(_values(experts, "sample"), wanted)
        and np.array_equal(rows, np.tile(np.arange(groups), len(samples)))
    ):
        raise _damaged(part.path(folder, "experts"), f"its rows are not those of {len(samples)} samples")
    arrays = {name: _values(experts, name).reshape(len(samples), groups) for name in STATISTICS}
    return samples, arrays, {int(index): str(reason) for index, reason in aside.items()}


def _values(table: pa.Table, name: str) -> Any:
    return table.column(name).to_numpy()


def _read_table(path: Path) -> pa.Table:
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, first_line(error)) from None
    metadata = dict(table.schema.metadata or {})
    digest = metadata.pop(DIGEST, None)  # earlier versions wrote none
    if digest is not None and digest != _digest(table, metadata):
        raise _damaged(path, "its content does not match its digest")
    return table


def _digest(table: pa.Table, metadata: Mapping[bytes, bytes]) -> bytes:
    """BLAKE2b-128 over the names, the values and what the metadata say; pages have checksums, their footer has none."""
    found = blake2b(digest_size=16)
    for name in sorted(name for name in metadata if name in (GROUPS, SET_ASIDE)):
        found.update(name + b"=" + metadata[name] + b"\n")
    for name, column in zip(table.column_names, table.columns, strict=True):
        found.update(f"{name}:{column.type}:{len(column)}\n".encode())
        if pa.types.is_string(column.type):
            found.update(json.dumps(column.to_pylist()).encode())
        else:
            found.update(column.to_numpy().tobytes())
    return found.hexdigest().encode()


def _damaged(path: Path, reason: str) -> StoreDamagedError:
    return StoreDamagedError(f"{path} is damaged ({reason}); delete it and run `tinyonn profile` again")


def _write_table(path: Path, table: pa.Table, metadata: dict[bytes, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata({**metadata, DIGEST: _digest(table, metadata)})
    write_whole(path, lambda side: pq.write_table(table, side, compression="zstd", write_page_checksum=True))
