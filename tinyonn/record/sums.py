"""The sums of a tensor: a site is one parameter tensor, where it meets its inputs, and what is being summed for it.

Norms and biases are small, many, and therefore recorded together: their gradients and inputs are gathered during a
sample and added in one go at its end, to sums that lie side by side. `act` and `freq` are summed per weight as `grad`
is, since a vector has as many inputs as weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numba import njit

from tinyonn.dense.nf4 import dequantized, is_nf4
from tinyonn.dense.parameters import Parameter, Use
from tinyonn.record.activations import BINS, add_dense_levels, add_to_histograms
from tinyonn.record.device import gpu_kernels, on_host
from tinyonn.record.encode import TensorSums
from tinyonn.record.gradients import CountSink, LevelSink, product_bands, spill
from tinyonn.record.levels import FLOAT32_SHIFT, LEVELS, levels_torch
from tinyonn.store.records import TensorCalibration

Sink = LevelSink | CountSink
EIGHTHS = 1024  # bins of 1/8 octave around 1
FUSED_TOKENS = 1024  # up to here a GPU forms product and levels in one kernel: docs/decisions/020
COUNTED_ROWS = 512  # rows of a dense site that its calibration looks at


@dataclass
class Site:
    """State of one tensor, of shape [rows, columns] (a vector is one row).

    Attributes
    ----------
    parameter : Parameter
    uses : list of Use
        More than one for a tied tensor.
    """

    parameter: Parameter
    uses: list[Use]
    grad: torch.Tensor | None = None  # uint8 [rows, columns], beside the compute
    act: torch.Tensor | None = None  # uint8, dense sites only
    freq: torch.Tensor | None = None
    journal: list[torch.Tensor] = field(
        default_factory=list
    )  # uint8 [inputs] per sample since the last spill
    grad_total: np.ndarray | None = None  # uint16, host
    act_total: np.ndarray | None = None
    freq_total: np.ndarray | None = None
    histograms: np.ndarray | None = None  # uint16 [inputs, 256], host
    act_counts: np.ndarray | None = None  # int64 [512], calibration of a dense site
    act_batch: np.ndarray | None = None  # of the batch under way
    calibration: TensorCalibration | None = None
    sink: Sink | None = None

    @property
    def tied(self) -> bool:
        """Whether several modules use the tensor."""
        return len(self.uses) > 1

    @property
    def vector(self) -> bool:
        """Whether the tensor is a norm or bias; see `VectorSums`."""
        return len(self.parameter.shape) == 1

    @property
    def dense(self) -> bool:
        """Whether `act` and `freq` have sums of their own: vectors, which are small, and tied tensors, which must."""
        return self.tied or self.vector

    @property
    def counting(self) -> bool:
        """Whether the calibration's first pass is under way."""
        return isinstance(self.sink, CountSink)

    @property
    def by_row(self) -> bool:
        """Whether the input belongs to the tensor's row."""
        return self.uses[0].operation in ("embedding", "conv1d")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The tensor's shape as [rows, columns]."""
        shape = self.parameter.shape
        return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])

    @property
    def inputs(self) -> int:
        """Number of inputs the tensor meets."""
        return self.matrix_shape[0 if self.by_row else 1]

    def open(
        self, calibration: TensorCalibration, device: torch.device, spills: bool, pool: Executor | None
    ) -> None:
        """Allocate the sums of a segment; `spills` says that more than 17 samples may come."""
        self.calibration = calibration
        shape = self.matrix_shape
        if not self.vector:
            self.grad = torch.zeros(shape, dtype=torch.uint8, device=device)
            self.sink = LevelSink(self.grad, calibration.grad_base, pool)
        if self.tied:
            self.act, self.freq = torch.zeros_like(self.grad), torch.zeros_like(self.grad)  # type: ignore[arg-type]
        if not self.dense:
            self.histograms = np.zeros((self.inputs, BINS), np.uint16)
        self.grad_total = np.zeros(shape, np.uint16) if spills else None
        self.act_total = np.zeros(shape, np.uint16) if spills and self.dense else None
        self.freq_total = np.zeros(shape, np.uint16) if spills and self.dense else None
        self.journal = []

    def open_counts(self) -> None:
        """Prepare the calibration's first pass: column bins as always, gradients only counted."""
        self.sink = CountSink()
        self.histograms = np.zeros((self.inputs, BINS), np.uint16)
        self.act_counts = np.zeros(EIGHTHS, np.int64) if self.dense else None
        self.act_batch = np.zeros(EIGHTHS, np.int64) if self.dense else None

    def close(self) -> None:
        """Free the sums."""
        self.act_counts = self.act_batch = None
        self.grad = self.act = self.freq = self.sink = None
        self.grad_total = self.act_total = self.freq_total = self.histograms = None
        self.journal = []

    def forget_batch(self) -> None:
        """Drop what was recorded since the last spill."""
        self.journal = []
        if isinstance(self.sink, CountSink):
            self.sink.forget()
        if self.act_batch is not None:
            self.act_batch[:] = 0
        for sums in (self.grad, self.act, self.freq):
            if sums is not None:
                sums.zero_()

    def keep_batch(self) -> None:
        """Move what was recorded since the last spill into the segment's sums on the host."""
        if self.journal and self.histograms is not None:
            add_to_histograms(torch.stack(self.journal).cpu().numpy(), self.histograms)
        self.journal = []
        if isinstance(self.sink, CountSink):
            self.sink.keep()
        if self.act_counts is not None and self.act_batch is not None:
            self.act_counts += self.act_batch
            self.act_batch[:] = 0
        pairs = ((self.grad, self.grad_total), (self.act, self.act_total), (self.freq, self.freq_total))
        for sums, total in pairs:
            if sums is not None and total is not None:
                spill(sums.cpu().numpy().reshape(-1), total.reshape(-1))
                sums.zero_()

    def sums(self, samples: int) -> TensorSums:
        """The segment's sums, on the host."""

        def host(sums: torch.Tensor | None, total: Any) -> Any:
            return total if total is not None or sums is None else sums.cpu().numpy()

        grad, act, freq = (
            host(self.grad, self.grad_total),
            host(self.act, self.act_total),
            host(self.freq, self.freq_total),
        )
        return TensorSums(samples, grad, self.histograms, self.by_row, act, freq)

    def add_dense(self, weights: torch.Tensor, row_square: torch.Tensor, column_square: torch.Tensor) -> None:
        """Add one sample's `act` and `freq` to sums of their own; see `add_dense_levels`."""
        if self.act_batch is not None:
            rows = slice(None, None, max(1, weights.shape[0] // COUNTED_ROWS))
            values = weights[rows].float().abs() * (row_square[rows, None] + column_square[None, :]).sqrt()
            eighths = (values[values > 0].log2() * 8).floor().long() + EIGHTHS // 2
            self.act_batch += torch.bincount(eighths.clamp_(0, EIGHTHS - 1), minlength=EIGHTHS).cpu().numpy()
            return
        assert self.act is not None and self.freq is not None and self.calibration is not None
        threshold = 2.0 ** (self.calibration.freq_threshold / 8)
        if (gpu := gpu_kernels(weights)) is not None and weights.is_contiguous():
            squares = row_square, column_square
            gpu.add_dense_levels(weights, *squares, self.calibration.act_base, threshold, self.act, self.freq)
            return
        if on_host(weights):
            arrays = (weights.float().numpy(), row_square.numpy(), column_square.numpy())
            add_dense_levels(
                *arrays, self.calibration.act_base, threshold, self.act.numpy(), self.freq.numpy()
            )
            return
        values = weights.float().abs() * (row_square[:, None] + column_square[None, :]).sqrt()
        self.act += levels_torch(values, self.calibration.act_base)
        self.freq += (values > threshold).to(torch.uint8)


def mean_square(X_TI: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared inputs: float32 [I]."""
    return X_TI.float().square_().mean(0) if X_TI.dtype != torch.float32 else X_TI.square().mean(0)


def token_share(ids_T: torch.Tensor, vocabulary: int, scale: float) -> torch.Tensor:
    """Mean square of an embedding's one-hot inputs: the share of tokens of each row; float32 [vocabulary]."""
    counts = torch.zeros(
        vocabulary, dtype=torch.int32, device=ids_T.device
    )  # bincount would wait for the device
    counts.index_add_(0, ids_T, torch.ones_like(ids_T, dtype=torch.int32))
    return counts.float() * (scale * scale / ids_T.numel())


def embedding_gradient(
    ids_T: torch.Tensor, G_TH: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of an embedding that met a token, sorted, and their summed gradients float32 [rows, H], tokens in order."""
    rows, place = torch.unique(ids_T, return_inverse=True)
    gradient = torch.zeros(rows.numel(), G_TH.shape[1], device=G_TH.device)
    if (gpu := gpu_kernels(G_TH)) is not None:
        gpu.add_rows(place, G_TH.contiguous(), scale, gradient, 0)
        return rows, gradient
    if G_TH.is_cuda:  # index_add_ would add in any order
        return rows, gradient.index_put_((place,), G_TH.float(), accumulate=True).mul_(scale)
    return rows, gradient.index_add_(0, place, G_TH.float()).mul_(scale)


def normalised(X: torch.Tensor, use: Use) -> torch.Tensor:
    """What a norm's weight multiplies, float32, same shape as X."""
    X = X.float()
    if use.operation == "layer_norm":
        X = X - X.mean(-1, keepdim=True)
    return X * torch.rsqrt(X.square().mean(-1, keepdim=True) + use.eps)


def norm_sums(X_TI: torch.Tensor, G_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of a norm's weight and mean square of its inputs, both float32 [I].

    Parameters
    ----------
    X_TI : float32 [T, I]
        From `normalised`.
    G_TI : [T, I]
        Gradient of the norm's output.
    """
    G = G_TI.float()
    if not on_host(X_TI):
        return (X_TI * G).sum(0), X_TI.square().mean(0)
    sums = np.zeros((2, X_TI.shape[1]), np.float32)
    _add_norm(X_TI.numpy(), G.numpy(), sums)
    return torch.from_numpy(sums[0]), torch.from_numpy(sums[1] / np.float32(X_TI.shape[0]))


@njit(nogil=True, cache=True)
def _add_norm(X: Any, G: Any, sums: Any) -> None:
    for t in range(X.shape[0]):
        for j in range(X.shape[1]):
            sums[0, j] += X[t, j] * G[t, j]
            sums[1, j] += X[t, j] * X[t, j]


def feed_linear(sink: Any, use: Use, X_TI: torch.Tensor, G_TO: torch.Tensor, top: torch.Tensor) -> None:
    """Form a linear layer's weight gradient into a sink; raises `top`, int32 [1].

    Band by band, or on a GPU, where tokens are few and the sink adds levels, without writing the gradient at all.
    """
    A, B = (X_TI, G_TO) if use.operation == "conv1d" else (G_TO, X_TI)
    if A.dtype != B.dtype:
        A, B = A.float(), B.float()
    few = A.dtype == torch.bfloat16 and len(A) <= FUSED_TOKENS
    if few and isinstance(sink, LevelSink) and (gpu := gpu_kernels(A)) is not None:
        gpu.add_product_levels(A.contiguous(), B.contiguous(), sink.base, sink.sums, top)
        return
    for first, band in product_bands(A, B):
        sink.add(band, first, top)


def feed_embedding(sink: Sink, use: Use, ids_T: torch.Tensor, G_TH: torch.Tensor, top: torch.Tensor) -> None:
    """Sum an embedding's gradient by row into a sink; raises `top`, int32 [1]."""
    gpu = gpu_kernels(G_TH)
    if gpu is not None and isinstance(sink, LevelSink):
        gpu.add_row_levels(ids_T, G_TH.contiguous(), use.scale, sink.base, sink.sums, top)
    else:
        sink.add_rows(*embedding_gradient(ids_T, G_TH, use.scale), top)


class WithRows:
    """A sink in front of another that adds embeddings' gradients to the bands of the head's.

    Parameters
    ----------
    sink : LevelSink or CountSink
    parts : list of (ids, gradient, scale)
        int64 [T], float [T, H] and the factor on the embedding's output.
    """

    def __init__(self, sink: Sink, parts: list[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
        self.sink, self.parts = sink, parts
        gpu = gpu_kernels(parts[0][1]) if parts else None
        self._rows = [] if gpu else [embedding_gradient(*part) for part in parts]

    def add(self, band: torch.Tensor, first: int, top: torch.Tensor) -> None:
        """Add a band with the rows that fall into it; see `LevelSink.add`."""
        whole = band.float()
        for rows, values in self._rows:
            inside = (rows >= first) & (rows < first + band.shape[0])
            whole = whole.index_add(0, rows[inside] - first, values[inside])
        if not self._rows and (gpu := gpu_kernels(band)) is not None:
            for ids_T, G_TH, scale in self.parts:
                gpu.add_rows(ids_T, G_TH.contiguous(), scale, whole, first)
        self.sink.add(whole, first, top)


def weight_of(use: Use) -> torch.Tensor:
    """The tensor that a use multiplies, NF4 dequantized, in the tensor's own shape."""
    module: Any = use.module
    if use.operation != "bias" and is_nf4(module):
        return dequantized(module)
    weight: torch.Tensor = module.bias if use.operation == "bias" else module.weight
    return weight


class VectorSums:
    """uint8 sums of all open vectors, in one piece.

    Parameters
    ----------
    sites : sequence of Site
        Vectors with their calibration set; their sums become views of this object's.
    device : torch.device
    """

    def __init__(self, sites: Sequence[Site], device: torch.device) -> None:
        self.sites = sites
        sizes = [site.parameter.size for site in sites]
        self._sums = torch.zeros((3, sum(sizes)), dtype=torch.uint8, device=device)
        for site, sums in zip(sites, self._sums.split(sizes, dim=1), strict=True):
            site.act, site.grad, site.freq = (part[None] for part in sums)
        calibration = [site.calibration for site in sites]
        assert all(calibration)
        known = [(c.act_base, c.grad_base, 2.0 ** (c.freq_threshold / 8)) for c in calibration if c]
        table = np.array(known, dtype=np.float32).reshape(-1, 3).T
        self._known = torch.from_numpy(np.repeat(table, sizes, axis=1)).to(device)  # [3, weights]
        weights = [weight_of(site.uses[0]).detach().abs().float().reshape(-1) for site in sites]
        self._weights = torch.cat(weights) if weights else torch.zeros(0, device=device)
        self._gradients: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}

    def clear(self) -> None:
        """Forget what was gathered of a sample."""
        self._gradients.clear()
        self._squares.clear()

    def gather(self, name: str, gradient: torch.Tensor, square: torch.Tensor) -> None:
        """Keep a vector's gradient and the mean square of its inputs, float32 [n], until `add`."""
        self._gradients[name], self._squares[name] = gradient, square

    def add(self) -> bool | torch.Tensor:
        """Add the sample that was gathered; returns whether all of it was finite."""
        if not self.sites:
            return True
        names = [site.parameter.name for site in self.sites]
        gradients = torch.cat([self._gradients[name] for name in names])
        values = torch.cat([self._squares[name] for name in names]).sqrt_().mul_(self._weights)
        self.clear()
        if on_host(gradients):
            known, sums = self._known.numpy(), self._sums.numpy()
            return bool(_add_vectors(values.numpy(), gradients.numpy(), known, sums))
        act_base, grad_base, threshold = self._known
        self._sums[0] += _levels(values, act_base)
        self._sums[1] += _levels(gradients, grad_base)
        self._sums[2] += (values > threshold).to(torch.uint8)
        return torch.isfinite(values).all() & torch.isfinite(gradients).all()


def _levels(values: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    bits = values.abs().view(torch.int32) >> FLOAT32_SHIFT
    return (bits - base.to(torch.int32)).clamp_(0, LEVELS - 1).to(torch.uint8)


@njit(nogil=True, cache=True)
def _add_vectors(values: Any, gradients: Any, known: Any, sums: Any) -> bool:
    value_bits, gradient_bits = values.view(np.int32), gradients.view(np.int32)
    finite = True
    for i in range(values.size):
        act = (value_bits[i] & 0x7FFFFFFF) >> 22
        grad = (gradient_bits[i] & 0x7FFFFFFF) >> 22
        finite &= act < 510 and grad < 510
        sums[0, i] += np.uint8(min(max(act - int(known[0, i]), 0), 15))
        sums[1, i] += np.uint8(min(max(grad - int(known[1, i]), 0), 15))
        sums[2, i] += np.uint8(values[i] > known[2, i])
    return finite
