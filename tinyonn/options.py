"""What an option is, may be, and how all of them are told.

Numbers lie within bounds that no sensible run leaves; names and paths are such as a system can hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from tinyonn.places import checked_path, checked_text

LONGEST_NAME = 1000  # characters of a column, a kind, a project
MOST = 10**12  # samples, tokens, steps
WIDEST = 10**6  # what a machine holds at a time
STEEPEST = 1e6  # of a factor

PAGE = """<!-- Made by `python -m tinyonn.config > docs/configuration.md` from tinyonn/config.py. -->

# Options

One YAML file for all stages, given as `--config FILE`; what is left out is as below. Start with the ten in bold.
An unknown option is refused with the nearest known one, one that was removed with what to do instead
([note 026](decisions/026-options.md)).

"""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(gt=0, le=MOST)]  # of what is gone through one after another
Width = Annotated[int, Field(gt=0, le=WIDEST)]  # of what is held together
Windows = Annotated[int, Field(gt=0, le=100_000)]
Threads = Annotated[int, Field(gt=0, le=10_000)]
Number = Annotated[int, Field(ge=0, le=WIDEST)]  # such a width, or 0
Weight = Annotated[float, Field(ge=0, le=STEEPEST, allow_inf_nan=False)]  # of a loss, of a feature
Rate = Annotated[float, Field(ge=0, le=STEEPEST, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=1, le=STEEPEST, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, le=STEEPEST, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Some = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]  # a share that is not 0
Budget = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]  # a share, or a number of weights
Signed = Annotated[float, Field(ge=-STEEPEST, le=STEEPEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=LONGEST_NAME), AfterValidator(checked_text)]
Place = Annotated[str, AfterValidator(checked_path)]


def option(default: Any, text: str, *, first: bool = False, **limits: Any) -> Any:
    """An option: its default, its line of help, whether a newcomer should know it, limits as of `pydantic.Field`."""
    return Field(default, description=text, json_schema_extra={"first": first}, **limits)


def fixed(default: Any, text: str, instead: str = "", **limits: Any) -> Any:
    """A value that no configuration sets: what it is, and what to do instead of setting it."""
    shown = default if isinstance(default, str | int | float | None) else "as it is"
    return Field(
        default,
        description=text,
        json_schema_extra={
            "fixed": instead or f"it is {str(shown).lower() if shown is None else shown}; leave it out"
        },
        **limits,
    )


def instead_of(field: FieldInfo) -> str | None:
    """What to do instead of setting a value, and what it is; None for an option."""
    extra = field.json_schema_extra
    instead = extra.get("fixed") if isinstance(extra, dict) else None
    return None if instead is None else f"{field.description}: {instead}"


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field is, may be, or is a list of."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def known_options(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every option by its dotted name, in the order of the tree; those of a list's items as ``data.sources.share``."""
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if instead_of(field) is not None:
            continue
        if inner is not None and field.default is not None:
            yield from known_options(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def fixed_in(tree: Any, section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """What a tree sets that no configuration sets, with what to do instead; a list may be a section of sources."""
    if isinstance(tree, list | tuple) and "sources" in section.model_fields:
        tree = {"sources": tree}
    for name in section.model_fields if isinstance(tree, dict) else ():
        if name not in tree:
            continue
        field, value = section.model_fields[name], tree[name]
        inner = section_of(field)
        if (instead := instead_of(field)) is not None:
            yield f"{prefix}{name} was removed: {instead}"
        elif inner is not None:
            many = isinstance(value, list | tuple) and "sources" not in inner.model_fields
            for item in value if many else [value]:
                yield from fixed_in(item, inner, f"{prefix}{name}.")


def is_first(field: FieldInfo) -> bool:
    """Whether a newcomer should know an option."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("first"))


def default_of(field: FieldInfo) -> str:
    """An option's default as YAML has it."""
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        return str(value).lower() if value is not None else "null"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def range_of(field: FieldInfo) -> str:
    """What an option may be, for people."""
    return _told(field.annotation, field.metadata)


def _told(kind: Any, metadata: Sequence[Any] = ()) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _told(inner[0], inner[1:])
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, UnionType):
        return ", ".join(_told(part, metadata) for part in inner)
    if origin is tuple:
        return f"list of {_told(inner[0])}" + (f", {len(inner)} of them" if inner[-1] is not Ellipsis else "")
    if isinstance(kind, type) and issubclass(kind, Section):
        return "a section"
    if kind is NoneType:
        return "null"
    names = {bool: "true, false", int: "whole number", float: "number", str: "text"}
    return " ".join([names[kind], *([] if kind is str else _limits(metadata))])


def _limits(metadata: Sequence[Any]) -> Iterator[str]:
    found: dict[str, float] = {}
    for item in metadata:
        for part in getattr(item, "metadata", [item]):
            found |= {name: getattr(part, name) for name in ("gt", "ge", "lt", "le") if hasattr(part, name)}
    for name, words in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "to")):
        if name in found:
            yield f"{words} {found[name]:,.15g}"


def page(tree: type[Section]) -> str:
    """All options, for people: Markdown."""
    lines = [PAGE.rstrip("\n"), ""]
    for section, options in _by_section(known_options(tree)):
        about = tree
        for part in section.split("."):
            about = section_of(about.model_fields[part]) or about
        lines += [f"## {section}", "", str(about.__doc__), ""]
        lines += ["| option | default | may be | what it is |", "|---|---|---|---|"]
        for name, field in options:
            shown = f"**`{name}`**" if is_first(field) else f"`{name}`"
            told = str(field.description).replace("|", "\\|")
            lines.append(f"| {shown} | `{default_of(field)}` | {range_of(field)} | {told} |")
        lines.append("")
    return "\n".join(lines)


def _by_section(
    options: Iterable[tuple[str, FieldInfo]],
) -> Iterator[tuple[str, list[tuple[str, FieldInfo]]]]:
    sections: dict[str, list[tuple[str, FieldInfo]]] = {}
    for name, field in options:
        sections.setdefault(name.rpartition(".")[0], []).append((name, field))
    yield from sections.items()
