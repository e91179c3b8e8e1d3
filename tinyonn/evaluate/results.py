"""Evaluated lines, kept in one JSON file so that a killed evaluation goes on where it was."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyonn.evaluate.perplexity import Losses
from tinyonn.experts.source import digest
from tinyonn.files import damaged, read_json, write_json

VERSION = 1
REMEDY = "delete it and evaluate again"


@dataclass(frozen=True)
class Line:
    """One evaluated model.

    Attributes
    ----------
    method : str
        ``original``, ``dense``, or what chose (and updated) the weights.
    share : float
        Of the linear weights that are kept.
    weights : int
        How many those are.
    losses : Losses
    """

    method: str
    share: float
    weights: int
    losses: Losses

    def tree(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "mean": self.losses.mean, "perplexity": self.losses.perplexity}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Line:
        """From `tree`."""
        return cls(tree["method"], tree["share"], tree["weights"], Losses(**tree["losses"]))


class Results:
    """A file of lines by a digest of what decides them.

    Parameters
    ----------
    path : Path
        Made with its folder at the first `put`; one of another version is replaced.

    Raises
    ------
    StoreDamagedError
        It is there and not what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        if path.exists():
            tree = read_json(path, REMEDY)
            try:
                self._lines = dict(tree["lines"]) if tree["version"] == VERSION else {}
                for line in self._lines.values():
                    Line.from_tree(line)
            except (ValueError, KeyError, TypeError) as error:
                raise damaged(path, repr(error), REMEDY) from None

    def get(self, decided_by: Any) -> Line | None:
        """The line that was evaluated from the same, if there is one."""
        found = self._lines.get(digest(decided_by))
        return None if found is None else Line.from_tree(found)

    def put(self, decided_by: Any, line: Line) -> None:
        """Keep a line: on the disk when this returns."""
        self._lines[digest(decided_by)] = line.tree()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"version": VERSION, "lines": self._lines})
