"""YAML that others wrote, read within bounds: of its size, its depth, its numbers, and of what its aliases unfold to.

PyYAML's safe loader makes plain values alone, but takes minutes for some texts of a megabyte and raises whatever
Python does where a value is none (``2001-99-99``). The text is looked through event by event first; what a person
would not write ends the reading there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tinyonn.errors import InputError
from tinyonn.show.escape import shortened

LARGEST = 1 << 18  # bytes of a file
DEEPEST = 32
LONGEST = 8192  # characters of one value
MOST_VALUES = 20_000  # aliases unfolded
MERGE = "tag:yaml.org,2002:merge"  # of the key <<
EXAMPLES = "see configs/ for examples"


def read_yaml(path: str | Path) -> Any:
    """Read a file.

    Raises
    ------
    InputError
        Not a file, not YAML, or beyond the bounds.
    """
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise _Unfit(f"over {LARGEST >> 10} KiB, which no configuration takes")
        return parse_yaml(content.decode("utf-8"))
    except (OSError, ValueError, _Unfit) as error:  # UnicodeDecodeError; a NUL character in the path
        raise InputError(f"{path}: not a readable YAML file ({error}); {EXAMPLES}") from None


def parse_yaml(text: str) -> Any:
    """Turn YAML into plain values.

    Raises
    ------
    ValueError
        Not YAML, or beyond the bounds.
    """
    try:
        _look_through(text)
        _refuse_twins(yaml.compose(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _Unfit(str(error)) from None
    except RecursionError:
        raise _Unfit("nested too deeply") from None
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        if isinstance(error, _Unfit):
            raise
        if "integer string conversion" in str(error):  # Python's guard: sys.set_int_max_str_digits
            raise _Unfit("a number with too many digits") from None
        raise _Unfit(f"a value that is none: {type(error).__name__}, {error}") from None


class _Unfit(ValueError):
    """Why a text is not read."""


def _look_through(text: str) -> None:
    """Refuse what would take long or much, before any value is made."""
    sizes: dict[str, int] = {}  # values that an anchor's node unfolds to
    opened: list[tuple[str | None, int]] = []  # the anchor of each open node, and values before it
    values = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = 0 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.events.AliasEvent):
            if event.anchor not in sizes:
                raise _Unfit(f"line {line}: an alias of what is not there yet, {event.anchor!r}")
            values += sizes[event.anchor]
        elif isinstance(event, yaml.events.ScalarEvent):
            if len(event.value) > LONGEST:
                raise _Unfit(f"line {line}: a value of {len(event.value):,} characters; at most {LONGEST:,}")
            values += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.events.CollectionStartEvent):
            opened.append((event.anchor, values))
            values += 1
            if len(opened) > DEEPEST:
                raise _Unfit(f"line {line}: nested more than {DEEPEST} deep")
        elif isinstance(event, yaml.events.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = values - before
        if (tag := getattr(event, "tag", None)) is not None:
            raise _Unfit(f"line {line}: the tag {tag}; values are plain text, numbers, lists and mappings")
        if values > MOST_VALUES:
            raise _Unfit(f"line {line}: over {MOST_VALUES:,} values, aliases unfolded")


def _refuse_twins(root: yaml.Node | None) -> None:
    """Refuse a mapping that has a key twice, of which YAML readers take the last; ``<<`` adds keys and is none."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        lines: dict[Any, int] = {}
        for key, value in node.value:
            waiting += [key, value]
            if isinstance(key, yaml.ScalarNode):
                name, line = _key(key), key.start_mark.line + 1
                if name in lines:
                    raise _Unfit(
                        f"the key {shortened(key.value)} is there twice, in lines {lines[name]} and {line}; leave one"
                    )
                lines[name] = line


def _key(node: yaml.ScalarNode) -> Any:
    """What makes two keys the same: their value."""
    return MERGE if node.tag == MERGE else yaml.constructor.SafeConstructor().construct_object(node)
