"""Random configurations: trees of the options with absurd values, and bytes that may be YAML."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import yaml
from hypothesis import strategies as st
from pydantic import BaseModel

from tinyonn.config import Config

NUMBERS = (
    0, 1, -1, 2, 3, 17, 64, 255, 256, 4369, 65_536, 2**31, 2**32, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e-300,
    5e-324, 1e300, -1e300, float("inf"), float("-inf"), float("nan"), 0.1, 1.0, 3.7, True, False,
)  # fmt: skip
WORDS = (
    "", " ", "auto", "null", "~", "~nosuch", "~nosuch/x", "reference", "a" * 300, "a/" * 2500, "a" * 5000, "\0", "a\0b",
    "..", ".", "/", "//", "/proc/self/mem", "/dev/null", "/dev/zero", "/etc/shadow", "s3://", "s3://b/p", "[/red]",
    "\x1b]0;x\x07", "\u202e", "\ud800", "é🙂", "none", "nan", "inf", "1e999", "0x1F", "9" * 5000, "-1", "1_000", "cuda",
    "text", "messages", "norm", "no such", "{{ x }}", "%s", "${HOME}", "file:///etc/passwd", "http://127.0.0.1:9/x",
)  # fmt: skip
BOMB = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [%b]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 10)
)
TEXTS = (
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"--- ", b"? [a]\n: b", b"{1: 2}", b"a: !!python/object:os.system x",
    b"!!python/object/apply:os.system ['x']", b"x: !!timestamp no", b"x: 2001-99-99", b"x: !!binary ====", b"&a [*a]",
    b"a: *none", b"<<: [1]", b"<<: {<<: {record: {workers: 0}}}", b"x: !!set {a, b}", b"x: !!omap [a: 1]", b"x: =",
    b"- - - -", b"[" * 50_000, b"{a: " * 50_000, b"- " * 50_000, b"? " * 50_000, b"a: " + b"9" * 8000,
    b"record: {segment: 0x" + b"f" * 8000 + b"}", b"x: " + b"1:" * 3000 + b"1", b"x: " + b"y" * 6_000_000,
    BOMB, b"model: {path: \"\\ud800\"}", b"%YAML 9.9\n--- a", b"a: |\n" + b" x\n" * 100_000, b"model:\n\tpath: x",
    b"# " + b"c" * 100_000,
)  # fmt: skip
scalars = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.none(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=8,
)


def sections(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    """Some of a section's options; most values are absurd, some are of another kind, a few keys are unknown."""
    known = {name: options(field.annotation) for name, field in model.model_fields.items()}
    some = st.fixed_dictionaries({}, optional=known).map(dict)
    few = st.lists(st.sampled_from(sorted(known)), max_size=3, unique=True)
    chosen = st.tuples(some, few).map(lambda pair: {key: pair[0][key] for key in pair[1] if key in pair[0]})
    return st.one_of(chosen, chosen, some, anything)


def options(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an option of a type, right ones and others."""
    inner = [
        part for part in (kind, *get_args(kind)) if isinstance(part, type) and issubclass(part, BaseModel)
    ]
    if inner and get_origin(kind) is tuple:
        return st.lists(sections(inner[0]), max_size=3) | anything
    if inner:
        return sections(inner[0])
    words = [part for part in _words(kind) if isinstance(part, str)]
    return (
        st.one_of(scalars, st.sampled_from(words), anything)
        if words
        else st.one_of(scalars, scalars, anything)
    )


def _words(kind: Any) -> list[Any]:
    """Words of the literals in a type."""
    return [word for part in get_args(kind) for word in ([part] if isinstance(part, str) else _words(part))]


def _written(tree: Any) -> bytes:
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):
        return repr(tree).encode("utf-8", "surrogatepass")


def _spoilt(pair: tuple[bytes, int, int]) -> bytes:
    text, place, byte = pair
    place %= max(1, len(text))
    return text[:place] + bytes([byte]) + text[place + 1 :]


trees = sections(Config)
files = st.one_of(
    trees.map(_written),
    trees.map(_written),
    st.tuples(trees.map(_written), st.integers(0, 5000), st.integers(0, 255)).map(_spoilt),
    st.sampled_from(TEXTS),
    st.binary(max_size=200),
    st.text(st.sampled_from("[]{}:,-&*!?|>%@`'\"# \n\tab01.~=<"), max_size=60).map(str.encode),
)
