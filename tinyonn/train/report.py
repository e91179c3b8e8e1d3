"""What `tinyonn train` shows: its progress while it runs, a table and JSON values at its end.

A training that runs in other processes is followed by the file of its steps, which the first of them writes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyonn.files import NotSealedError, opened_text
from tinyonn.show.pace import Phase
from tinyonn.show.progress import Bar
from tinyonn.show.sheet import Sheet, whole
from tinyonn.show.sizes import format_count, format_seconds, format_size

ENDS = 20  # steps at the beginning and at the end that losses are averaged over
PARTS = ("kl", "ce", "hidden", "balance", "z", "profile")


@dataclass(frozen=True)
class TrainReport:
    """What a call of `train_run` did.

    Attributes
    ----------
    location, folder, model : str
        Of the run, of its training, of the trained model.
    steps, resumed : int
        Steps in all, and those that were done before this call.
    workers : int
    device : str
    losses : dict of str to [float, float]
        Loss and its parts, means over the first and the last steps, nats.
    loads : dict of str to float
        Of the last step's window: ``load_cv``, ``load_dead``, ``load_entropy``; empty without a router.
    active_weights : float or None
        Mean expert weights per token, core included.
    tokens : int
        Trained on, padding not counted.
    tokens_per_second : float
    need_bytes, peak_worker_bytes : int
        Memory as planned and as used, of a worker.
    planned_rss_bytes, planned_disk_bytes : int
        Of all workers on a machine together, and on the disk.
    alarms : list of str
    pictures : list of str
    fresh : bool
        False if there was nothing to do.
    restarts : int
        Times that this call's group was started again after a loss.
    """

    location: str
    folder: str
    model: str
    steps: int
    resumed: int
    workers: int
    device: str
    losses: dict[str, list[float]]
    loads: dict[str, float]
    active_weights: float | None
    tokens: int
    tokens_per_second: float
    need_bytes: int
    peak_worker_bytes: int
    alarms: list[str]
    pictures: list[str]
    train_seconds: float
    fresh: bool
    restarts: int = 0
    planned_rss_bytes: int = 0
    planned_disk_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> Sheet:
        """For people."""
        speed = f"{self.tokens_per_second:,.0f} tokens/s with {self.workers} worker(s) on {self.device}"
        lines = [
            f"{self.steps:,} steps, {self.tokens:,} tokens, {speed}",
            f"memory of a worker {format_size(self.peak_worker_bytes)}, planned {format_size(self.need_bytes)}",
        ]
        if self.active_weights is not None:
            lines.append(f"{format_count(self.active_weights)} expert weights active per token")
        if self.loads:
            lines.append(
                f"load of experts: variation {self.loads['load_cv']:.2f}, {self.loads['load_dead']:.0%} dead"
            )
        if not self.fresh:
            lines.append("nothing to do: trained already")
        elif self.resumed:
            lines.append(
                f"went on from step {self.resumed:,}; this call took {format_seconds(self.train_seconds)}"
            )
        else:
            lines.append(f"trained in {format_seconds(self.train_seconds)}")
        if self.restarts:
            lines.append(f"workers were lost {self.restarts} time(s)")
        lines += [f"alarm: {alarm}" for alarm in self.alarms[-3:]]
        sheet = Sheet(f"trained {whole(self.model)}", lines).text("loss").number("first steps", "last steps")
        for name, (first, last) in self.losses.items():
            sheet.add(name, f"{first:.4f}", f"{last:.4f}")
        return sheet


def step_facts(line: Mapping[str, Any]) -> str:
    """Losses and speed of a step of the monitor, for people."""
    values = line["values"]
    shown = [f"{name} {values[name]:.3f}" for name in ("loss", "kl", "ce") if values.get(name) is not None]
    if values.get("active_experts") is not None:
        shown.append(f"{values['active_experts']:.0f} experts on")
    if values.get("tokens_per_second"):
        shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(shown)


def ends(lines: Sequence[Mapping[str, Any]], count: int = ENDS) -> dict[str, list[float]]:
    """Loss and parts, means over the first and the last lines that have them; the warm start left out."""
    main = [line["values"] for line in lines if line["values"].get("stage", 1)]
    found = {}
    for name in ("loss", *PARTS):
        known = [values[name] for values in main if values.get(name) is not None]
        if known:
            few = max(1, min(count, len(known) // 4))
            found[name] = [math.fsum(part) / few for part in (known[:few], known[-few:])]
    return found


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
        Of ``steps.jsonl``. Lines that are there already are not told.
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
