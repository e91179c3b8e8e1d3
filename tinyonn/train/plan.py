"""What a training is to be made of, before anything is loaded: its spec, its places, its memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyonn.checks import check_teacher, fitting
from tinyonn.checks import experts_of as configured_experts
from tinyonn.config import Config
from tinyonn.corpus.corpus import is_corpus_of, prepare_corpus
from tinyonn.corpus.file import Corpus
from tinyonn.dense.load import load_tokenizer
from tinyonn.dense.source import fingerprint_model
from tinyonn.errors import InputError
from tinyonn.places import local_folder
from tinyonn.plan.demands import Need, Tier
from tinyonn.plan.facts import describe_model
from tinyonn.plan.training import (
    CACHED,
    SYSTEM,
    StudentFacts,
    check_disk,
    check_needs,
    disk_needs,
    router_weights,
    train_needs,
    written,
)
from tinyonn.train.checkpoint import Checkpoints
from tinyonn.train.options import (
    LossWeights,
    OptimizerOptions,
    RoutingOptions,
    StageOptions,
    TrainOptions,
)
from tinyonn.train.spec import (
    RouterShape,
    Spec,
    TargetOptions,
    assembled_id,
    experts_of,
    identity_of,
    read_student,
)
from tinyonn.train.worker import cached_bytes, is_cached
from tinyonn.workers.ray import Places

TEACHER_FINGERPRINT = "teacher-fingerprint.json"  # in the run's folder, if another model teaches


@dataclass(frozen=True)
class TrainStageOptions:
    """A call of `train_run`. Only `train`, `router`, `targets`, `student` and `teacher_k` decide what comes out.

    Attributes
    ----------
    train : TrainOptions
    router : RouterShape or None
        Of a new router; None keeps the one that the student has, or trains without.
    targets : TargetOptions
    teacher_k : int or None
        So many of the teacher's likeliest tokens are cached on disk; None runs it at every step.
    student, folder, output : Path, optional
        What is trained, where checkpoints lie and where the model goes: by default ``experts``, ``train`` and
        ``model`` in the run's folder.
    workers : int or None
        None is one in this process, or on a cluster one for each GPU, or for each machine if there is none.
    threads : int or None
        CPU threads of a worker; None takes a machine's.
    address : str or None
        Of a Ray cluster; see `tinyonn.workers.ray.cluster_address`.
    memory : int or None
        Bytes that may be used; None is what is free.
    window : int
        Steps that the monitor looks back on.
    fresh : bool
        Forget the checkpoints.
    """

    train: TrainOptions
    router: RouterShape | None = field(default_factory=RouterShape)
    targets: TargetOptions = field(default_factory=TargetOptions)
    teacher_k: int | None = None
    student: Path | None = None
    folder: Path | None = None
    output: Path | None = None
    workers: int | None = None
    threads: int | None = None
    address: str | None = None
    memory: int | None = None
    window: int = 50
    fresh: bool = False


def make_spec(location: str, config: Config, options: TrainStageOptions) -> Spec:
    """What the workers build from; checks what can be checked without loading a model."""
    run = local_folder(location).absolute()
    student = (options.student or run / "experts").absolute()
    tree = read_student(student)
    experts = experts_of(tree)
    output = (options.output or run / "model").absolute()
    _check_output(output)
    if config.train.teacher_model is not None:
        own, other = (describe_model(model)[1] for model in (config.model, config.train.teacher_model))
        check_teacher(options.train.weights.hidden, own, other)
    corpus = training_corpus(config, run)
    router, targets = None, None
    train = options.train
    wants_targets = train.warm_start > 0 or train.weights.profile > 0
    if experts and (options.router is not None or wants_targets):
        from tinyonn.profile.profile import open_profile

        profile = open_profile(run / "profile", assembled_id(tree))
        targets = options.targets if wants_targets else None
        if options.router is not None:
            router = options.router.options(profile, train.prompt_tokens).tree()
            _check_taught(train)
    teacher, taught_by = config.train.teacher_model or config.model, None
    if train.weights.kl > 0 or train.weights.hidden > 0:
        known = run / ("fingerprint.json" if teacher == config.model else TEACHER_FINGERPRINT)
        taught_by = fingerprint_model(teacher, known) | teacher.model_dump(include={"quantization", "dtype"})
    return Spec(
        folder=str((options.folder or run / "train").absolute()),
        student=str(student),
        model=config.model,
        teacher=teacher,
        corpus=str(corpus.path.absolute()),
        profile=str(run / "profile") if targets is not None else None,
        router=router,
        train=train,
        output=str(output),
        targets=options.targets,
        teacher_k=options.teacher_k,
        identity={**identity_of(tree, taught_by, router, targets), "teacher_k": options.teacher_k},
        track=config.track,
        window=options.window,
    )


def _check_taught(train: TrainOptions) -> None:
    """Refuse a new router that nothing would teach."""
    held = train.optimizers.router_lr == 0 and train.optimizers.router != "frozen"
    if held and train.warm_start == 0:
        raise InputError(
            "train.warm_start = 0 and train.optimizers.router_lr = 0 leave a new router as it was drawn; "
            "give a warm start of 100 steps or more, or a learning rate"
        )


def training_corpus(config: Config, folder: Path) -> Corpus:
    """Tokenise what is trained on, or open what was tokenised before: ``train.data``, else all of ``data``."""
    data = config.train.data or config.data.model_copy(update={"samples": None})
    recorded = folder / "corpus.arrow"
    tokenizer = load_tokenizer(config.model)
    if data == config.data and recorded.exists() and not _changed(config, tokenizer, recorded):
        return Corpus(recorded).check()
    settings = config.model_copy(update={"data": data})
    return prepare_corpus(settings, tokenizer, folder / "train.arrow")


def _changed(config: Config, tokenizer: Any, recorded: Path) -> bool:
    """Whether there are other data now than those that were recorded; where they are gone, there are not."""
    try:
        return not is_corpus_of(config, tokenizer, recorded)
    except InputError:
        return False


@dataclass(frozen=True)
class TrainPlan:
    """The memory of a training.

    Attributes
    ----------
    worker : tuple of Need
        Of one worker.
    tier : Tier
        Of all that share a machine's memory or a GPU.
    """

    worker: tuple[Need, ...]
    tier: Tier

    @property
    def bytes(self) -> int:
        """Of all workers on a machine or a GPU, and of Ray beside several; without what is left to the system."""
        return sum(need.bytes for need in self.tier.needs if need.what != SYSTEM)

    @property
    def worker_bytes(self) -> int:
        """Of one worker, to compare with its peak."""
        return sum(need.bytes for need in self.worker)


def plan_training(spec: Spec, places: Places, limit: int | None = None) -> TrainPlan:
    """What a training needs, of the memory that its workers share."""
    tree = read_student(Path(spec.student))
    own = spec.model if experts_of(tree) else spec.model.model_copy(update={"path": spec.student})
    parameters, base = describe_model(own)
    student = StudentFacts.of(tree, parameters)
    tokens = Corpus(Path(spec.corpus)).longest
    live = spec.needs_teacher and spec.teacher_k is None
    teacher = describe_model(spec.teacher) if live else None
    needs = train_needs(student, base, parameters, teacher, spec.train, tokens, places.device)
    tier = check_needs(needs, places.sharing, places.device, places.memory if limit is None else limit)
    return TrainPlan(tuple(needs), tier)


def plan_disk(spec: Spec, model: bool = True, checkpoints: int | None = None) -> int:
    """What a training needs of the disk: checkpoints, model, the teacher's cache, lines of the steps."""
    tree, corpus, train = read_student(Path(spec.student)), Corpus(Path(spec.corpus)), spec.train
    own = spec.model if experts_of(tree) else spec.model.model_copy(update={"path": spec.student})
    parameters, base = describe_model(own)
    folder = Path(spec.folder)
    router = router_weights(spec.router or tree.get("router"), base.hidden)
    cached = 0
    if spec.needs_teacher and spec.teacher_k is not None and not is_cached(spec, corpus):
        cached = max(0, corpus.tokens * spec.teacher_k - cached_bytes(spec, corpus) // CACHED)
    track = spec.track.tensorboard
    keep = train.keep if checkpoints is None else checkpoints - 1
    steps = train.warm_start + train.steps
    student = StudentFacts.of(tree, parameters)
    what = written(student, router, train.optimizers, steps, keep, cached, track)
    its, output = disk_needs(what, len(Checkpoints(folder, {}).paths()), model)
    return check_disk([(folder, its), (Path(spec.output), output)])


def _check_output(output: Path) -> None:
    """Refuse to replace a folder that is not a model."""
    if output.exists() and not (output / "config.json").is_file() and any(output.iterdir()):
        raise InputError(f"{output} is not empty and holds no model; give a new folder as --output")


TEACHER_K = 64  # tokens of a cached teacher


def train_options(config: Config) -> TrainOptions:
    """What decides a training's result."""
    given = config.train
    plain = given.model_dump(
        exclude={"data", "teacher", "teacher_model", "loss", "routing", "stages", "optimizers"}
    )
    stages = given.stages.model_dump()
    stages |= {name: stages[name] or None for name in ("act_k", "min_k")}  # 0 stands for all
    return TrainOptions(
        **plain,
        checkpointing=config.model.checkpointing,
        weights=LossWeights(**given.loss.model_dump()),
        routing=RoutingOptions(**_routing(config)),
        stages=StageOptions(**stages),
        optimizers=OptimizerOptions(**given.optimizers.model_dump()),
    )


def train_stage_options(
    config: Config,
    output: Path | None = None,
    workers: int | None = None,
    address: str | None = None,
    memory: int | None = None,
    fresh: bool = False,
) -> TrainStageOptions:
    """A call of `tinyonn.train.stage.train_run` as the configuration wants it.

    Parameters
    ----------
    config : Config
    output, workers, address, memory, fresh
        As of `TrainStageOptions`.
    """
    return TrainStageOptions(
        train=train_options(config),
        router=RouterShape(**_router(config)),
        teacher_k=TEACHER_K if config.train.teacher == "cached" else None,
        output=output,
        workers=workers,
        address=address,
        memory=memory,
        fresh=fresh,
    )


def _routing(config: Config) -> dict[str, Any]:
    """The section's options; default numbers of experts that there are too few for are left out."""
    given = config.train.routing
    tree = given.model_dump()
    return (
        tree
        if "ks" in given.model_fields_set
        else tree | {"ks": fitting(given.ks, configured_experts(config))}
    )


def _router(config: Config) -> dict[str, Any]:
    """The section's options; a default `top_k` beyond the experts is all that can be chosen."""
    given = config.router
    tree = given.model_dump()
    if "top_k" not in given.model_fields_set and given.top_k is not None:
        tree["top_k"] = min(given.top_k, configured_experts(config) - given.shared)
    return tree
