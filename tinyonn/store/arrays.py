"""How one tensor's records lie in the store: bands of whole rows, codec, attributes, writing and reading.

Codecs: bytes, bitshuffle + lz4 (see docs/decisions/001-codec.md), crc32c. The array's attributes hold all
that is needed to read the codes without this package.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from math import ceil, prod
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import zarr
from icechunk import ForkSession
from numcodecs import blosc
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import StorePath

from tinyonn.errors import StoreDamagedError
from tinyonn.store.faults import translated
from tinyonn.store.manifest import Segment
from tinyonn.store.nodes import REMEDY, read_node, write_node
from tinyonn.store.records import CODES, SHIFTS, STATISTICS, Float64, TensorCalibration, UInt16

# A segment is written by one process beside others; a few requests at a time fill a disk or a link.
# Chunks of zeros are stored like all others: what is absent must be an error, never a zero.
zarr.config.set({"async.concurrency": 4, "array.write_empty_chunks": True})

T = TypeVar("T")
MiB = 2**20
CODECS: list[dict[str, Any]] = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {
        "name": "blosc",
        "configuration": {
            "typesize": 2,
            "cname": "lz4",
            "clevel": 1,
            "shuffle": "bitshuffle",
            "blocksize": 0,
        },
    },
    {"name": "crc32c"},
]
BYTE_CODECS: list[dict[str, Any]] = [
    {"name": "bytes"},
    {
        "name": "blosc",
        "configuration": {
            "typesize": 1,
            "cname": "lz4",
            "clevel": 1,
            "shuffle": "bitshuffle",
            "blocksize": 0,
        },
    },
    CODECS[2],
]


def band_rows(shape: tuple[int, ...], itemsize: int = 2, target: int = 8 * MiB) -> int:
    """Rows of one chunk: whole rows, about `target` bytes, spread evenly; elements for a 1-D tensor.

    Parameters
    ----------
    shape : tuple of int
        The tensor's shape; rows are its first axis.
    itemsize, target : int
        Bytes per element and per chunk. Chunks come out between target / 2 and target, smaller only when the
        whole tensor is, larger only when a single row is.
    """
    row = prod(shape[1:]) * itemsize
    most = max(1, target // row)
    return ceil(shape[0] / ceil(shape[0] / most))


def bands(shape: tuple[int, ...], itemsize: int = 2, target: int = 8 * MiB) -> Iterator[tuple[int, int]]:
    """Half-open row ranges of the chunks of a tensor, in order."""
    rows = band_rows(shape, itemsize, target)
    for first in range(0, shape[0], rows):
        yield first, min(first + rows, shape[0])


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * most)] for i in range(most)]


class BandWriter:
    """Writes one array of a stage into a fork, band by band; nothing is visible before the commit.

    Parameters
    ----------
    fork : icechunk.ForkSession
    path : str
        Of the array, such as ``rows/model.embed_tokens.weight``.
    shape : tuple of int
    dtype : str
        ``uint16`` or ``uint8``; chunks are those of the tensor's records.
    attributes : dict
    """

    def __init__(
        self, fork: ForkSession, path: str, shape: tuple[int, ...], dtype: str, attributes: dict[str, Any]
    ) -> None:
        self._path = path
        chunks = (band_rows(shape), *shape[1:])
        with translated(f"writing {path}"):
            self._array = create_array(fork.store, path, shape, dtype, chunks, attributes)

    def write(self, first: int, band: np.ndarray) -> None:
        """Write whole chunks from a row on."""
        with translated(f"writing {self._path}"):
            self._array[first : first + band.shape[0]] = band


def attributes_of(calibration: TensorCalibration, codebooks: Float64) -> dict[str, Any]:
    """The attributes that make a tensor's records readable without this package.

    A code ``k`` of a field, ``record >> shift & 15``, stands for the mean ``codebook[k]``: for act and grad a
    mean level, where level ``n`` begins at the float32 with bits ``n + base << 22``; for freq a share.
    """
    return {
        "fields": {
            "act": _field("act", "mean level", codebooks) | {"base": calibration.act_base},
            "grad": _field("grad", "mean level", codebooks) | {"base": calibration.grad_base},
            "freq": _field("freq", "share of samples with act > 2 ** (threshold / 8)", codebooks)
            | {"threshold": calibration.freq_threshold},
            "score": {"shift": SHIFTS["score"], "bits": 4, "unit": "none until scored"},
        },
        "level": "clip((bits(float32 value) >> 22) - base, 0, 15)",
    }


def _field(name: str, unit: str, codebooks: Float64) -> dict[str, Any]:
    codebook = [float(entry) for entry in codebooks[STATISTICS.index(name)]]
    return {"shift": SHIFTS[name], "bits": 4, "unit": unit, "codebook": codebook}


def codebooks_of(array: zarr.Array[Any], what: str) -> Float64:
    """The codebooks in an array's attributes: float64 [3, 16], in the order of ``STATISTICS``.

    Raises
    ------
    StoreDamagedError
        They are not 16 finite, increasing entries each; names `what`.
    """
    try:
        fields: Any = array.attrs["fields"]
        books = np.array([fields[name]["codebook"] for name in STATISTICS], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreDamagedError(f"{what} has no codebooks ({error!r}); {REMEDY}") from None
    whole = books.shape == (len(STATISTICS), CODES) and np.isfinite(books).all()
    if not whole or not (np.diff(books) > 0).all():
        raise StoreDamagedError(
            f"the codebooks of {what} are not {CODES} finite, increasing means each; {REMEDY}"
        )
    return books


def create_array(
    store: Any,
    path: str,
    shape: tuple[int, ...],
    dtype: str,
    chunks: tuple[int, ...],
    attributes: dict[str, Any],
) -> zarr.Array[Any]:
    """Create an array in a place known to be empty.

    The metadata are written straight, without the look-ups of ``zarr.create_array``: with hundreds of small
    tensors those are half the cost of a commit.
    """
    metadata: dict[str, Any] = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": CODECS if dtype == "uint16" else BYTE_CODECS,
        "attributes": attributes,
    }
    return zarr.Array.from_dict(StorePath(store, path), write_node(store, path, metadata))


def open_array(store: Any, path: str, where: str) -> zarr.Array[Any]:
    """Open an array for reading, in one request.

    Parameters
    ----------
    store : zarr Store
    path : str
    where : str
        The store's location, for messages.

    Raises
    ------
    StoreDamagedError
        It is not there, or its metadata are not what was written.
    """
    metadata = read_node(store, path, where)
    if metadata is None:
        raise StoreDamagedError(f"{where}: {path} is missing from the store; {REMEDY}")
    return zarr.Array.from_dict(StorePath(store, path), metadata)


class SegmentWriter:
    """Writes one segment's tensors into a fork; lives where the segment was computed.

    Nothing is visible to anyone before the driver commits the fork.

    Parameters
    ----------
    fork : icechunk.ForkSession
        From `Store.begin`.
    slice : str
    first, last : int
        The segment's half-open range of positions.
    """

    def __init__(self, fork: ForkSession, slice: str, first: int, last: int) -> None:
        self.segment = Segment(slice, first, last)
        self._store = fork.store

    def write(
        self,
        name: str,
        shape: tuple[int, ...],
        calibration: TensorCalibration,
        codebooks: Float64,
        bands: Iterable[tuple[int, UInt16]],
    ) -> None:
        """Write one tensor.

        Parameters
        ----------
        name : str
            The parameter's name.
        shape : tuple of int
            The tensor's own shape.
        calibration : TensorCalibration
        codebooks : float64 [3, 16]
            Both go into the attributes.
        bands : iterable of (first row, uint16 array [rows, ...])
            In order and without gaps, each a whole number of chunks (`band_rows`) except the last.

        Raises
        ------
        CapacityError
            The disk is full.
        """
        rows = band_rows(shape)
        with translated(f"writing {name} of segment {self.segment.name}"):
            array = create_array(
                self._store,
                f"{self.segment.path}/{name}",
                shape,
                "uint16",
                (rows, *shape[1:]),
                attributes_of(calibration, codebooks),
            )
        done = 0
        for first, band in bands:
            last = first + band.shape[0]
            assert first == done and band.shape[1:] == shape[1:] and band.dtype == np.uint16
            assert last == shape[0] or last % rows == 0, (
                f"band {first}-{last} of {name} is not whole chunks of {rows} rows"
            )
            with translated(f"writing {name} of segment {self.segment.name}"):
                array[first:last] = band
            done = last
        assert done == shape[0], f"{name}: {done} of {shape[0]} rows were written"


def read_rows(array: zarr.Array[Any], first: int, last: int, what: str) -> UInt16:
    """Read rows of an array, chunk by chunk: one that is missing is an error, where Zarr would read zeros.

    Raises
    ------
    StoreDamagedError
        Names `what` and the first damaged chunk.
    """
    return read_together([(array, what)], first, last)[0]


def read_chunk(array: zarr.Array[Any], first: int, last: int, out: np.ndarray, what: str) -> None:
    """Read the rows of exactly one chunk into a contiguous array of as many elements; errors as in `read_rows`.

    The codecs are undone here, straight into `out`: Zarr's way, which also serves parts of chunks and other codecs,
    copies each chunk twice more and takes a third longer (docs/decisions/009-score-and-cluster.md).
    """
    rows = array.chunks[0]
    assert first % rows == 0 and last == min(first + rows, array.shape[0]) and out.flags.c_contiguous
    number = first // rows
    with translated(_chunk_of(array, number, what)):
        data = sync(array.store_path.store.get(_key(array, number), default_buffer_prototype()))
        _decode(array, data, last - first, out)


def read_chunks(arrays: Sequence[tuple[zarr.Array[Any], str]], first: int, last: int) -> list[np.ndarray]:
    """`read_chunk` of several (array, name), in the arrays' own shape."""
    found = []
    for array, what in arrays:
        out = np.empty((last - first, *array.shape[1:]), array.dtype)
        read_chunk(array, first, last, out, what)
        found.append(out)
    return found


