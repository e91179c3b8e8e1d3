"""Files that are written whole or not at all, and JSON that says whether it is what was written.

A sealed JSON object has one key more, ``digest``: ``blake2b:`` and 32 hexadecimal digits, the BLAKE2b-128 of the other
keys as canonical JSON (sorted keys, no spaces, ASCII). Any reader of JSON reads it; `read_json` checks it. Objects
without a digest, which earlier versions wrote, are read as they are. A line of JSON in a log is sealed alike.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tinyonn.errors import StoreDamagedError

LOG = logging.getLogger(__name__)
KEY = "digest"
KIND = "blake2b:"
BYTES = 16  # of a digest


class NotSealedError(ValueError):
    """Text that is not the JSON object that was sealed; says what is wrong."""


def write_whole(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file beside its place, bring it to the disk and rename it: a kill leaves the old one or the new one.

    Parameters
    ----------
    path : Path
        Its folder is there.
    content : bytes, str or callable
        Text is written as UTF-8; a callable gets the path to write to.

    Raises
    ------
    OSError
        It cannot be written; what was there before stays.
    """
    side = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        if callable(content):
            content(side)
        else:
            side.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(side)
        side.replace(path)
    finally:
        side.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def file_checksum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    found = 0
    with path.open("rb") as stream:
        while part := stream.read(1 << 22):
            found = zlib.crc32(part, found)
    return found


def digest_of(tree: Mapping[str, Any]) -> str:
    """Digest of JSON values that came out of `json.loads`, their key ``digest`` left out."""
    others = {name: value for name, value in tree.items() if name != KEY}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    return KIND + blake2b(text.encode(), digest_size=BYTES).hexdigest()


def sealed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same JSON object with its digest, as the last key."""
    assert KEY not in tree
    plain: dict[str, Any] = json.loads(json.dumps(dict(tree)))
    return {**plain, KEY: digest_of(plain)}


def opened(tree: Any, what: object = None) -> dict[str, Any]:
    """A JSON object without its digest, which must fit.

    Parameters
    ----------
    tree : JSON values
    what : object, optional
        Its name, for the log, where an earlier version wrote no digest.

    Raises
    ------
    NotSealedError
        It is no object, or not the one that was sealed.
    """
    if not isinstance(tree, dict):
        raise NotSealedError(f"a JSON object was expected, there is a {type(tree).__name__}")
    if KEY not in tree:
        # A digest under another name was hit itself.
        if any(isinstance(value, str) and value.startswith(KIND) for value in tree.values()):
            raise NotSealedError("its digest has another name")
        if what is not None:
            LOG.debug("%s has no digest: an earlier version wrote it", what)
        return tree
    if tree[KEY] != digest_of(tree):
        raise NotSealedError("its content does not match its digest")
    return {name: value for name, value in tree.items() if name != KEY}


def opened_text(text: bytes, what: object = None) -> dict[str, Any]:
    """`opened`, of bytes that should be UTF-8 and JSON."""
    try:
        tree = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise NotSealedError(f"it is not JSON: {error}") from None
    return opened(tree, what)


def write_json(path: Path, tree: Mapping[str, Any], indent: int | None = None) -> None:
    """Write a JSON object with its digest, whole or not at all."""
    write_whole(path, json.dumps(sealed(tree), indent=indent))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote, without its digest.

    Parameters
    ----------
    path : Path
    remedy : str
        What to do where it is damaged, such as ``delete it and search again``.

    Raises
    ------
    FileNotFoundError
        There is none.
    StoreDamagedError
        It cannot be read, or is not what was written; names the file.
    """
    try:
        return opened_text(path.read_bytes(), path)
    except FileNotFoundError:
        raise
    except (OSError, NotSealedError) as error:
        raise damaged(path, error, remedy) from None


def read_derived(path: Path) -> dict[str, Any] | None:
    """Read a sealed JSON object that can be made again: None if there is none, or, with a warning, a damaged one."""
    try:
        return read_json(path, "it is made again")
    except FileNotFoundError:
        return None
    except StoreDamagedError as error:
        LOG.warning("%s", error)
        return None


def line_of(tree: Mapping[str, Any]) -> str:
    """A sealed line of a log."""
    return json.dumps(sealed(tree), separators=(",", ":")) + "\n"


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log, without their digests; of no file none.

    A damaged line is left out, and a warning names it. So is, without a warning, a last line that a kill left
    unfinished.
    """
    with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                tree = opened_text(line, path if number == 1 else None)
            except NotSealedError as error:
                if line.endswith(b"\n") or _ends(line):
                    LOG.warning("%s: line %d is damaged (%s) and is left out", path, number, error)
                continue
            yield tree


def damaged(path: Path, reason: object, remedy: str) -> StoreDamagedError:
    """The error for a file that is not what was written."""
    return StoreDamagedError(f"{path} is damaged ({reason}); {remedy}")


def _ends(line: bytes) -> bool:
    """Whether an object is whole in a line: then what follows it was the line's end."""
    try:
        json.JSONDecoder().raw_decode(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return False
    return True
