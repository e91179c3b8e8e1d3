"""What selection is asked for, and what it answers: frozen, and JSON both ways; and the shares that were searched."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn.config import ExpertsConfig
from tinyonn.errors import InputError
from tinyonn.files import damaged, read_json
from tinyonn.places import local_folder
from tinyonn.run import Run
from tinyonn.score.scores import score_named
from tinyonn.score.source import TRUNK, Source, digest, tensors_outside

ALLOCATION = "allocation.json"  # in the run's folder: what `tinyonn evaluate --allocate` measured and found
ALLOCATIONS = ("uniform", "given", "global")
DEFAULT = ExpertsConfig()

# What could be chosen once, with the one value that is left: it is in the digests that assembled models and evaluated
# losses are known by.
FORMER: Mapping[str, Any] = {
    "settings": {"weights": None, "alpha": 1.0, "seed": 0},
    "within": "tensor",
    "balance": 0.02,
    "core_by": "score",
    "worth": None,
    "curves": [],
    "outlier_times": 5.0,
    "outlier_spread": 0.08,
    "trunk": list(TRUNK),
}


@dataclass(frozen=True)
class SelectOptions:
    """How weights are chosen.

    Attributes
    ----------
    budget : float
        Weights to keep, a whole number above 1; or, up to 1, their share of the linear weights outside the trunk.
    score : str
        A name in ``tinyonn.score.scores.SCORES``.
    core : float
        Share of the budget for the core, 0 to 1: the highest scores.
    allocation : str
        Of the budget across tensors; see ``tinyonn.select.select``.
    shares : dict of str to float
        For ``given``: by tensor, kind and layer (``up_proj/0``), or kind.
    seed : int
        Of ties.
    """

    budget: float = DEFAULT.budget
    score: str = "balanced"
    core: float = DEFAULT.core
    allocation: str = "global"
    shares: Mapping[str, float] = field(default_factory=dict)
    seed: int = DEFAULT.seed

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.allocation not in ALLOCATIONS:
            raise InputError(f"allocation = {self.allocation!r} is unknown; choose {', '.join(ALLOCATIONS)}")
        if not (math.isfinite(self.budget) and self.budget > 0):
            raise InputError(f"budget = {self.budget}; give a number of weights, or a share in (0, 1]")
        if self.budget > 1 and self.budget != int(self.budget):
            raise InputError(
                f"budget = {self.budget}: a number of weights is whole, a share lies in (0, 1]; "
                f"give {round(self.budget)}"
            )
        if not 0 <= self.core <= 1:
            raise InputError(f"core = {self.core}; it is a share from 0 to 1")
        score_named(self.score)
        if (self.allocation == "given") != bool(self.shares):
            raise InputError("shares belong to allocation = 'given', and it needs some")

    def tree(self) -> dict[str, Any]:
        """JSON values."""
        plain = {**FORMER, **asdict(self), "shares": dict(self.shares)}
        return dict(json.loads(json.dumps(plain)))

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> SelectOptions:
        """From `tree`."""
        return cls(**{field.name: tree[field.name] for field in fields(cls)})

    def weights_of(self, source: Source) -> int:
        """The budget in weights.

        Raises
        ------
        InputError
            Nothing is outside the trunk; the budget is above what is there, or below one weight per expert.
        """
        tensors = tensors_outside(source.parameters)
        total = sum(parameter.size for parameter in tensors)
        if not total:
            raise InputError("the model has no linear layers besides its head; there is nothing to be cut")
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
    """Where one tensor is cut, on the 64-bit orders of its weights (``tinyonn.select.cuts``).

    Attributes
    ----------
    cut, core_cut : uint64
        What is kept reaches the first, the core both.
    kept : int64 [experts + 1]
        Weights in every group, the core last.
    """

    cut: np.uint64
    core_cut: np.uint64
    kept: np.ndarray

    def tree(self) -> dict[str, Any]:
        """JSON values."""
        return {"cut": _text(self.cut), "core_cut": _text(self.core_cut), "kept": self.kept.tolist()}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> TensorCuts:
        """From `tree`."""
        return cls(_cut(tree["cut"]), _cut(tree["core_cut"]), np.array(tree["kept"], np.int64))


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
        """JSON values; cuts as base64 of little-endian 64-bit integers."""
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
        tensors = {name: TensorCuts.from_tree(cuts) for name, cuts in tree["tensors"].items()}
        options = SelectOptions.from_tree(tree["options"])
        return cls(options, tree["identity"], tree["experts"], tree["budget"], tensors)


def _text(cut: np.uint64) -> str:
    return base64.b64encode(np.array([cut], "<u8").tobytes()).decode()


def _cut(text: str) -> np.uint64:
    return np.uint64(np.frombuffer(base64.b64decode(text), "<u8")[0])


def select_options(
    config: ExpertsConfig, score: str, shares: Mapping[str, float] | None = None
) -> SelectOptions:
    """What the configuration asks of selection.

    Parameters
    ----------
    config : ExpertsConfig
    score : str
        Name of the S that the run was scored by: a run's `scored_by`.
    shares : mapping of str to float, optional
        By tensor, as they were searched: for ``allocation: auto``, which is ``global`` without them.
    """
    auto = config.allocation == "auto"
    given = dict(shares or {}) if auto else {}
    return SelectOptions(
        budget=config.budget,
        score=score,
        core=config.core,
        allocation="given" if given else "global" if auto else config.allocation,
        shares=given,
        seed=config.seed,
    )


def searched_shares(run: Run, location: str, budget: float) -> Mapping[str, float]:
    """Shares by tensor that `tinyonn evaluate --allocate` found for a budget; empty if there are none."""
    return all_searched_shares(run, location).get(budget, {})


def all_searched_shares(run: Run, location: str) -> dict[float, dict[str, float]]:
    """By budget the shares by tensor that `tinyonn evaluate --allocate` found."""
    return stored_shares(local_folder(location), run.store.reader().stage("rows"))


def stored_shares(folder: Path, scored: Any) -> dict[float, dict[str, float]]:
    """By budget the shares by tensor that were found last; empty if nothing was searched.

    Parameters
    ----------
    folder : Path
        Of the run.
    scored : dict
        Attributes of its rows; what was searched on others counts for nothing.
    """
    path = folder / ALLOCATION
    tree = read_allocation(path) if path.exists() else {}
    if tree.get("scored") != digest(scored):
        return {}
    return {item["budget"]: item["found"]["shares"] for item in tree["found"]}


def read_allocation(path: Path) -> dict[str, Any]:
    """A file of found allocations.

    Raises
    ------
    StoreDamagedError
        It is not what was written, or holds shares that cannot be; names it.
    """
    remedy = "delete it and search again"
    tree = read_json(path, remedy)
    try:
        shares = [share for item in tree["found"] for share in dict(item["found"]["shares"]).values()]
        odd = [share for share in shares if not 0 < float(share) <= 1]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"it is no allocation: {error!r}", remedy) from None
    if odd:
        raise damaged(path, f"it gives a tensor the share {odd[0]}, beyond 0 to 1", remedy)
    return tree
