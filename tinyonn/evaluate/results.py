"""Evaluated lines, kept in one JSON file so that a killed evaluation goes on where it was."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyonn.errors import InputError
from tinyonn.evaluate.perplexity import Losses
from tinyonn.experts.source import digest

VERSION = 1


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
    mask_slice : str or None
        For masks made of one slice's statistics: which.
    """

    method: str
    share: float
    weights: int
    losses: Losses
    mask_slice: str | None = None

    def tree(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "mean": self.losses.mean, "perplexity": self.losses.perplexity}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Line:
        """From `tree`."""
        return cls(
            tree["method"], tree["share"], tree["weights"], Losses(**tree["losses"]), tree["mask_slice"]
        )


class Results:
    """A file of lines by a digest of what decides them.

    Parameters
    ----------
    path : Path
        Made with its folder at the first `put`; one of another version is replaced.

    Raises
    ------
    InputError
        It is there and not readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                tree = json.loads(path.read_text("utf-8"))
                self._lines = dict(tree["lines"]) if tree["version"] == VERSION else {}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path}: not a readable file of results ({type(error).__name__}: {error}); "
                    "delete it and evaluate again"
                ) from None

    def get(self, decided_by: Any) -> Line | None:
        """The line that was evaluated from the same, if there is one."""
        found = self._lines.get(digest(decided_by))
        return None if found is None else Line.from_tree(found)

    def put(self, decided_by: Any, line: Line) -> None:
        """Keep a line: on the disk when this returns."""
        self._lines[digest(decided_by)] = line.tree()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        with partial.open("w", encoding="utf-8") as stream:
            json.dump({"version": VERSION, "lines": self._lines}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.path)
