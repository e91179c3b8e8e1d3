"""Several workers by Ray Train: one process group, started again when a worker is lost.

Ray Train starts one process per worker, on GPUs or on shares of the CPUs, joins them by NCCL or gloo and calls the loop
in each. What is resumed are our own checkpoints in the run's folder, which all machines must reach: after a loss the
whole group starts again from the last of them. Losses are forgiven as long as checkpoints come in between; `MAX_LOSSES`
in a row end the training. An error of ours is raised here as itself and is not tried again.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyonn import errors
from tinyonn.errors import CapacityError, InputError, TinyONNError
from tinyonn.files import read_derived, write_json
from tinyonn.machine import Device, worker_environment
from tinyonn.workers.alive import Waiting, patience, patiently

LOG = logging.getLogger(__name__)
MAX_LOSSES = 3  # of workers, one after another without a checkpoint in between
FOLDER = "ray"  # in the training's: what Ray Train writes
TOKEN = "group.json"
UP = "up"  # is made by the first worker whose process runs
START = 60.0  # seconds that Ray Train waits for places before it counts a failed start

Report = Callable[[Mapping[str, float]], None]
Loop = Callable[[Any, Report], None]  # spec, report of metrics


@dataclass(frozen=True)
class GroupOptions:
    """Who trains.

    Attributes
    ----------
    workers : int
    threads : int
        CPU threads of each.
    device : str
        ``cpu``, or ``cuda`` for one GPU each.
    """

    workers: int
    threads: int
    device: Device


def run_group(
    loop: Loop,
    spec: Any,
    folder: Path,
    options: GroupOptions,
    done: Callable[[], int],
    tell: Callable[[str], None] = lambda line: None,
    waiting: Waiting | None = None,
) -> None:
    """Run a loop in every worker of a group until it returns in all of them; Ray is connected.

    Parameters
    ----------
    loop : callable
        Of a module, with the spec and a function that reports metrics, which every worker calls equally often. It
        resumes what it finds.
    spec : object
        Plain data.
    folder : Path
        Of the training, reached by all machines.
    options : GroupOptions
    done : callable
        Steps that the newest checkpoint holds.
    tell : callable
        Called when workers were lost.
    waiting : Waiting, optional
        Tells, and ends it, when no worker can be had.

    Raises
    ------
    TinyONNError
        As raised by the loop.
    InputError
        A machine does not see the folder.
    CapacityError
        The cluster has not got so many places, or workers are lost again and again.
    EngineLostError
        Ray is gone.
    """
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from tinyonn.workers.meeting import meeting_place

    cuda = options.device == "cuda"
    resources: dict[str, float] = {"CPU": 1, "GPU": 1} if cuda else {"CPU": options.threads}
    bundles = [resources] * options.workers
    check_places(options)
    there = patiently(_placement_groups, bundles)
    storage = folder / FOLDER
    storage.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    write_json(storage / TOKEN, {"token": token})
    waiting = waiting or Waiting(tell, lambda: f"step {done()} stays")
    up = storage / UP
    lost_rounds = 0
    with meeting_place("nccl" if cuda else "gloo") as place:
        while True:
            before = done()
            up.unlink(missing_ok=True)
            trainer = TorchTrainer(
                _worker,
                train_loop_config={
                    "loop": loop,
                    "spec": spec,
                    "folder": str(folder.absolute()),
                    "token": token,
                },
                torch_config=place,
                scaling_config=ScalingConfig(
                    num_workers=options.workers,
                    use_gpu=cuda,
                    resources_per_worker=resources,
                ),
                run_config=RunConfig(
                    name="group",
                    storage_path=str(storage.absolute()),
                    failure_config=FailureConfig(
                        max_failures=MAX_LOSSES, controller_failure_limit=max(1, int(patience() // START))
                    ),
                    worker_runtime_env={"env_vars": worker_environment(options.threads)},
                ),
            )
            try:
                patiently(trainer.fit, tick=lambda: waiting.see(up.exists()))
            except (TrainingFailedError, RayActorError) as error:
                LOG.debug("the group ended", exc_info=True)
                patiently(_free_places, bundles, there)
                ours = _failure(storage, token)
                if ours is not None:
                    raise ours from None
                lost = "Ray Train's controller" if isinstance(error, RayActorError) else _losses(error)
                if not lost:  # a fault of the program: no other try will help
                    raise
                # Ray Train has tried a lost worker's group again, but not one that died while it was being started.
                tried = MAX_LOSSES if hasattr(error, "worker_failures") else 1
                lost_rounds = 0 if done() > before else lost_rounds + tried
                if lost_rounds >= MAX_LOSSES:
                    raise CapacityError(
                        f"workers are lost again and again before the next checkpoint, last {lost}; most often a "
                        "machine is out of memory: use a smaller train.micro_batch or fewer --workers"
                    ) from None
                _wait_for_places(options)  # workers whom nobody tells what to do any more end as well
                tell(f"workers were lost ({lost}); going on from step {done()}")
                continue
            ours = _failure(storage, token)
            if ours is not None:
                raise ours
            return


def check_places(options: GroupOptions) -> None:
    """Raise CapacityError if the connected Ray cannot hold the workers: Ray Train would wait for ever."""
    from tinyonn.workers.ray import capacity

    room = capacity(options.device, options.threads)
    if options.workers > room:
        each = "a GPU" if options.device == "cuda" else f"{options.threads} CPU(s)"
        raise CapacityError(
            f"{options.workers} workers of {each} each are asked for and the Ray cluster has places for {room}; "
            "use fewer --workers, or fewer threads of each"
        )


def _placement_groups(bundles: Sequence[Mapping[str, float]]) -> set[str]:
    """Placement groups of this job that hold such places, as hexadecimal numbers."""
    from ray import get_runtime_context
    from ray.util import placement_group_table

    job = get_runtime_context().get_job_id()  # its number ends those of its placement groups
    return {
        name
        for name, group in placement_group_table().items()
        if name.endswith(job)
        and group["state"] != "REMOVED"
        and list(group["bundles"].values()) == [*bundles]
    }


def _free_places(bundles: Sequence[Mapping[str, float]], others: set[str]) -> None:
    """Remove the placement groups, but for others', that a group which ended left behind.

    Otherwise they hold their places until the job ends: of a controller that died they are removed by an actor that
    asks the dashboard, which a small cluster has not got, and of workers that died as they started by nobody.
    """
    from ray import PlacementGroupID
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup

    for name in _placement_groups(bundles) - others:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def _wait_for_places(options: GroupOptions) -> None:
    """Until the workers' places are free again, or others have taken them."""
    from ray import available_resources

    kind, wanted = ("GPU", 1) if options.device == "cuda" else ("CPU", options.threads)
    deadline = time.monotonic() + START
    while (
        patiently(available_resources).get(kind, 0) < options.workers * wanted and time.monotonic() < deadline
    ):
        time.sleep(0.2)


