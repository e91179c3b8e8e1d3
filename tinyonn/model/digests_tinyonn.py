"""Digests of a model's tensors and settings, where other programs pass over them; saved beside exported models.

A file of tensors (safetensors) has two entries more among its metadata:

    digests   JSON: CRC-32 of every tensor's bytes, eight hexadecimal digits, by name
    seal      ``blake2b:`` and 32 digits, of the header as canonical JSON without this entry: names, types, shapes,
              places, all other metadata, the digests

``config.json`` has ``digests``: by the name of a setting the BLAKE2b-128 of its value as canonical JSON (sorted keys,
no spaces, ASCII). Those of the library, such as ``dtype``, have none and may be changed.

CRC-32, because it finds every turned bit and every damage of up to 32 bits in a row, and all other in all but one of
four billion cases, at the speed of memory. Files without digests, of earlier versions or rewritten by other programs,
are read as they are. ``TINYONN_CHECK=off`` leaves out reading the tensors' bytes twice.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

LOG = logging.getLogger(__name__)
DIGESTS, SEAL, KIND = "digests", "seal", "blake2b:"
TOGETHER = "*"  # in the digests: of all settings that have none of their own
METADATA = "__metadata__"
SWITCH = "TINYONN_CHECK"
BLOCK = 1 << 22  # bytes read at a time
LONGEST = 100_000_000  # bytes of a header, the format's own limit
THREADS = 4
AGAIN = "fetch or assemble it again"


class Range(NamedTuple):
    """Bytes of a tensor in its file."""

    path: Path
    name: str
    first: int
    size: int
    digest: str


# Files of tensors


def read_header(path: str | Path) -> tuple[dict[str, Any], int]:
    """Header of a file of tensors, metadata as ``__metadata__``, and where the tensors' bytes begin.

    Raises
    ------
    ValueError
        It is truncated or damaged, or not as it was sealed; names the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= min(LONGEST, size - 8):
                raise ValueError(f"its header has {length} bytes")
            header = json.loads(stream.read(length))
        ends = sorted(entry["data_offsets"] for name, entry in header.items() if name != METADATA)
        last = 0
        for first, end in ends:
            if first != last or end < first:
                raise ValueError(f"its tensors do not follow each other at byte {last}")
            last = end
        if 8 + length + last != size:
            raise ValueError(f"it has {size} bytes, its header says {8 + length + last}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); {AGAIN}") from None
    _check_seal(path, header)
    return header, 8 + length


def _check_seal(path: Path, header: Mapping[str, Any]) -> None:
    metadata = header.get(METADATA) or {}
    if SEAL not in metadata and DIGESTS not in metadata:
        LOG.debug("%s has no digests: an earlier version or another program wrote it", path)
        return
    own = {name: value for name, value in metadata.items() if name != SEAL}
    if metadata.get(SEAL) != _digest({**header, METADATA: own}):
        raise ValueError(f"{path} is damaged (its header does not match its seal); {AGAIN}")


def sealed_metadata(
    entries: Mapping[str, Any], metadata: Mapping[str, str], digests: Mapping[str, str]
) -> dict[str, str]:
    """Metadata with digests and seal.

    Parameters
    ----------
    entries : mapping
        Of the header, by tensor: dtype, shape, data_offsets.
    metadata : mapping of str to str
    digests : mapping of str to str
        By tensor.
    """
    own = {**metadata, DIGESTS: json.dumps(dict(sorted(digests.items())), separators=(",", ":"))}
    own.pop(SEAL, None)
    return {**own, SEAL: _digest({**entries, METADATA: own})}


def digests_of(path: str | Path) -> dict[str, Range] | None:
    """Bytes and digest of every tensor of a file; None if it has no digests.

    Raises
    ------
    ValueError
        As `read_header`.
    """
    path = Path(path)
    header, start = read_header(path)
    metadata = header.get(METADATA) or {}
    if DIGESTS not in metadata:
        return None
    digests = json.loads(metadata[DIGESTS])
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != METADATA}
    return {
        name: Range(path, name, start + first, last - first, digests.get(name, ""))
        for name, (first, last) in places.items()
    }


def check_files(files: Iterable[str | Path], names: Sequence[str] | None = None) -> None:
    """Compare tensors on disk with their digests; headers always, the tensors unless ``TINYONN_CHECK=off``.

    Holds `THREADS` blocks of 4 MiB.

    Parameters
    ----------
    files : paths of safetensors files
    names : sequence of str, optional
        Read these tensors alone.

    Raises
    ------
    ValueError
        Names the first file that is damaged, and the tensor.
    """
    ranges: list[Range] = []
    for path in files:
        found = digests_of(path) or {}
        ranges += [one for name, one in found.items() if names is None or name in names]
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for one, digest in zip(ranges, pool.map(_crc_of_range, ranges), strict=True):
            if digest != one.digest:
                raise ValueError(
                    f"{one.path} is damaged (the values of {one.name} do not match their digest); {AGAIN}"
                )


