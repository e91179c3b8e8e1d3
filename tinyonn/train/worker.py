"""What every worker of a training does, alone or in a group: build, train, write the model.

Every worker loads student, teacher, corpus and targets for itself, from the same `Spec`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyonn.config import ModelConfig
from tinyonn.corpus.file import Corpus
from tinyonn.dense.load import load_model, load_tokenizer
from tinyonn.dense.source import model_folder
from tinyonn.errors import CapacityError, InputError
from tinyonn.experts.card import write_card
from tinyonn.experts.folder import read_settings
from tinyonn.files import line_of, write_json
from tinyonn.plan.usage import Meter, measured
from tinyonn.show.track import Tracker
from tinyonn.train.checkpoint import save_model
from tinyonn.train.monitor import Monitor
from tinyonn.train.routing import ProfileTargets, find_profiled
from tinyonn.train.samples import Workers
from tinyonn.train.spec import Spec, assembled_id, experts_of, read_student
from tinyonn.train.teacher import Cached, Live, Teacher, cache_key, cache_teacher, check_tokenizers
from tinyonn.train.trainer import Trainer

LOG = logging.getLogger(__name__)
CACHE = "teacher"  # in the training's folder
POLL = 2.0  # seconds between looks for a cache that another worker writes


def build_trainer(spec: Spec) -> Trainer:
    """Build all that a worker needs; resumes the newest checkpoint."""
    torch.set_num_threads(spec.threads)
    device = torch.device(spec.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        corpus = Corpus(Path(spec.corpus))
        return Trainer(
            build_student(spec, device),
            corpus,
            spec.train,
            spec.folder,
            build_teacher(spec, corpus, device),
            build_targets(spec, corpus),
            spec.identity,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise CapacityError(
            f"out of GPU memory on {device} ({str(error).splitlines()[0]}); use a smaller train.micro_batch, "
            "model.checkpointing: true or model.quantization: nf4"
        ) from None


def build_student(spec: Spec, device: torch.device) -> Any:
    """What is trained: an assembled model with its own or a new router, or a dense one without any."""
    from tinyonn.experts.folder import open_assembled

    folder = Path(spec.student)
    if not experts_of(read_student(folder)):
        plain = ModelConfig(path=str(folder), quantization="none", dtype=spec.model.dtype)
        return load_model(plain, device).model
    model = open_assembled(folder).to(device)
    if spec.router is not None:
        try:
            model.set_router(spec.router, spec.train.seed)
        except ValueError as error:
            raise InputError(str(error)) from None
    return model


def build_teacher(spec: Spec, corpus: Corpus, device: torch.device) -> Teacher | None:
    """The teacher or what is cached of it; None if no loss needs it."""
    if not spec.needs_teacher:
        return None
    check_tokenizers(load_tokenizer(ModelConfig(path=spec.student)), load_tokenizer(spec.teacher))
    if spec.teacher_k is None:
        return Live(load_model(spec.teacher, device).model)
    target = _teacher_folder(spec, corpus)
    first = Workers.found().first
    while (cached := _cached(target, warn=first)) is None and not first:
        time.sleep(POLL)  # no barrier: a large corpus takes longer than any of them waits
    if cached is not None:
        return cached
    teacher = Live(load_model(spec.teacher, device).model)
    return cache_teacher(teacher, corpus, target.parent, _taught_by(spec), spec.teacher_k)


def _cached(target: Path, warn: bool) -> Cached | None:
    """The teacher's cache, if it is complete and as it was written."""
    if not (target / "teacher.json").exists():
        return None
    try:
        return Cached(target)
    except InputError as error:
        if warn:
            LOG.warning("%s: what is damaged is made again", error)
        return None


def is_cached(spec: Spec, corpus: Corpus) -> bool:
    """Whether all of the teacher's likeliest tokens are on the disk already."""
    return (_teacher_folder(spec, corpus) / "teacher.json").exists()


def cached_bytes(spec: Spec, corpus: Corpus) -> int:
    """Bytes of the parts of the teacher's cache that lie there already."""
    parts = _teacher_folder(spec, corpus).glob("part-*.safetensors")
    return sum(path.stat().st_size for path in parts)


def _teacher_folder(spec: Spec, corpus: Corpus) -> Path:
    """Where the likeliest tokens of such a teacher on such a corpus are kept."""
    assert spec.teacher_k is not None
    return Path(spec.folder) / CACHE / cache_key(corpus, _taught_by(spec), spec.teacher_k)


def _taught_by(spec: Spec) -> str:
    return str(sorted(item for item in spec.identity.items() if item[0].startswith("teacher.")))


def build_targets(spec: Spec, corpus: Corpus) -> ProfileTargets | None:
    """What the profile wants of the router on samples of `corpus`; None if nothing asks for it."""
    from tinyonn.profile.profile import open_profile

    if not spec.needs_targets or spec.profile is None:
        return None
    profile = open_profile(spec.profile, assembled_id(read_student(Path(spec.student))))
    contribution_SE = profile.contribution[:, : profile.experts]
    indexes = find_profiled(profile, Path(spec.profile).parent / "corpus.arrow", corpus)
    per_E = None
    if spec.targets.per == "weights":
        sizes = read_student(Path(spec.student))["expert_sizes"]
        per_E = np.maximum(np.array(sizes[: profile.experts]), 1)
    elif spec.targets.per == "mean":
        per_E = contribution_SE.mean(0, dtype=np.float64)
    there = indexes >= 0
    return ProfileTargets(indexes[there].tolist(), contribution_SE[there], spec.targets.sharpness, per_E)


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
    """Train to the end, from the newest checkpoint on, and write the model."""
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
    with (folder / STARTS).open("a", encoding="utf-8") as file:
        start = {"step": trainer.step, "workers": trainer.workers.world, "step_seconds": seconds}
        file.write(line_of(start))
    tracker = Tracker(spec.track, folder, f"{folder.absolute().parent.name}-{folder.name}")
    try:
        monitor = Monitor(folder, tracker, spec.window, tell, trainer.shared, trainer.step)
        trainer.monitor, trainer.observe = monitor, observe
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
