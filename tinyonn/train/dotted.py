"""Options of a training by their dotted names: ``optimizers.router_lr``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from tinyonn.errors import InputError
from tinyonn.train.options import TrainOptions


def option_of(options: TrainOptions, name: str) -> Any:
    """An option by its dotted name.

    Raises
    ------
    InputError
        There is none, or it is not a number.
    """
    found: Any = options
    for part in name.split("."):
        if not is_dataclass(found) or part not in {f.name for f in fields(found)}:
            raise InputError(
                f"train.{name} is no option of a training; give such as optimizers.router_lr or weights.ce"
            )
        found = getattr(found, part)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise InputError(f"train.{name} = {found!r} is no number, so it has no range; leave it out")
    return found


def with_options(options: TrainOptions, values: Mapping[str, float]) -> TrainOptions:
    """The options with some changed, by dotted names; whole numbers stay whole."""
    for name, value in values.items():
        whole = isinstance(option_of(options, name), int)
        options = _changed(options, name.split("."), round(value) if whole else value)
    return options


def _changed(tree: Any, path: list[str], value: float) -> Any:
    first, *rest = path
    return replace(tree, **{first: _changed(getattr(tree, first), rest, value) if rest else value})
