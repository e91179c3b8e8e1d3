"""The streams that a person sees: what this package shows goes there, and what libraries print does not.

On a terminal sheets (`tinyonn.show.sheet`) and lines are as wide as it; elsewhere they are plain lines.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tinyonn.show.escape import visible
from tinyonn.show.sheet import wrap

if TYPE_CHECKING:
    from tinyonn.show.sheet import Sheet

_own: dict[str, TextIO] = {}  # streams of ours while those of the process are the libraries'


def stdout() -> TextIO:
    """Where reports go."""
    return _own.get("stdout", sys.stdout)


def stderr() -> TextIO:
    """Where progress and errors go."""
    return _own.get("stderr", sys.stderr)


@contextmanager
def kept_for_us(chatter: Path | None, as_json: bool) -> Iterator[None]:
    """Keep stdout and stderr for what this package shows; all else that is written there goes into a file.

    That is what libraries, native code and child processes print. Where the streams are not those of the process (in
    tests, in notebooks), they stay as they are.

    Parameters
    ----------
    chatter : Path or None
        Is appended to, and not left empty. With None it all goes to stderr where stdout is for JSON, and else where
        it would have gone.
    as_json : bool
        Reports go to stderr, so that stdout has the JSON line alone.
    """
    if not (_is_of_process(sys.stdout, 1) and _is_of_process(sys.stderr, 2)):
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            yield
        return
    _flush()
    saved = os.dup(1), os.dup(2)
    for name, number in (("stdout", saved[1 if as_json else 0]), ("stderr", saved[1])):
        like: TextIO = getattr(sys, "stderr" if as_json else name)
        _own[name] = os.fdopen(os.dup(number), "w", 1, like.encoding, "backslashreplace")
    if chatter is not None:
        target = os.open(chatter, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number in (1, 2):
            os.dup2(target, number)
        os.close(target)
    elif as_json:
        os.dup2(2, 1)
    try:
        yield
    finally:
        _flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        for stream in _own.values():
            with suppress(OSError):
                stream.close()
        _own.clear()
        with suppress(OSError):
            if chatter is not None and chatter.stat().st_size == 0:
                chatter.unlink()


def _is_of_process(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError, AttributeError):
        return False


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, *_own.values()):
        with suppress(OSError, ValueError):
            stream.flush()


def watched(stream: TextIO) -> bool:
    """Whether a person watches a stream on a terminal that can move its cursor and show colours."""
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    try:
        return stream.isatty() and not dumb and not os.environ.get("NO_COLOR")
    except ValueError:  # closed
        return False


def width_of(stream: TextIO) -> int | None:
    """Columns of the terminal behind a stream, None without one; ``COLUMNS`` decides if it is set."""
    try:
        if not stream.isatty():
            return None
        given = os.environ.get("COLUMNS", "")
        wide = int(given) if given.isdigit() else os.get_terminal_size(stream.fileno()).columns
        return wide or 80  # some that are no screens have no width
    except (OSError, ValueError):
        return None


suspended: Callable[[], AbstractContextManager[None]] = nullcontext  # takes a live line away meanwhile


def show(sheet: Sheet) -> None:
    """Print a sheet on stdout."""
    stream = stdout()
    width = width_of(stream)
    with suspended():
        if watched(stream):
            from rich.console import Console

            Console(file=stream, width=width, markup=False, emoji=False, highlight=False).print(
                sheet, crop=False
            )
        else:
            print(sheet.plain(width), file=stream, flush=True)


def complain(text: str) -> None:
    """Print a line on stderr, at a terminal broken at blanks."""
    stream = stderr()
    print("\n".join(wrap(visible(text), width_of(stream))), file=stream, flush=True)
