"""What a router is made of and how many experts it chooses, checked; saved beside exported models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ANY = object()
# Settings of routers that were: the value at which a saved model does without it, and what stands in its place.
REMOVED: dict[str, tuple[Any, str]] = {
    "threshold": (None, "router.top_k says how many experts are on"),
    "max_k": (ANY, ""),  # the most that a threshold chose
    "gate": ("one", "a chosen expert works as in the dense model"),
}


@dataclass(frozen=True)
class RouterOptions:
    """The ``router`` of a configuration, as plain JSON can say it.

    Attributes
    ----------
    branches : tuple of tuples of int
        The main router chooses among these groups of experts; together they hold every expert once.
    width : int
        Features of the router's own encoder.
    top_k : int, optional
        Experts chosen per prompt, those in `shared` not counted; None is all.
    shared : tuple of int
        Experts that are always on.
    prompt_tokens : int
        Of a text that is no dialogue, so many tokens at most serve as its prompt in training and evaluation.

    Raises
    ------
    ValueError
        Values that contradict each other; names value, limit and remedy.
    """

    branches: tuple[tuple[int, ...], ...]
    width: int = 128
    top_k: int | None = None
    shared: tuple[int, ...] = ()
    prompt_tokens: int = 64

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> RouterOptions:
        """Options from plain JSON.

        Raises
        ------
        ValueError
            Unknown or missing keys, values that do not fit, or a removed setting that was in use.
        """
        tree = _without_removed(tree)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(tree) - set(known))
        if unknown:
            raise ValueError(f"router has {unknown[0]!r}; it knows {', '.join(known)}")
        if "branches" not in tree:
            raise ValueError(
                "router has no branches; give lists of expert numbers that hold each expert once"
            )
        try:
            given = {
                **tree,
                "branches": tuple(tuple(map(int, branch)) for branch in tree["branches"]),
                "shared": tuple(map(int, tree.get("shared") or ())),
            }
            return cls(**given)
        except TypeError as error:
            raise ValueError(
                f"router has a value of the wrong kind ({error}); see its keys in config.json"
            ) from None

    def __post_init__(self) -> None:
        self._check_branches()
        experts = self.experts
        _within("width", self.width, 1, None)
        _within("prompt_tokens", self.prompt_tokens, 1, None)
        if len(set(self.shared)) != len(self.shared) or not set(self.shared) <= set(range(experts)):
            raise ValueError(
                f"router.shared = {list(self.shared)}; give numbers from 0 to {experts - 1}, each at most once"
            )
        choices = experts - len(self.shared)
        if self.top_k is not None:
            _within("top_k", self.top_k, 0, choices)

    def _check_branches(self) -> None:
        numbers = [number for branch in self.branches for number in branch]
        if not self.branches or not all(self.branches):
            raise ValueError("router.branches has an empty branch; every branch needs an expert")
        if sorted(numbers) != list(range(len(numbers))):
            twice = sorted({number for number in numbers if numbers.count(number) > 1})
            lost = sorted(set(range(len(numbers))) - set(numbers))
            wrong = f"{twice[0]} is there twice" if twice else f"{lost[0]} is in none"
            raise ValueError(
                f"router.branches must hold each expert from 0 on once, but expert {wrong}; find branches anew"
            )

    @property
    def experts(self) -> int:
        """Number of experts."""
        return sum(map(len, self.branches))

    def branch_of(self) -> Sequence[int]:
        """The branch of each expert."""
        owner = [0] * self.experts
        for number, branch in enumerate(self.branches):
            for expert in branch:
                owner[expert] = number
        return owner

    def tree(self) -> dict[str, Any]:
        """All options as plain JSON."""
        return {
            **dataclasses.asdict(self),
            "branches": [list(branch) for branch in self.branches],
            "shared": list(self.shared),
        }


def _without_removed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Options as models were saved with once; one that was not in use is left out."""
    for name, value in tree.items():
        unused, instead = REMOVED.get(name, (value, ""))
        if unused is not ANY and value != unused:
            raise ValueError(f"router.{name} = {value!r} was removed: {instead}; train the router again")
    return {name: value for name, value in tree.items() if name not in REMOVED}


def _within(name: str, value: Any, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"router.{name} = {value!r}; give a whole number")
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"router.{name} = {value}; give {limit}")
