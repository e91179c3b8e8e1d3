"""What selection reads, band by band: records and labels of a run, and the base model's weights.

Arrays have the tensor's own shape. An input of a linear layer is a column, of a ``Conv1D`` that was recorded without
quantization a row: those are the source's ``transposed`` tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tinyonn.dense.parameters import Parameter, kind_of
from tinyonn.errors import InputError
from tinyonn.store.records import UInt8, UInt16

if TYPE_CHECKING:
    from tinyonn.run import Run
    from tinyonn.store.reader import Reader

Float32 = np.ndarray[Any, np.dtype[np.float32]]
ReadWeights = Callable[[str, int, int], np.ndarray]  # (tensor, first row, last row) -> [rows, columns]
DROPPED = 255  # group of a weight that is not kept
EXPONENTS = ("input", "gradient", "share", "weight")  # of S, as rows name them
TRUNK = ("norm", "bias", "embedding", "head")  # kinds of modules that are never cut


@dataclass(frozen=True)
class Band:
    """Whole rows of a tensor; what was not asked for is None.

    Attributes
    ----------
    first : int
        Number of the first row.
    records : uint16 [rows, columns]
        Scored.
    labels : uint8 [rows, columns]
        Cell of every weight; None also where the source has no labels.
    weights : float32 [rows, columns]
    """

    first: int
    records: UInt16 | None = None
    labels: UInt8 | None = None
    weights: Float32 | None = None


class Rows(Protocol):
    """What a score is made from: records with their codebooks, and weights.

    Attributes
    ----------
    transposed : collection of str
        Names of tensors whose rows are inputs.
    """

    @property
    def transposed(self) -> Collection[str]: ...  # noqa: D102

    def attributes(self, name: str) -> Mapping[str, Any]:
        """Of the tensor's records: ``fields`` with codebooks and bases."""
        ...

    def band(self, name: str, first: int, last: int, needs: Collection[str]) -> Band:
        """Rows [first, last) with those of ``records``, ``labels``, ``weights`` that are needed."""
        ...


class Source(Rows, Protocol):
    """A scored (and clustered) model, for selection; picklable, so that tasks can run elsewhere.

    Attributes
    ----------
    parameters : tuple of Parameter
        All of the model.
    cells : int
        How many; 0 where there are no labels, and all weights count as one cell.
    slices : int
    identity : str
        Digest of what the records and labels were made from.
    """

    @property
    def parameters(self) -> tuple[Parameter, ...]: ...  # noqa: D102
    @property
    def cells(self) -> int: ...  # noqa: D102
    @property
    def slices(self) -> int: ...  # noqa: D102
    @property
    def identity(self) -> str: ...  # noqa: D102


class RunSource:
    """A run's snapshot, and weights from wherever the base model is.

    Parameters
    ----------
    run : Run
        Scored; clustered too, unless `labels` is False.
    weights : callable, optional
        ``weights(name, first, last)``: rows of the tensor as the model computes with them (NF4 dequantized), in the
        tensor's recorded orientation. Without it, scores that need weights are refused.
    transposed : collection of str
    labels : bool
        Read labels; False treats all weights as one cell.

    Attributes
    ----------
    clustered : mapping
        Attributes of the labels.
    scored_by : tuple of 4 floats
        a, b, c and d of the S in the rows.

    Raises
    ------
    InputError
        Rows or labels are missing, or the labels were made from other rows.
    """

    def __init__(
        self,
        run: Run,
        weights: ReadWeights | None = None,
        transposed: Collection[str] = (),
        labels: bool = True,
    ) -> None:
        self._reader: Reader = run.store.reader()
        self._weights = weights
        self._folders = [("records", "rows")] + [("labels", "labels")] * labels
        self.parameters = run.manifest.parameters
        self.transposed = frozenset(transposed)
        self.slices = len(run.slices)
        scored, clustered = self._reader.stage("rows"), self._reader.stage("labels") if labels else None
        where = run.store.location
        if scored is None:
            raise InputError(f"{where} is not scored yet; run `tinyonn score` first")
        self.scored_by = score_of(scored, where)
        if labels and clustered is None:
            raise InputError(f"{where} has no labels yet; run `tinyonn cluster` first")
        if clustered is not None and clustered["described"]["scored"] != scored:
            raise InputError(
                f"the labels of {where} were made from other rows than the present ones "
                f"({_made_of(clustered['described']['scored'])}, now {_made_of(scored)}); run `tinyonn cluster` again"
            )
        if clustered is not None and "means" not in clustered:
            raise InputError(
                f"the labels of {where} are of an earlier version, whose cells were no experts; run `tinyonn cluster` "
                "again"
            )
        self.clustered: Mapping[str, Any] = clustered or {}
        self.cells: int = 0 if clustered is None else clustered["described"]["config"]["cells"]
        # The centres are in it, so that another clustering of the same rows is another source.
        described = [scored, clustered, [(p.name, p.shape) for p in self.parameters]]
        self.identity = digest(described)

    def attributes(self, name: str) -> Mapping[str, Any]:
        """Of the tensor's records."""
        return self._reader.output("rows", name).attrs

    def band(self, name: str, first: int, last: int, needs: Collection[str]) -> Band:
        """Rows [first, last); whole chunks are decoded in place."""
        from tinyonn.store.arrays import read_chunk, read_rows

        found: dict[str, np.ndarray] = {}
        for field, folder in self._folders:
            if field in needs:
                array = self._reader.output(folder, name)
                what = self._reader.what(folder, name)
                chunk = array.chunks[0]
                if first % chunk == 0 and last == min(first + chunk, array.shape[0]):
                    found[field] = np.empty((last - first, *array.shape[1:]), array.dtype)
                    read_chunk(array, first, last, found[field], what)
                else:
                    found[field] = read_rows(array, first, last, what)
        if "weights" in needs:
            found["weights"] = self._read_weights(name, first, last)
        return Band(first, **found)

    def _read_weights(self, name: str, first: int, last: int) -> Float32:
        if self._weights is None:
            raise missing_weights(name)
        band = np.ascontiguousarray(self._weights(name, first, last), dtype=np.float32)
        shape = next(p.shape for p in self.parameters if p.name == name)
        if band.shape != (last - first, *shape[1:]):
            raise InputError(
                f"rows {first}-{last} of {name} have the shape {list(band.shape)} in the base model and "
                f"{[last - first, *shape[1:]]} in the run; give the model that was recorded"
            )
        return band