def read_together(arrays: Sequence[tuple[zarr.Array[Any], str]], first: int, last: int) -> list[UInt16]:
    """Read the same rows of several (array, name), their chunks fetched at once; errors as in `read_rows`."""
    found = [np.empty((last - first, *array.shape[1:]), array.dtype) for array, _ in arrays]
    rows = arrays[0][0].chunks[0]
    for number in range(first // rows, ceil(last / rows)):
        begin, end = number * rows, min((number + 1) * rows, arrays[0][0].shape[0])
        low, high = max(first, begin), min(last, end)
        for (array, what), data, out in zip(arrays, _fetch(arrays, number), found, strict=True):
            with translated(_chunk_of(array, number, what)):
                if isinstance(data, BaseException):
                    raise data
                if (low, high) == (begin, end):
                    _decode(array, data, end - begin, out[low - first : high - first])
                    continue
                whole = np.empty((end - begin, *array.shape[1:]), array.dtype)
                _decode(array, data, end - begin, whole)
                out[low - first : high - first] = whole[low - begin : high - begin]
    return found


def _fetch(arrays: Sequence[tuple[zarr.Array[Any], str]], number: int) -> list[Any]:
    """Bytes of a chunk of every array, or what was raised instead."""

    async def gather() -> list[Any]:
        prototype = default_buffer_prototype()
        reads = (array.store_path.store.get(_key(array, number), prototype) for array, _ in arrays)
        return await asyncio.gather(*reads, return_exceptions=True)

    return sync(gather())


def _decode(array: zarr.Array[Any], data: Any, count: int, out: np.ndarray) -> None:
    """Undo the codecs of a chunk of `count` rows into a contiguous array of as many elements."""
    if data is None:
        raise ValueError("the chunk is not there")
    stored = np.asarray(data.as_numpy_array())
    if int(google_crc32c.value(stored[:-4])) != int.from_bytes(stored[-4:].tobytes(), "little"):
        raise ValueError("stored and computed checksum do not match")
    rows = array.chunks[0]
    whole = out if count == rows else np.empty(rows * (out.size // count), array.dtype)
    blosc.decompress(stored[:-4], whole)
    if whole is not out:  # the last chunk is stored in full
        out.reshape(-1)[:] = whole[: out.size]


def _key(array: zarr.Array[Any], number: int) -> str:
    return f"{array.store_path.path}/c/{_place(array, number)}"


def _place(array: zarr.Array[Any], number: int) -> str:
    """Chunks are bands of whole rows."""
    return f"{number}{'/0' * (array.ndim - 1)}"


def _chunk_of(array: zarr.Array[Any], number: int, what: str) -> str:
    return f"reading {what}, chunk {_place(array, number)}"
