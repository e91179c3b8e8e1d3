"""Files of a model's folder that go with the model into other folders, and from there to other people.

A symbolic link in a folder that somebody else packed could lead to any file of whoever publishes the result. Followed
are links inside the folder, and those of the hub's cache, whose snapshots are links into the blobs of the same
repository.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from tinyonn.errors import InputError

LOG = logging.getLogger(__name__)
TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*.model",
)
SETTINGS = ("config.json", "generation_config.json")
CARD = ("README.md",)  # the base's, for its licence
KINDS = frozenset(
    {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe"}
)  # of a tokenizer's files
SNAPSHOTS = "snapshots"  # in the hub's cache: `<repository>/snapshots/<commit>/`


def tokenizer_files(folder: Path) -> list[Path]:
    """A tokenizer's files in a folder, by the names that `transformers` gives them."""
    return [path for path in _named(folder, TOKENIZER) if path.suffix in KINDS]


def check_files(folder: Path, patterns: Iterable[str] = (*SETTINGS, *CARD, *TOKENIZER)) -> None:
    """Refuse a folder some of whose files may not be copied, before any work is done.

    Raises
    ------
    InputError
        As `copy_file`.
    """
    for path in _named(folder, patterns):
        if not path.is_dir():
            os.close(_opened(path))


def warn_of_links(folder: Path) -> None:
    """Say before a long work what will be refused after it: a tokenizer's or setting's file that may not be copied."""
    try:
        check_files(folder)
    except InputError as error:
        LOG.warning("%s; `tinyonn assemble` refuses the model as it is", error)


def check_regular(folder: Path, patterns: Iterable[str]) -> None:
    """Refuse pipes and devices among a folder's files: they would be read for ever, or do something.

    Raises
    ------
    InputError
        Names the file.
    """
    for path in _named(folder, patterns):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a dangling link; whoever needs the file will say so
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(f"{path} is no regular file; put the file itself there, or remove it")


def copy_file(path: Path, folder: Path) -> None:
    """Copy a file of a model's folder into another folder, under the same name.

    Raises
    ------
    InputError
        It is a link that leads out of its folder (for the hub's cache: out of its repository), or no regular file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with (
        os.fdopen(_opened(path), "rb") as source,
        os.fdopen(os.open(folder / path.name, flags, 0o666), "wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 22)


def _named(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    wanted = tuple(patterns)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if any(fnmatchcase(path.name, pattern) for pattern in wanted):
            yield path


def _opened(path: Path) -> int:
    """A descriptor of a file that may be copied; judged is what was opened, whatever lies at the path by then."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); put the file there, or remove it"
        ) from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise InputError(f"{path} is no regular file; put the file itself there, or remove it")
        place, root = _place(file, path), _root(path.parent)
        if root not in place.parents:
            raise InputError(
                f"{path} is a link to {place}, outside of the model's folder, and would be copied into what is "
                "published; put a copy of the file there if it belongs to the model, or remove the link"
            )
    except BaseException:
        os.close(file)
        raise
    return file


def _place(file: int, path: Path) -> Path:
    """Where an opened file lies, links resolved."""
    try:
        return Path(f"/proc/self/fd/{file}").readlink()
    except OSError:  # no Linux
        return Path(os.path.realpath(path))


def _root(folder: Path) -> Path:
    """The folder that links may not leave."""
    folder = Path(os.path.realpath(folder))
    snapshots = [parent for parent in folder.parents if parent.name == SNAPSHOTS]
    return snapshots[0].parent if snapshots else folder
