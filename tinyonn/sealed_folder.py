"""A folder whose files are listed with their digests: what other programs read and write has none of its own.

``digests.json`` is a sealed object: CRC-32 of every listed file, eight hexadecimal digits, by name. A folder without
it, of an earlier version, is taken as it is; so is a file that it does not list.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from tinyonn.errors import InputError, StoreDamagedError
from tinyonn.files import file_checksum, read_json, write_json

LOG = logging.getLogger(__name__)
FILE = "digests.json"


def seal_folder(folder: Path, files: Iterable[Path]) -> None:
    """Write the digests of files that lie in a folder."""
    write_json(folder / FILE, {"crc32": {path.name: _digest(path) for path in sorted(files)}}, indent=1)


def check_folder(folder: Path, remedy: str) -> None:
    """Compare a folder's files with their digests.

    Parameters
    ----------
    folder : Path
    remedy : str
        What to do, such as ``assemble it again``.

    Raises
    ------
    InputError
        Names the first file that is missing or not what was written.
    """
    if fault := folder_fault(folder):
        raise InputError(
            f"{fault}; {remedy}, or delete {folder / FILE} if you have changed the file yourself"
        )


def folder_fault(folder: Path) -> str | None:
    """What `check_folder` finds, in words; None if all is well."""
    try:
        digests = read_json(folder / FILE, "the folder is made again").get("crc32")
    except FileNotFoundError:
        LOG.debug("%s has no %s: an earlier version wrote it", folder, FILE)
        return None
    except StoreDamagedError as error:
        return str(error).rpartition(";")[0]
    for name, digest in (digests or {}).items():
        path = folder / name
        try:
            if _digest(path) != digest:
                return f"{path} is not what was written: its content does not match its digest"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})"
    return None


def _digest(path: Path) -> str:
    return f"{file_checksum(path):08x}"
