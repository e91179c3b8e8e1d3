"""``tinyonn train``: distil the dense model into the assembled one, its router and its experts.

Data flow: assembled model, profile, corpus of the run → checks, memory → `Spec` → `train_loop` in this process, or in
every worker of a Ray Train group → checkpoints and steps in ``<run>/train`` → ``<run>/model``. Killed at any
moment and called again it goes on from the newest checkpoint; a second trainer on the same folder is refused.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyonn.config import Config
from tinyonn.corpus.file import Corpus
from tinyonn.dense.copies import TOKENIZER, check_files
from tinyonn.errors import InputError
from tinyonn.experts.folder import model_faults, read_settings
from tinyonn.files import read_derived, read_log, write_json
from tinyonn.places import local_folder
from tinyonn.show.sizes import format_size
from tinyonn.store.lock import RunLock
from tinyonn.train.checkpoint import Checkpoints, without_removed
from tinyonn.train.monitor import FILE, FORMER, HEAT_MAP, read_lines, steps_file
from tinyonn.train.plan import TrainStageOptions, make_spec, plan_disk, plan_training
from tinyonn.train.report import Follower, Progress, TrainReport, ends
from tinyonn.train.spec import Spec
from tinyonn.train.worker import STARTS, USE, train_loop
from tinyonn.workers.alive import Waiting
from tinyonn.workers.group import GroupOptions, run_group
from tinyonn.workers.ray import Places, take_places

__all__ = ["TrainStageOptions", "train_run"]

LOG = logging.getLogger(__name__)
DONE = "done.json"  # in the training's folder: what was trained to the end

Tell = Callable[[str], None]


def train_run(
    location: str,
    config: Config,
    options: TrainStageOptions,
    tell: Tell = lambda line: None,
) -> TrainReport:
    """Train an assembled run; may be killed at any moment and called again.

    Parameters
    ----------
    location : str
        The run's folder or ``s3://`` address.
    config : Config
        Its model is the teacher, its data are those of the run.
    options : TrainStageOptions
    tell : callable
        Gets what it needs, alarms and the last step as lines of text.

    Raises
    ------
    InputError
        Nothing is assembled; the profile is missing or of another assembly; student and teacher have different
        tokenizers; checkpoints of another training; a loss that is not a number any more.
    CapacityError
        It does not fit into memory or on the disk, or workers are lost again and again.
    StoreBusyError
        Another process trains into the folder, or changes the run.
    """
    started = time.monotonic()
    folder = (options.folder or local_folder(location) / "train").absolute()
    with RunLock(local_folder(location), shared=True, what="train"), RunLock(folder, what="train"):
        spec = make_spec(location, config, options)
        check_files(Path(spec.student), TOKENIZER)  # they go into the trained model
        if options.fresh:
            _forget(folder)
        stored = _stored(spec)
        if stored is not None:
            return TrainReport(**stored | {"location": location, "fresh": False})
        resumed, before = newest_step(folder), _starts(folder)
        with ExitStack() as stack:
            asked = options.address, options.workers, options.threads
            places = take_places(*asked, config, stack, options.train.batch, lambda: _held(folder))
            spec = replace(spec, device=places.device, threads=places.threads)
            plan, disk = plan_training(spec, places, options.memory), plan_disk(spec)
            tier, each = plan.tier, plan.worker_bytes
            largest = max(plan.worker, key=lambda need: need.bytes)
            tell(
                f"training needs {format_size(tier.total)} of {tier.name} for {places.sharing} worker(s), "
                f"{largest.what} {format_size(largest.bytes)} of each, and {format_size(disk)} of disk"
            )
            counts = spec.train.warm_start, spec.train.steps, resumed
            progress = Progress(*counts, tell, lambda: _step_seconds(folder))
            if places.address is None and places.workers == 1:
                with progress:
                    train_loop(spec, tell=tell, observe=progress)
            else:
                group = GroupOptions(places.workers, places.threads, places.device)
                since = f", going on from step {resumed}" if resumed else ""
                tell(f"starting {places.workers} worker(s) on {places.device}{since}")
                with progress, Follower(steps_file(folder), progress, tell):
                    waiting = Waiting(tell, lambda: _held(folder))
                    run_group(train_loop, spec, folder, group, lambda: newest_step(folder), tell, waiting)
        report = _report(location, spec, places, each, resumed, time.monotonic() - started)
        report = replace(
            report,
            restarts=max(0, _starts(folder) - before - 1),
            planned_rss_bytes=plan.bytes,
            planned_disk_bytes=disk,
        )
        write_json(folder / DONE, {"identity": _identity(spec), "report": report.figures()})
        return report


def newest_step(folder: Path) -> int:
    """Steps that the newest checkpoint holds; 0 without any."""
    return max((int(path.name.rpartition("-")[2]) for path in Checkpoints(folder, {}).paths()), default=0)


def _held(folder: Path) -> str:
    step = newest_step(folder)
    return f"the checkpoint of step {step} stays" if step else "there is no checkpoint yet"


def _identity(spec: Spec) -> dict[str, Any]:
    corpus = Corpus(Path(spec.corpus)).fingerprint
    tree = {**spec.identity, "corpus": corpus, **spec.train.deciding()}
    return dict(json.loads(json.dumps(tree)))


def _known(identity: Mapping[str, Any]) -> dict[str, Any]:
    """That says something, of options that there are."""
    return {name: value for name, value in without_removed(identity).items() if value is not None}


def _stored(spec: Spec) -> dict[str, Any] | None:
    """The report of the same training, if it came to its end and its model is there."""
    tree = read_derived(Path(spec.folder) / DONE)
    if tree is None:
        return None
    whole = (Path(spec.output) / "config.json").is_file() and tree["report"]["model"] == spec.output
    if not whole or _known(tree["identity"]) != _known(_identity(spec)):
        return None
    return None if _is_damaged(Path(spec.output)) else dict(tree["report"])


def _is_damaged(folder: Path) -> bool:
    """Whether a trained model is not as it was written; warns, naming the file."""
    try:
        read_settings(folder, "it is written again")
        faults = [f"{fault}; it is written again" for fault in model_faults(folder)]
    except InputError as error:
        faults = [str(error)]
    for fault in faults:
        LOG.warning("%s, from the last checkpoint", fault)
    return bool(faults)


def _forget(folder: Path) -> None:
    Checkpoints(folder, {}).clear()
    for name in (FILE, *FORMER, HEAT_MAP, DONE, STARTS, USE):
        (folder / name).unlink(missing_ok=True)


def _report(
    location: str, spec: Spec, places: Places, need: int, resumed: int, seconds: float
) -> TrainReport:
    folder = Path(spec.folder)
    lines = list(read_lines(folder / FILE))
    last = lines[-1]["values"] if lines else {}
    loads = {name: last[name] for name in ("load_cv", "load_dead", "load_entropy") if name in last}
    peak = int((read_derived(folder / USE) or {}).get("peak_bytes", 0))
    main = [line for line in lines if line["values"].get("stage", 1)]
    spent = sum(line["seconds"] for line in main)
    picture = folder / HEAT_MAP
    return TrainReport(
        location=location,
        folder=spec.folder,
        model=spec.output,
        steps=spec.train.warm_start + spec.train.steps,
        resumed=resumed,
        workers=places.workers,
        device=places.device,
        losses=ends(lines),
        loads=loads,
        active_weights=last.get("active_weights"),
        tokens=sum(line["tokens"] for line in main),
        tokens_per_second=sum(line["tokens"] for line in main) / spent if spent > 0 else 0.0,
        need_bytes=need,
        peak_worker_bytes=peak,
        alarms=[f"step {line['step']}: {alarm}" for line in lines for alarm in line.get("alarms", ())],
        pictures=[str(picture)] if picture.is_file() else [],
        train_seconds=seconds,
        fresh=True,
    )


def _starts(folder: Path) -> int:
    return sum(1 for _ in read_log(folder / STARTS))


def _step_seconds(folder: Path) -> float | None:
    """Of a step after the warm start, as the last start has tried."""
    seconds = [start.get("step_seconds") for start in read_log(folder / STARTS)]
    return float(seconds[-1]) if seconds and seconds[-1] is not None else None
