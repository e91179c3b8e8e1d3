"""Progress of a training, told while it runs: of this process, or of another that writes the monitor's file."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinyonn.train.report import progress_line

PACE = 10.0  # seconds between lines of progress
POLL = 1.0  # seconds between looks at the file

Tell = Callable[[str], None]


class Progress:
    """Tells where a training stands: at its first step, its last, and every few seconds between.

    Parameters
    ----------
    steps : int
        In all.
    tell : callable
    pace : float
        Seconds.
    """

    def __init__(self, steps: int, tell: Tell, pace: float = PACE) -> None:
        self.steps, self._tell, self._pace = steps, tell, pace
        self._last = float("-inf")

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Take a line of the monitor."""
        if time.monotonic() - self._last >= self._pace or line["step"] == self.steps:
            self._last = time.monotonic()
            self._tell(progress_line(line, self.steps))


class Follower:
    """Reads what another process appends to a monitor's file, as a context manager.

    Parameters
    ----------
    path : Path
        Of ``monitor.jsonl``. Lines that are there already are not told.
    progress : Progress
    tell : callable
        Gets the alarms.
    """

    def __init__(self, path: Path, progress: Progress, tell: Tell) -> None:
        self._path, self._progress, self._tell = path, progress, tell
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)
        self._state: tuple[int, int] = (0, 0)  # inode and bytes read
        self._step = 0
        self._read(silent=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._read()

    def _follow(self) -> None:
        while not self._ended.wait(POLL):
            self._read()

    def _read(self, silent: bool = False) -> None:
        """Take the whole lines that are new; a file that was replaced is read from its start."""
        try:
            with self._path.open("rb") as file:
                inode, place = self._path.stat().st_ino, self._state[1]
                file.seek(place if inode == self._state[0] else 0)
                place = file.tell()
                text = file.read()
        except OSError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._state = (inode, place + len(whole))
        for line in whole.splitlines():
            tree = json.loads(line)
            if tree["step"] <= self._step or silent:  # steps that are done again after a loss
                self._step = max(self._step, tree["step"])
                continue
            self._step = tree["step"]
            for alarm in tree.get("alarms", ()):
                self._tell(f"step {tree['step']}: {alarm}")
            self._progress(tree)
