"""What selection is asked for, and what it answers: frozen, and JSON both ways."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tinyonn.dense.parameters import kind_of
from tinyonn.errors import InputError
from tinyonn.experts.allocation import Curve
from tinyonn.experts.cuts import UInt64
from tinyonn.experts.scores import ScoreSettings, score_named
from tinyonn.experts.source import Source, tensors_outside

WITHIN = ("cell", "tensor", "row")
CORES = ("score", "even")
ALLOCATIONS = ("uniform", "given", "global", "outlier", "measured")
TRUNK = ("norm", "bias", "embedding", "head")
UNCUT = ("norm", "bias", "embedding")  # always in the trunk: experts are made of linear layers


@dataclass(frozen=True)
class SelectOptions:
    """How weights are chosen.

    Attributes
    ----------
    budget : float
        Weights to keep, a whole number above 1; or, up to 1, their share of the linear weights outside the trunk.
    score : str
        A name in ``tinyonn.experts.scores.SCORES``.
    settings : ScoreSettings
    within : str
        What competes: the weights of a ``tensor``, of an output ``row``, or of a ``cell`` in a tensor.
    balance : float
        Within cells: how far a cell's part of a tensor's budget follows its size (1) rather than the number of its
        weights that the tensor as a whole would keep (0, which may leave experts empty).
    core : float
        Share of the budget for the core, 0 to 1.
    core_by : str
        Which of a tensor's kept weights are its core: those of the highest ``score``, or those that stand high in every
        slice (``even``: S less the margin of the dominant slice).
    allocation : str
        Of the budget across tensors; see ``tinyonn.experts.allocation``.
    worth : str or None
        Score by which ``global`` and ``outlier`` compare tensors; by default ``wg`` and ``wanda``.
    shares : dict of str to float
        For ``given``: by tensor, kind and layer (``up_proj/0``), or kind.
    curves : tuple of Curve
        For ``measured``.
    outlier_times, outlier_spread : float
        For ``outlier``: a weight is one above so many times its tensor's mean; how far shares may differ from the mean.
    trunk : tuple of str
        Kinds of modules that stay whole; norms, biases and embeddings always do.
    seed : int
        Of ties and of the ``random`` score.
    """

    budget: float = 1e9
    score: str = "S"
    settings: ScoreSettings = field(default_factory=ScoreSettings)
    within: str = "cell"
    balance: float = 0.05
    core: float = 0.5
    core_by: str = "score"
    allocation: str = "global"
    worth: str | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    outlier_times: float = 5.0
    outlier_spread: float = 0.08
    trunk: tuple[str, ...] = TRUNK
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is out of range.

        Raises
        ------
        InputError
            Names the option, its value and what is allowed.
        """
        for name, choice, allowed in (
            ("within", self.within, WITHIN),
            ("allocation", self.allocation, ALLOCATIONS),
            ("core_by", self.core_by, CORES),
        ):
            if choice not in allowed:
                raise InputError(f"{name} = {choice!r} is unknown; choose {', '.join(allowed)}")
        if not (math.isfinite(self.budget) and self.budget > 0):
            raise InputError(f"budget = {self.budget}; give a number of weights, or a share in (0, 1]")
        if self.budget > 1 and self.budget != int(self.budget):
            raise InputError(
                f"budget = {self.budget}: a number of weights is whole, a share lies in (0, 1]; "
                f"give {round(self.budget)}"
            )
        for name, share in (("core", self.core), ("balance", self.balance)):
            if not 0 <= share <= 1:
                raise InputError(f"{name} = {share}; it is a share from 0 to 1")
        for name, value in (
            ("outlier_times", self.outlier_times),
            ("outlier_spread", self.outlier_spread),
            ("alpha", self.settings.alpha),
            *(("a weight of S", weight) for weight in self.settings.weights or ()),
        ):
            if not math.isfinite(value) or (value < 0 and name != "a weight of S"):
                raise InputError(f"{name} = {value}; give a finite number, 0 or more")
        if self.settings.weights is not None and not any(self.settings.weights):
            raise InputError("the weights of S are all 0; give at least one another value")
        for name in (self.score, *([] if self.worth is None else [self.worth])):
            score_named(name)
        for allocation, given in (("given", self.shares), ("measured", self.curves)):
            if (self.allocation == allocation) != bool(given):
                what = "shares" if allocation == "given" else "curves"
                raise InputError(f"{what} belong to allocation = {allocation!r}, and it needs some")
        lost = [kind for kind in UNCUT if kind not in self.trunk]
        if lost:
            raise InputError(
                f"trunk = {list(self.trunk)}: {', '.join(lost)} cannot be cut; add them to the trunk"
            )

    def tree(self) -> dict[str, Any]:
        """JSON values."""
        plain = asdict(self) | {"shares": dict(self.shares)}
        tree: dict[str, Any] = json.loads(json.dumps(plain))
        return tree

    def weights_of(self, source: Source) -> int:
        """The budget in weights.

        Raises
        ------
        InputError
            Nothing is outside the trunk; the budget is above what is there, or below one weight per expert; the labels
            leave out tensors that are to be cut.
        """
        tensors = tensors_outside(source.parameters, self.trunk)
        total = sum(parameter.size for parameter in tensors)
        if not total:
            raise InputError(f"trunk = {list(self.trunk)} takes all linear weights; leave some to be cut")
        unlabelled = sorted({kind_of(p) for p in tensors} & set(source.trunk)) if source.cells else []
        if unlabelled:
            raise InputError(
                f"{', '.join(unlabelled)} have no labels (cluster.trunk = {list(source.trunk)}); add them to the trunk "
                "of the selection, or take them out of cluster.trunk and run `tinyonn cluster` again"
            )
        budget = round(self.budget * total) if self.budget <= 1 else int(self.budget)
        if budget > total:
            raise InputError(
                f"budget = {budget:,} weights, but only {total:,} linear weights are outside the trunk; "
                f"give at most {total} or a share such as 0.315"
            )
        least = max(source.cells, 1)
        if budget < least:
            raise InputError(
                f"budget = {budget:,} weights ({self.budget:g}) is below one weight for each of {least} experts; "
                f"give at least {least}, a share in (0, 1], or cluster into fewer cells"
            )
        return budget


