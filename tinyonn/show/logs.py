"""Logs: everything into a rotating file of the run, the short of it onto the console (stderr).

What libraries print goes into a file beside it.
"""

from __future__ import annotations

import contextlib
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType

from tinyonn.errors import InputError
from tinyonn.files import make_private, open_to_others
from tinyonn.show.escape import visible
from tinyonn.show.progress import print_line

FILE_BYTES = 5_000_000
FILES = 4
FORMAT = "%(asctime)s %(levelname)-7s %(process)d %(name)s: %(message)s"


class _Formatter(logging.Formatter):
    """A message is one line, whatever stands in it; tracebacks keep theirs."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line."""
        return visible(super().formatMessage(record))

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """The traceback."""
        return visible(super().formatException(ei), lines=True)


class _Console(logging.Handler):
    """Prints messages above the live line, or as plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        try:
            print_line(self.format(record))
        except Exception:  # as every handler: what cannot be told must not end the work
            self.handleError(record)


def setup_logging(folder: str | Path, name: str, console: bool = True) -> Path:
    """Send the messages of ``logging.getLogger("tinyonn")`` and below to a file and to the console.

    A second call takes the place of the first. The file holds all from DEBUG upwards and is rotated at 5 MB
    (three old ones are kept); the console shows the messages alone, from INFO upwards.

    Parameters
    ----------
    folder : str or Path
        The run's ``logs`` folder; made when missing, and a new run's for its owner alone.
    name : str
        Stage or actor; the file is ``<name>.log``.
    console : bool
        False for actors, whose driver speaks for them.

    Returns
    -------
    Path
        The log file.

    Raises
    ------
    InputError
        The folder cannot be written to.
    """
    path = Path(folder) / f"{name}.log"
    try:
        make_private(path.parent.parent)
        path.parent.mkdir(exist_ok=True)
        file = RotatingFileHandler(path, maxBytes=FILE_BYTES, backupCount=FILES - 1, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path.parent}: no log can be written there ({error.strerror}); choose another storage.root"
        ) from None
    close_logging()
    logging.raiseExceptions = False  # a log that cannot be written must not fill the console with tracebacks
    file.setFormatter(_Formatter(FORMAT))
    ours = logging.getLogger("tinyonn")
    ours.setLevel(logging.DEBUG)
    ours.propagate = False
    ours.addHandler(file)
    if console:
        handler = _Console()
        handler.setLevel(logging.INFO)
        handler.setFormatter(_Formatter("%(message)s"))
        ours.addHandler(handler)
    if open_to_others(path.parent.parent):
        ours.debug("%s can be entered by other users: chmod 700 closes it", path.parent.parent)
    return path


def chatter_file(folder: str | Path, name: str) -> Path:
    """The file beside ``<name>.log`` for what libraries print; begun anew when it is large."""
    path = Path(folder) / f"{name}.libraries.log"
    with contextlib.suppress(OSError):
        if path.stat().st_size > FILE_BYTES:
            path.unlink()
    return path


def close_logging() -> None:
    """Close what `setup_logging` opened."""
    logger = logging.getLogger("tinyonn")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        with contextlib.suppress(
            OSError
        ):  # a full disk: what could not be written is lost, and said elsewhere
            handler.close()
