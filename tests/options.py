"""A configuration as a user could have written it."""

from __future__ import annotations

from typing import Any

from tinyonn.config import Config
from tinyonn.options import Section, instead_of


def written(config: Config) -> dict[str, Any]:
    """The options of a configuration as JSON, without what no configuration sets; which must be as it is by default."""
    return _written(config)


def _written(section: Section) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if instead_of(field) is not None:
            assert value == field.default, f"{name} = {value!r} cannot be written"
        else:
            tree[name] = _written(value) if isinstance(value, Section) else plain[name]
    return tree
