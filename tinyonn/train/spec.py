"""What a training is built from, as plain data: sent to every worker, which builds the same from it.

Paths are those of a folder that all workers reach. Shape suffixes: S samples, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinyonn.config import ModelConfig, RouterConfig, TrackConfig
from tinyonn.errors import InputError
from tinyonn.experts.folder import read_settings
from tinyonn.model.configuration_tinyonn import RouterOptions
from tinyonn.train.branches import find_branches, shared_experts
from tinyonn.train.options import TrainOptions, flat

if TYPE_CHECKING:
    from tinyonn.profile.profile import Profile

ROUTER = RouterConfig()
TINY_ONN = "tiny_onn"  # model_type of an assembled model


@dataclass(frozen=True)
class RouterShape:
    """What a new router is made of; branches and shared experts are found in the profile.

    Attributes
    ----------
    branches : int
        Groups of experts that the main router chooses from; fewer if there are fewer experts.
    width : int
        Features of its encoder.
    top_k : int or None
        Experts on, the shared ones not counted; None is all.
    shared : int
        Experts that are always on.
    """

    branches: int = 10
    width: int = 128
    top_k: int | None = ROUTER.top_k
    shared: int = ROUTER.shared

    def options(self, profile: Profile, prompt_tokens: int) -> RouterOptions:
        """With the branches of a profile."""
        contribution_SE = profile.contribution[:, : profile.experts]
        try:
            return RouterOptions(
                branches=tuple(
                    tuple(branch)
                    for branch in find_branches(contribution_SE, min(self.branches, profile.experts))
                ),
                width=self.width,
                top_k=self.top_k,
                shared=tuple(shared_experts(contribution_SE, self.shared)),
                prompt_tokens=prompt_tokens,
            )
        except ValueError as error:
            raise InputError(str(error)) from None


@dataclass(frozen=True)
class TargetOptions:
    """How the profile becomes the router's targets; see `tinyonn.train.routing.ProfileTargets`.

    Attributes
    ----------
    sharpness : float
    per : str
        What contributions are divided by: an expert's ``weights``, its ``mean`` over samples, or ``nothing``.
    """

    sharpness: float = 0.5
    per: Literal["weights", "mean", "nothing"] = "weights"


@dataclass(frozen=True)
class Spec:
    """One training, plain data.

    Attributes
    ----------
    folder : str
        ``<run>/train``: checkpoints, steps.
    student : str
        Folder of what is trained: an assembled model, or any causal language model.
    model : ModelConfig
        The dense model that the student was made from.
    teacher : ModelConfig
        That model, or another with the same tokenizer.
    corpus : str
        The tokenised corpus.
    profile : str or None
        Needed for a router's targets.
    router : dict or None
        `RouterOptions.tree` of a new router; None keeps what the student has, or trains without.
    train : TrainOptions
    targets : TargetOptions
    teacher_k : int or None
        So many of the teacher's likeliest tokens are cached on disk; None runs it at every step.
    identity : dict
        What the checkpoints are of.
    track : TrackConfig
    device : str
    threads : int
    window : int
        Steps that the monitor looks back on.
    output : str
        Folder of the trained model.
    """

    folder: str
    student: str
    model: ModelConfig
    teacher: ModelConfig
    corpus: str
    profile: str | None
    router: dict[str, Any] | None
    train: TrainOptions
    output: str
    targets: TargetOptions = field(default_factory=TargetOptions)
    teacher_k: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    track: TrackConfig = field(default_factory=TrackConfig)
    device: str = "cpu"
    threads: int = 1
    window: int = 50

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss compares with it."""
        return self.train.weights.kl > 0 or self.train.weights.hidden > 0

    @property
    def needs_targets(self) -> bool:
        """Whether the router learns from the profile."""
        return self.train.warm_start > 0 or self.train.weights.profile > 0


def identity_of(
    student: Mapping[str, Any],
    teacher: Mapping[str, str] | None,
    router: Mapping[str, Any] | None,
    targets: TargetOptions | None,
) -> dict[str, Any]:
    """What a checkpoint must agree on beside corpus and options, flat."""
    assembly = student.get("assembly") or {}
    tree = {
        "assembly": assembly.get("id"),
        "student": student.get("model_type"),
        "teacher": dict(teacher or {}),
        "router": dict(router or {}),
        "targets": vars(targets) if targets is not None else {},
    }
    return dict(flat(tree))


def read_student(folder: Path) -> dict[str, Any]:
    """The configuration of what is to be trained.

    Raises
    ------
    InputError
        There is no model.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model to train; run `tinyonn assemble` first")
    tree = read_settings(folder, "assemble the model again")
    if "model_type" not in tree:
        raise InputError(f"{folder / 'config.json'} is not of a model; assemble the model again")
    return tree


def experts_of(student: Mapping[str, Any]) -> int:
    """Experts of a student; 0 if it is dense."""
    return int(student.get("experts", 0)) if student["model_type"] == TINY_ONN else 0


def assembled_id(student: Mapping[str, Any]) -> str:
    """The assembly whose groups a student has, also after training."""
    assembly = student.get("assembly") or {}
    return str(assembly.get("assembled", assembly.get("id")))
