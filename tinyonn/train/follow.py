"""Progress of a training, told while it runs: of this process, or of another that writes the monitor's file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinyonn.files import NotSealedError, opened_text
from tinyonn.pace import Phase
from tinyonn.progress import Bar
from tinyonn.train.report import step_facts

POLL = 1.0  # seconds between looks at the file

Tell = Callable[[str], None]


class Progress:
    """Shows where a training stands, as a context manager: the warm start and the steps after it each at their speed.

    Parameters
    ----------
    warm_start, steps : int
        In all.
    resumed : int
        Steps that were done before, those of the warm start counted.
    tell : callable
        Gets the last step as a line.
    expected : callable
        Seconds of a step after the warm start as far as known before there was one.
    """

    def __init__(
        self,
        warm_start: int,
        steps: int,
        resumed: int,
        tell: Tell,
        expected: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._warm, self._last, self._tell, self._expected = warm_start, warm_start + steps, tell, expected
        before = min(resumed, warm_start), max(0, resumed - warm_start)
        warm = Phase("warm start", warm_start - before[0], before=before[0])
        main = Phase("steps", steps - before[1], before=before[1])
        self._main, self._resumed = main, resumed
        self._bar = Bar("training", [warm, main] if warm.total else [main], "steps")

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Take a line of the monitor."""
        step, seconds = line["step"], line["seconds"]
        if step == self._last:
            self._tell(f"step {step} of {step}: {step_facts(line)}")
        if self._bar.pace.phase.done == 0:
            self._bar.begin(seconds)  # before its first step it was loading
        if step <= self._warm:
            if self._main.expected is None and (tried := self._expected()):
                self._main.expected = 1 / tried
            self._bar.update(step - min(self._resumed, self._warm), note=step_facts(line))
            return
        if self._bar.pace.phase is not self._main:
            self._bar.enter(self._main.name, seconds)
        self._bar.update(step - max(self._resumed, self._warm), note=step_facts(line))


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
            try:
                tree = opened_text(line)
            except NotSealedError:
                continue  # who reads the whole file names it
            if tree["step"] <= self._step or silent:  # steps that are done again after a loss
                self._step = max(self._step, tree["step"])
                continue
            self._step = tree["step"]
            for alarm in tree.get("alarms", ()):
                self._tell(f"step {tree['step']}: {alarm}")
            self._progress(tree)