def seal_file(path: str | Path, entries: Mapping[str, str] | None = None) -> None:
    """Give a safetensors file digests, and more metadata; the tensors stay as they are.

    The file is written anew beside itself and takes the old one's place whole.
    """
    path = Path(path)
    header, start = read_header(path)
    metadata = {**header.pop(METADATA, {}), **(entries or {})}
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    blank = sealed_metadata(header, metadata, dict.fromkeys(order, "0" * 8))
    text = header_text(header, blank)
    partial = path.with_name(path.name + ".partial")
    try:
        with path.open("rb") as source, partial.open("wb") as target:
            source.seek(start)
            target.seek(len(text))
            digests = {}
            for name in order:
                first, last = header[name]["data_offsets"]
                crc = 0
                for block in _blocks(source, last - first):
                    crc = zlib.crc32(block, crc)
                    target.write(block)
                digests[name] = f"{crc:08x}"
            final = header_text(header, sealed_metadata(header, metadata, digests))
            assert len(final) == len(text)
            target.seek(0)
            target.write(final)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def header_text(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Length and header as a file begins with them, padded so that tensors are aligned."""
    text = json.dumps({METADATA: dict(metadata), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def crc_of(content: Any) -> str:
    """Digest of a tensor's bytes.

    Parameters
    ----------
    content : bytes-like
    """
    return f"{zlib.crc32(content):08x}"


def _crc_of_range(one: Range) -> str:
    crc = 0
    try:
        with one.path.open("rb", buffering=0) as stream:
            stream.seek(one.first)
            for block in _blocks(stream, one.size):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        raise ValueError(f"{one.path} cannot be read ({error}); {AGAIN}") from None
    return f"{crc:08x}"


def _blocks(stream: Any, size: int) -> Iterator[memoryview]:
    """So many of the next bytes, in blocks that are overwritten by the next."""
    memory = memoryview(bytearray(min(BLOCK, size)))
    while size:
        count = stream.readinto(memory[: min(BLOCK, size)])
        if not count:
            raise OSError("the file ends too early")
        yield memory[:count]
        size -= count


# Settings


def sealed_settings(tree: Mapping[str, Any], free: Sequence[str]) -> dict[str, Any]:
    """JSON values with their digests.

    Parameters
    ----------
    tree : mapping
    free : sequence of str
        Keys that get none of their own but one together, ``*``, which is not compared by `check_settings`.
    """
    plain: dict[str, Any] = json.loads(json.dumps({name: tree[name] for name in tree if name != DIGESTS}))
    digests = {name: _digest(plain[name]) for name in plain if name not in free}
    return {**plain, DIGESTS: {**digests, TOGETHER: _free_digest(plain, free)}}


def free_settings_differ(tree: Mapping[str, Any], free: Sequence[str]) -> bool:
    """Whether settings without digests of their own are others than were written."""
    digests = tree.get(DIGESTS)
    return isinstance(digests, dict) and digests.get(TOGETHER, found := _free_digest(tree, free)) != found


def check_settings(tree: Mapping[str, Any], path: str | Path) -> None:
    """Compare settings with their digests; those that have none may be anything.

    Raises
    ------
    ValueError
        One has another value than was written; names the file and the key.
    """
    if DIGESTS not in tree:
        for name, value in tree.items():
            if isinstance(value, dict) and value and all(_is_digest(one) for one in value.values()):
                raise ValueError(f"{path} is damaged (its digests are called {name!r}); {AGAIN}")
        LOG.debug("%s has no digests: an earlier version wrote it", path)
        return
    digests = tree[DIGESTS] if isinstance(tree[DIGESTS], dict) else {}
    if not digests:
        raise ValueError(f"{path} is damaged (it says no digests); {AGAIN}")
    for name, digest in digests.items():
        if name == TOGETHER:
            continue
        if name not in tree or digest != _digest(tree[name]):
            raise ValueError(
                f"{path}: {name!r} is not what was written, by damage or by hand; {AGAIN}, or change it in Python and "
                f"save it with save_pretrained(), or take {DIGESTS!r} out of the file if you mean it"
            )


def _free_digest(tree: Mapping[str, Any], free: Sequence[str]) -> str:
    return _digest({name: tree[name] for name in free if name in tree})


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(KIND)


def _digest(tree: Any) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return KIND + blake2b(text.encode(), digest_size=16).hexdigest()
