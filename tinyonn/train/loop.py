"""What every worker of a training does, alone or in a group: build, train, write the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tinyonn.dense.source import model_folder
from tinyonn.experts.card import write_card
from tinyonn.experts.folder import read_settings
from tinyonn.files import line_of, write_json
from tinyonn.plan.usage import Meter, measured
from tinyonn.track import Tracker
from tinyonn.train.build import build_trainer
from tinyonn.train.monitor import Monitor, StepFacts
from tinyonn.train.save import save_model
from tinyonn.train.spec import Spec
from tinyonn.train.trainer import Trainer

STARTS = "starts.jsonl"  # in the training's folder: the step that every start went on from
USE = "use.json"  # in the training's folder: what the first worker used

Report = Callable[[Mapping[str, float]], None]
Tell = Callable[[str], None]
Observe = Callable[[Mapping[str, Any]], None]  # a line of the monitor


def train_loop(
    spec: Spec,
    report: Report = lambda metrics: None,
    tell: Tell = lambda line: None,
    observe: Observe = lambda line: None,
) -> None:
    """Train to the end, from the newest checkpoint on, and write the model.

    Parameters
    ----------
    spec : Spec
    report : callable
        Called by every worker after every checkpoint, with the step.
    tell : callable
        Gets alarms as sentences, on the first worker.
    observe : callable
        Gets every line of the monitor, on the first worker.

    Raises
    ------
    InputError
        Something does not fit, or a loss is not a number any more.
    CapacityError
        No memory on the GPU, or no space for a checkpoint.
    """
    with measured() as meter:
        _loop(spec, report, tell, observe, meter)


def _loop(spec: Spec, report: Report, tell: Tell, observe: Observe, meter: Meter) -> None:
    trainer = build_trainer(spec)
    if trainer.step:
        tell(f"going on from step {trainer.step} of {trainer.steps}")
    # Where it is the router alone that learns at first, only a try can tell how long the rest will take.
    seconds = trainer.rehearse() if 0 <= trainer.step < spec.train.warm_start else None
    if not trainer.workers.first:
        _train(trainer, report)
        trainer.workers.wait()  # the model is written
        return
    folder = Path(spec.folder)
    router = trainer.student.router
    shared = () if router is None else router.options.shared
    with (folder / STARTS).open("a", encoding="utf-8") as file:
        start = {"step": trainer.step, "workers": trainer.workers.world, "step_seconds": seconds}
        file.write(line_of(start))
    tracker = Tracker(spec.track, folder, f"{folder.absolute().parent.name}-{folder.name}")
    try:
        monitor = Monitor(folder, tracker, spec.window, tell, shared, trainer.step)

        def record(facts: StepFacts) -> None:
            monitor.record(facts)
            observe(monitor.line)

        trainer.observe = record
        try:
            _train(trainer, report)
        finally:
            monitor.close()
    finally:
        tracker.close()
    write_json(folder / USE, {"peak_bytes": peak_bytes(spec.device, meter)})
    save_model(trainer.student.model, spec.output, provenance(spec, trainer), spec.student)
    _write_card(spec)
    trainer.workers.wait()


def _write_card(spec: Spec) -> None:
    """Beside a model that was assembled from a run."""
    tree = read_settings(Path(spec.output), "train it again")
    if "report" in tree.get("assembly", {}):
        write_card(Path(spec.output), tree, model_folder(spec.model, weights=False))


def _train(trainer: Trainer, report: Report) -> None:
    """To the end, checkpoint by checkpoint."""
    every = trainer.options.checkpoint_every
    while trainer.step < trainer.steps:
        trainer.run(min(trainer.steps, (trainer.step // every + 1) * every))
        report({"step": float(trainer.step)})


def provenance(spec: Spec, trainer: Trainer) -> dict[str, Any]:
    """What the trained model says of its training."""
    return {
        "steps": trainer.step,
        "corpus": trainer.order.corpus.fingerprint,
        "workers": trainer.workers.world,
        "options": trainer.options.deciding(),
        **{f"of/{name}": value for name, value in spec.identity.items() if name != "router.branches"},
    }


def peak_bytes(device: str, meter: Meter) -> int:
    """Most memory that this worker had: of the GPU, or RAM."""
    if device == "cuda":
        return int(torch.cuda.max_memory_reserved())
    return meter.usage.peak
