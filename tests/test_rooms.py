"""The rooms stand in one order and import only what is before them; what is saved with a model knows nothing of us."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tinyonn"
ORDER = """
errors files show machine places options endings
model reference dense checks yaml_text config
corpus store plan workers run command
record score select cluster experts profile train evaluate
status doctor pipeline cli_evaluate cli_experts cli __main__
""".split()


@cache
def imports(path: Path) -> tuple[tuple[int, str], ...]:
    """Level and name of all that a file imports when it runs, in functions too."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    nodes: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            whole = node.module or ""
            yield from (
                (node.level, name)
                for name in ([whole] if whole != "tinyonn" else [f"tinyonn.{n}" for n in names])
            )
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        nodes.extend(ast.iter_child_nodes(node))


def files() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def test_every_room_has_its_place() -> None:
    assert sorted({room(path) for path in files()}) == sorted(ORDER)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_what_comes_after_it(path: Path) -> None:
    own = ORDER.index(room(path))
    names = {
        name.split(".")[1] for level, name in imports(path) if level == 0 and name.startswith("tinyonn.")
    }
    assert not [name for name in names if ORDER.index(name) > own]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_and_dask_are_known_in_one_room(path: Path) -> None:
    """Beside `jobs/`, which are scripts of a Ray cluster."""
    names = {name.split(".")[0] for level, name in imports(path) if level == 0}
    assert room(path) == "workers" or not names & {"ray", "dask", "distributed"}


@pytest.mark.parametrize("path", sorted((ROOT / "model").glob("*.py")), ids=lambda path: path.stem)
def test_what_is_saved_with_a_model_knows_nothing_of_us(path: Path) -> None:
    for level, name in imports(path):
        assert level == 1 or (level == 0 and name.split(".")[0] != "tinyonn"), name
        assert level == 0 or "." not in name, f"{name}: its files lie in one folder"
