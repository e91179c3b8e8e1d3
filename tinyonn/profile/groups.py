"""Which group every weight is in: the experts and the core of the assembled model, or the cells of the run.

Groups are read as uint8 arrays of the tensor's recorded shape, 255 for what is in none. A source travels to workers as
a path or as a snapshot of the store, which their machines must reach.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numba import njit
from safetensors import SafetensorError, safe_open

from tinyonn.dense.parameters import Parameter
from tinyonn.dense.weights import BaseWeights
from tinyonn.errors import InputError
from tinyonn.experts.folder import compare, read_settings
from tinyonn.model.shards_tinyonn import ASSEMBLY, index_of
from tinyonn.score.source import DROPPED, RunSource, check_labels, tensors_outside
from tinyonn.store.records import UInt8

if TYPE_CHECKING:
    from tinyonn.config import ModelConfig
    from tinyonn.run import Run

Wanted = Literal["auto", "experts", "labels"]
Kind = Literal["assembly", "labels"]


@dataclass(frozen=True)
class Identity:
    """Which groups they are; a profile of other ones is of no use.

    Attributes
    ----------
    kind : str
        ``assembly``, with the core as the last group, or ``labels``, without one.
    id : str
        Of the assembly, or a digest of rows and labels.
    groups : int
    """

    kind: Kind
    id: str
    groups: int

    @property
    def experts(self) -> int:
        """Groups but for the core."""
        return self.groups - (self.kind == "assembly")

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.kind} {self.id}"


class WeightGroups(Protocol):
    """A source of groups; picklable.

    Attributes
    ----------
    identity : Identity
    tensors : tuple of Parameter
        Those that have groups, model order.
    """

    @property
    def identity(self) -> Identity: ...  # noqa: D102
    @property
    def tensors(self) -> tuple[Parameter, ...]: ...  # noqa: D102

    def read(self, name: str) -> UInt8:
        """Every weight's group, of the tensor's recorded shape."""
        ...


@dataclass(frozen=True)
class AssemblyGroups:
    """Those of an assembled model, from its shards.

    Attributes
    ----------
    folder : Path
    identity : Identity
    tensors : tuple of Parameter
    across : frozenset of str
        Tensors that were recorded as [in, out].
    """

    folder: Path
    identity: Identity
    tensors: tuple[Parameter, ...]
    across: frozenset[str]

    def read(self, name: str) -> UInt8:
        """Every weight's group.

        Raises
        ------
        InputError
            The shard is not there, damaged, or of another assembly.
        """
        module = f"base.{name.removesuffix('.weight')}"
        file = self._files.get(f"{module}.columns")
        if file is None:
            raise _unreadable(self.folder, f"no shard has {module}.columns")
        path = self.folder / file
        try:
            compare(path, [f"{module}.columns", f"{module}.row_pointer"])
            with safe_open(path, framework="np") as shard:
                found = (shard.metadata() or {}).get(ASSEMBLY)
                columns, pointer = (
                    shard.get_tensor(f"{module}.{part}") for part in ("columns", "row_pointer")
                )
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None
        if found != self.identity.id:
            raise InputError(
                f"{path} belongs to assembly {found} and config.json to {self.identity.id}; "
                "run `tinyonn assemble` again"
            )
        shape = next(parameter.shape for parameter in self.tensors if parameter.name == name)
        out, inputs = shape[::-1] if name in self.across else shape
        falls = pointer.size and (
            (np.diff(pointer) < 0).any() or pointer[0] != 0 or pointer[-1] != columns.size
        )
        if (
            falls
            or pointer.size != self.identity.groups * out + 1
            or (columns.size and int(columns.max()) >= inputs)
        ):
            raise InputError(
                f"{path}: {module} does not have {self.identity.groups} groups of a matrix [{out}, {inputs}]; "
                "run `tinyonn assemble` again"
            )
        group = np.full((out, inputs), DROPPED, np.uint8)
        _spread(columns, pointer, group)
        return np.ascontiguousarray(group.T) if name in self.across else group

    @cached_property
    def _files(self) -> dict[str, str]:
        """File of every tensor."""
        try:
            return index_of(sorted(self.folder.glob("model*.safetensors")))
        except ValueError as error:
            raise InputError(f"{error}, on {platform.node()}") from None


def _unreadable(path: Path, error: object) -> InputError:
    return InputError(
        f"{path} cannot be read on {platform.node()} ({error}); assemble again, or put the run's folder where all "
        "workers reach it"
    )


@dataclass(frozen=True)
class LabelGroups:
    """The cells of a clustered run.

    Attributes
    ----------
    source : RunSource
    """

    source: RunSource

    @property
    def identity(self) -> Identity:
        """Of the labels."""
        return Identity("labels", self.source.identity, self.source.cells)

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        """The linear tensors outside the trunk."""
        return tensors_outside(self.source.parameters)

    def read(self, name: str) -> UInt8:
        """Every weight's cell."""
        rows = next(parameter.shape[0] for parameter in self.tensors if parameter.name == name)
        labels = self.source.band(name, 0, rows, {"labels"}).labels
        assert labels is not None
        check_labels(labels, self.source.cells, name)
        return labels


def find_groups(run: Run, folder: Path, model: ModelConfig, wanted: Wanted = "auto") -> WeightGroups:
    """The groups to profile.

    Parameters
    ----------
    run : Run
    folder : Path
        Of the assembled model.
    model : ModelConfig
        The base model.
    wanted : str
        ``experts``: of the assembled model; ``labels``: of the run's cells; ``auto``: of the assembled model if there
        is one.

    Raises
    ------
    InputError
        What is wanted is not there or not complete.
    """
    if wanted == "labels" or (wanted == "auto" and not folder.exists()):
        return LabelGroups(RunSource(run))
    try:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError
        tree = read_settings(folder, "run `tinyonn assemble` again")
        identity = Identity("assembly", str(tree["assembly"]["id"]), int(tree["experts"]) + 1)
        modules = set(tree["sparse_layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{folder} holds no complete assembled model; run `tinyonn assemble`, or profile the run's cells with "
            "groups: labels"
        ) from None
    tensors = tuple(p for p in run.parameters if p.name.removesuffix(".weight") in modules)
    if len(tensors) != len(modules):
        lost = min(modules - {p.name.removesuffix(".weight") for p in tensors})
        raise InputError(
            f"{folder} has experts of {lost}, which {run.store.location} does not know; assemble this run again"
        )
    return AssemblyGroups(folder, identity, tensors, BaseWeights(model).recorded_across)


@njit(nogil=True, cache=True)
def _spread(columns: Any, pointer: Any, group: Any) -> None:
    out = group.shape[0]
    for place in range(pointer.size - 1):
        for entry in range(pointer[place], pointer[place + 1]):
            group[place % out, columns[entry]] = place // out