def _worker(config: dict[str, Any]) -> None:
    """What every worker runs."""
    from ray import train

    folder, token = Path(config["folder"]), config["token"]
    storage = folder / FOLDER
    if (read_derived(storage / TOKEN) or {}).get("token") != token:
        raise InputError(
            f"{folder} is not the same folder on every machine of the cluster; give a run on storage that all of them "
            "reach, or use one machine"
        )
    (storage / UP).touch()
    if _failure(storage, token) is not None:
        return  # the group was started again after an error that no other try mends
    try:
        config["loop"](config["spec"], train.report)
    except TinyONNError as error:
        _keep_failure(storage, token, error)
        raise


def _keep_failure(storage: Path, token: str, error: TinyONNError) -> None:
    path = storage / f"failure-{token}.json"
    with suppress(OSError):  # Ray hands the error over too, after its tries
        write_json(path, {"kind": _known(error), "message": str(error)})


def _failure(storage: Path, token: str) -> TinyONNError | None:
    """The error of ours that ended the group."""
    tree = read_derived(storage / f"failure-{token}.json")
    if tree is None:
        return None
    kind: type[TinyONNError] = getattr(errors, tree["kind"], TinyONNError)
    return kind(tree["message"])


def _known(error: TinyONNError) -> str:
    """Nearest class of `tinyonn.errors`."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)


def _losses(error: Any) -> str:
    """Which ranks died, in words, empty if none did; raises an error of ours that a worker could not write down."""
    dead = []
    for rank, cause in sorted(getattr(error, "worker_failures", {}).items()):
        inner = getattr(cause, "_base_exc", cause)
        if isinstance(inner, TinyONNError):
            raise inner from None
        if type(inner).__name__ in ("WorkerHealthCheckFailedError", "ActorDiedError", "RayActorError"):
            dead.append(rank)
    if not dead and not hasattr(error, "worker_failures"):
        return (str(error).strip().splitlines() or ["?"])[
            -1
        ]  # a machine that left, or workers that did not start
    return f"worker {', '.join(map(str, dead))}" if dead else ""