@dataclass(frozen=True)
class ArraySource:
    """The same from arrays in memory: by tensor ``records``, ``labels``, ``weights``, whichever there are."""

    parameters: tuple[Parameter, ...]
    arrays: Mapping[str, Mapping[str, np.ndarray]]
    attribute: Mapping[str, Mapping[str, Any]]
    cells: int = 0
    slices: int = 1
    transposed: frozenset[str] = frozenset()
    identity: str = "arrays"

    def attributes(self, name: str) -> Mapping[str, Any]:
        """Of the tensor's records."""
        return self.attribute[name]

    def band(self, name: str, first: int, last: int, needs: Collection[str]) -> Band:
        """Rows [first, last)."""
        arrays = self.arrays[name]
        if "weights" in needs and "weights" not in arrays:
            raise missing_weights(name)
        wanted = [field for field in needs if field in arrays and (field != "labels" or self.cells)]
        return Band(first, **{field: np.ascontiguousarray(arrays[field][first:last]) for field in wanted})


def score_of(scored: Mapping[str, Any], where: str) -> tuple[float, float, float, float]:
    """a, b, c and d of S, from the attributes of rows.

    Raises
    ------
    InputError
        An earlier version scored them.
    """
    weights = scored["weights"]
    if tuple(weights) != EXPONENTS:
        raise InputError(f"{where} was scored by an earlier version; run `tinyonn score` again")
    a, b, c, d = (float(weights[name]) for name in EXPONENTS)
    return a, b, c, d


def check_labels(labels: UInt8, cells: int, name: str) -> None:
    """Refuse labels that are no cell's."""
    if (top := int(labels.max())) >= cells:
        raise InputError(
            f"{name} has a weight with the label {top}, but there are {cells} cells; run `tinyonn cluster` again"
        )


def missing_weights(name: str) -> InputError:
    """The error for a score that needs what the source cannot read."""
    return InputError(
        f"the score or the allocation needs the weights of {name} and the source has none; give the base model, or "
        "choose the score random and allocation: uniform"
    )


def tensors_outside(parameters: Collection[Parameter]) -> tuple[Parameter, ...]:
    """The tensors that selection cuts: linear, of no kind in the trunk, in model order."""
    return tuple(p for p in parameters if p.kind == "linear" and kind_of(p) not in TRUNK)


def digest(tree: Any) -> str:
    """32 hexadecimal digits of a JSON tree."""
    text = json.dumps(tree, sort_keys=True, default=list)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _made_of(scored: Mapping[str, Any]) -> str:
    samples = sum(scored["segments"].values())
    weights = ", ".join(f"{name} {value:g}" for name, value in scored["weights"].items())
    return f"{samples:,} samples, weights of S {weights}"
