"""The two Parquet files of a part: written beside, synced and renamed; read with their checksums."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinyonn.errors import StoreDamagedError
from tinyonn.files import write_whole
from tinyonn.profile.kernel import Totals
from tinyonn.profile.manifest import TABLES, Part

STATISTICS = ("act", "grad", "contribution", "pull")
SET_ASIDE = b"set_aside"
GROUPS = b"groups"
DIGEST = b"digest"


@dataclass(frozen=True)
class SampleProfile:
    """One sample.

    Attributes
    ----------
    index, position : int
        Row of the source, place in the slice's stored order.
    loss : float
        Mean over the labelled tokens, nats.
    tokens, labelled, prompt : int
        All; those that the loss is taken on; those from which gates are chosen.
    excerpt : str
        Its first characters.
    totals : Totals
        By group.
    """

    index: int
    position: int
    loss: float
    tokens: int
    labelled: int
    prompt: int
    excerpt: str
    totals: Totals


@dataclass(frozen=True)
class PartProfile:
    """What was measured of a part; `set_aside` is reason by index."""

    samples: tuple[SampleProfile, ...]
    set_aside: dict[int, str]


def write_part(folder: Path, part: Part, found: PartProfile, groups: str) -> None:
    """Write a part; once it returns, the part is on the disk.

    Parameters
    ----------
    folder : Path
    part : Part
    found : PartProfile
    groups : str
        Id of the groups, for the files' metadata.
    """
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
        raise _damaged(path, str(error).splitlines()[0]) from None
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