@dataclass(frozen=True, eq=False)
class TensorCuts:
    """Where one tensor is cut; cuts are 64-bit places (``tinyonn.experts.cuts``).

    Attributes
    ----------
    cut, core_cut : uint64 [1], or [outputs] within rows
        A weight that reaches both is in the core.
    cell_cut : uint64 [cells], or [0]
        What the others of a cell must reach; without it, `cut`.
    kept : int64 [experts + 1]
        Weights in every group, the core last.
    """

    cut: UInt64
    core_cut: UInt64
    cell_cut: UInt64
    kept: np.ndarray

    def tree(self) -> dict[str, Any]:
        """JSON values."""
        cuts = {name: _text(getattr(self, name)) for name in ("cut", "core_cut", "cell_cut")}
        return {**cuts, "kept": self.kept.tolist()}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> TensorCuts:
        """From `tree`."""
        cut, core_cut, cell_cut = (_array(tree[name]) for name in ("cut", "core_cut", "cell_cut"))
        return cls(cut, core_cut, cell_cut, np.array(tree["kept"], np.int64))


@dataclass(frozen=True, eq=False)
class Selection:
    """Which weights are kept, and in which group: all that assembly needs beside the store and the base model.

    Attributes
    ----------
    options : SelectOptions
    identity : str
        Of the source it was made from.
    experts : int
        k: cells have the numbers 0 to k − 1, the core has k.
    budget : int
        Weights kept.
    tensors : dict of str to TensorCuts
        Those outside the trunk, in model order.
    """

    options: SelectOptions
    identity: str
    experts: int
    budget: int
    tensors: Mapping[str, TensorCuts]

    @property
    def group_sizes(self) -> list[int]:
        """Weights of every expert, the core last."""
        return [int(count) for count in np.sum([cuts.kept for cuts in self.tensors.values()], axis=0)]

    @property
    def empty_experts(self) -> list[int]:
        """Numbers of the experts without a weight; the core may be empty and is not among them."""
        return [number for number, size in enumerate(self.group_sizes[:-1]) if not size]

    def tree(self) -> dict[str, Any]:
        """JSON values; cuts of rows as base64 of little-endian 64-bit integers."""
        return {
            "options": self.options.tree(),
            "identity": self.identity,
            "experts": self.experts,
            "budget": self.budget,
            "tensors": {name: cuts.tree() for name, cuts in self.tensors.items()},
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Selection:
        """From `tree`, or from its JSON."""
        options = dict(tree["options"])
        settings = dict(options["settings"])
        settings["weights"] = None if settings["weights"] is None else tuple(settings["weights"])
        options["settings"] = ScoreSettings(**settings)
        options["trunk"] = tuple(options["trunk"])
        options["curves"] = tuple(
            Curve(tuple(c["tensors"]), tuple(c["shares"]), tuple(c["losses"])) for c in options["curves"]
        )
        tensors = {name: TensorCuts.from_tree(cuts) for name, cuts in tree["tensors"].items()}
        return cls(SelectOptions(**options), tree["identity"], tree["experts"], tree["budget"], tensors)


def _text(cuts: UInt64) -> str:
    return base64.b64encode(cuts.astype("<u8").tobytes()).decode()


def _array(text: str) -> UInt64:
    return np.frombuffer(base64.b64decode(text), "<u8").astype(np.uint64)
