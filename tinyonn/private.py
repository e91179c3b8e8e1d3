"""Folders that no other user of the machine can enter.

A run's folder is one: it holds texts. So is the scratch folder in which Ray and Dask put their sockets, logs and
spilled objects: they open their own folders to everybody, and whoever may write there can put a symbolic link in the
way of a log.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tinyonn.errors import InputError

LOG = logging.getLogger(__name__)
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
