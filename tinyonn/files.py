"""Files that are written whole or not at all and say whether they are what was written; folders of one user alone.

A sealed JSON object has one key more, ``digest``: ``blake2b:`` and 32 hexadecimal digits, the BLAKE2b-128 of the other
keys as canonical JSON (sorted keys, no spaces, ASCII). Any reader of JSON reads it; `read_json` checks it. Objects
without a digest, which earlier versions wrote, are read as they are. A line of JSON in a log is sealed alike.

What other programs read and write has no digest of its own: ``digests.json``, a sealed object, lists the CRC-32 of
every file of its folder, eight hexadecimal digits, by name. A folder without it, of an earlier version, is taken as it
is; so is a file that it does not list.

A run's folder is its user's alone: it holds texts. So is the scratch folder in which Ray and Dask put their sockets,
logs and spilled objects: they open their own folders to everybody, and whoever may write there can put a symbolic link
in the way of a log.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tinyonn.errors import InputError, StoreDamagedError

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


SEALS = "digests.json"


def seal_folder(folder: Path, files: Iterable[Path]) -> None:
    """Write the digests of files that lie in a folder."""
    write_json(folder / SEALS, {"crc32": {path.name: _digest(path) for path in sorted(files)}}, indent=1)


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
            f"{fault}; {remedy}, or delete {folder / SEALS} if you have changed the file yourself"
        )


def folder_fault(folder: Path) -> str | None:
    """What `check_folder` finds, in words; None if all is well."""
    try:
        digests = read_json(folder / SEALS, "the folder is made again").get("crc32")
    except FileNotFoundError:
        LOG.debug("%s has no %s: an earlier version wrote it", folder, SEALS)
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


PRIVATE = 0o700
OTHERS = 0o077  # bits of a mode that give anything to anybody else
OWNER = "owner"  # in a scratch folder: locked as long as its process lives
SOCKET_BYTES = 107  # of a unix socket's path on Linux
BELOW = 70  # bytes of such a path below a scratch folder: Ray's `/r/session_<time>_<process>/sockets/plasma_store.1`
UNOWNED_SECONDS = 600.0  # after which a scratch folder without an owner's file counts as left over
TRIES = 20  # to remove a folder whose processes are still ending


def make_private(folder: Path) -> None:
    """Make a folder that its owner alone can enter; one that is there keeps its mode.

    Raises
    ------
    OSError
        It cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(PRIVATE, exist_ok=True)


def open_to_others(folder: Path) -> bool:
    """Whether other users may enter, list or change a folder; False if it is not there."""
    try:
        return bool(folder.stat().st_mode & OTHERS)
    except OSError:
        return False


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder, 0700, with a path short enough for sockets; left-over ones of dead processes are removed.

    It is removed at the end; after an error it stays for whoever looks for the cause, until the next call.

    Raises
    ------
    InputError
        There is no folder for it that others cannot rename things in.
    """
    parent = _parent()
    remove_left_over(parent)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(), dir=parent))  # 0700 and a name nobody can foresee
    new = folder / f"{OWNER}.new"
    owner = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(folder / OWNER)  # locked before anybody asks for it
        yield folder
    except Exception:
        LOG.debug("what was left in %s stays there until the next stage needs such a folder", folder)
        raise
    except BaseException:
        _remove(folder)
        raise
    else:
        _remove(folder)
    finally:
        os.close(owner)


def remove_left_over(parent: Path) -> None:
    """Remove this user's scratch folders below `parent` whose process has ended."""
    for path in parent.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and _abandoned(path):
                LOG.debug("removing %s, left over from a process that has ended", path)
                shutil.rmtree(path, ignore_errors=True)  # follows no links


def _abandoned(folder: Path) -> bool:
    try:
        owner = os.open(folder / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return time.time() - folder.stat().st_mtime > UNOWNED_SECONDS
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(owner)
    return True


def _prefix() -> str:
    return f"tinyonn-{os.geteuid()}-"


def _parent() -> Path:
    """The first folder for temporary files that is short and safe."""
    longest = SOCKET_BYTES - BELOW - len(f"/{_prefix()}") - 8  # mkdtemp's own letters
    asked = [os.environ.get(name) for name in ("RAY_TMPDIR", "TMPDIR", "XDG_RUNTIME_DIR")]
    refused = []
    for name in (*filter(None, asked[:2]), "/tmp", "/var/tmp", *filter(None, asked[2:])):
        path = Path(name).absolute()
        reason = f"longer than {longest} bytes" if len(os.fsencode(path)) > longest else _unsafe(path)
        if reason is None:
            return path
        refused.append(f"{path} is {reason}")
    raise InputError(
        f"there is no folder for Ray's and Dask's sockets: {'; '.join(refused)}; set TMPDIR to a short folder of "
        "your own"
    )


def _unsafe(path: Path) -> str | None:
    """Why a folder is no place for a private one below it: others could rename that."""
    try:
        found = path.stat()
    except OSError as error:
        return f"not there ({error.strerror})"
    if not stat.S_ISDIR(found.st_mode) or not os.access(path, os.W_OK | os.X_OK):
        return "not writable"
    sticky = bool(found.st_mode & stat.S_ISVTX)
    if found.st_uid not in (0, os.geteuid()) and not (sticky and found.st_uid == _unmapped()):
        return f"another user's (user {found.st_uid})"
    if found.st_mode & 0o022 and not sticky:
        return "writable by others without the sticky bit"
    return None


def _unmapped() -> int:
    """The user that a file of a user who does not exist here has: in a sandbox, root's."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text("ascii"))
    except (OSError, ValueError):
        return 65534


def _remove(folder: Path) -> None:
    """Remove a folder that processes may still be writing into while they end."""
    for _ in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
    LOG.debug("%s cannot be removed yet; the next stage that needs one will", folder)
