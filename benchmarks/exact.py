"""Exact float64 statistics of every weight, beside which the recorded ones are judged. For small models only.

For each weight, over all samples: the sum of ``log2 act`` and of ``log2 |grad|``, nothing clipped; the count of
samples with `act` above the calibrated threshold; and, as integers, the sums of the levels, from which every INT4
counter starts. The products are formed in float64 from the X and G that the model itself computed with.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit

from tinyonn.corpus.file import Sample
from tinyonn.dense.parameters import Use
from tinyonn.dense.passes import attach
from tinyonn.record.recorder import Recorder
from tinyonn.record.sums import weight_of
from tinyonn.store.records import Float64, TensorCalibration

SMALLEST = 2.0**-126  # of float32's normal numbers: what is smaller counts as zero


class ExactTensor:
    """Exact statistics of one tensor, of shape [rows, columns] (a vector is one row).

    Attributes
    ----------
    grad_log2 : float64 [rows, columns]
        Sum over the samples with a gradient that is not zero.
    grad_nonzero, grad_levels : uint16 [rows, columns]
        How many they are; the sum of the levels over all samples.
    squares : list of float64 [inputs]
        Mean square of the tensor's inputs, for each sample.
    """

    def __init__(self, use: Use, calibration: TensorCalibration) -> None:
        W = weight_of(use).double().abs().numpy()
        self.weights: Float64 = W.reshape(1, -1) if W.ndim == 1 else W
        self.by_row = use.operation in ("embedding", "conv1d")
        self.calibration = calibration
        self.grad_log2 = np.zeros(self.weights.shape)
        self.grad_nonzero = np.zeros(self.weights.shape, np.uint16)
        self.grad_levels = np.zeros(self.weights.shape, np.uint16)
        self.squares: list[Float64] = []
        self._least = {"act": math.inf, "grad": math.inf}

    def add(self, gradient: Float64, square: Float64) -> None:
        """Add one sample: gradient float64 [rows, columns], mean squares of the inputs float64 [inputs]."""
        least = _add_gradient(
            gradient, self.calibration.grad_base, self.grad_log2, self.grad_nonzero, self.grad_levels
        )
        self._least["grad"] = min(self._least["grad"], least)
        self.squares.append(square)

    def means(self, zero: float | None) -> tuple[Float64, Float64, Float64]:
        """Mean log2 act, mean log2 |grad| and the share of samples above the threshold, float64 [rows, columns].

        Parameters
        ----------
        zero : float or None
            What the log2 of zero counts as; None: that of the smallest value of the tensor that is not zero.
        """
        n = len(self.squares)
        log2, nonzero, least = self._act_log2()
        logs = []
        for total, count, smallest in (
            (log2, nonzero, least),
            (self.grad_log2, self.grad_nonzero, self._least["grad"]),
        ):
            floor = zero if zero is not None else (math.log2(smallest) if smallest < math.inf else 0.0)
            logs.append((total + (n - count.astype(np.float64)) * floor) / n)
        return logs[0], logs[1], self.levels()[1] / n

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the levels of `act` and count of the samples above the threshold, uint16 [rows, columns]."""
        rms_IS = np.sqrt(np.stack(self.squares, axis=1))
        W_IO = np.ascontiguousarray(self.weights if self.by_row else self.weights.T)
        act, above = np.zeros(W_IO.shape, np.uint16), np.zeros(W_IO.shape, np.uint16)
        _count_levels(
            W_IO, rms_IS, self.calibration.act_base, 2.0 ** (self.calibration.freq_threshold / 8), act, above
        )
        return (act, above) if self.by_row else (act.T, above.T)

    def _act_log2(self) -> tuple[Float64, np.ndarray, float]:
        """``log2 act = log2 |W| + log2 rms``, summed where neither is zero; how often; the smallest act."""
        rms_SI = np.sqrt(np.stack(self.squares))
        seen_I = (rms_SI > 0).sum(axis=0)
        log2_I = np.log2(rms_SI, out=np.zeros_like(rms_SI), where=rms_SI > 0).sum(axis=0)
        side = (slice(None), None) if self.by_row else (None, slice(None))
        nonzero = np.where(self.weights > 0, seen_I[side], 0)
        weights = np.log2(self.weights, out=np.zeros_like(self.weights), where=self.weights > 0)
        total = np.where(nonzero > 0, nonzero * weights + log2_I[side], 0.0)
        lowest_I = np.where(rms_SI > 0, rms_SI, np.inf).min(axis=0)
        products = np.where(nonzero > 0, self.weights, np.inf) * lowest_I[side]
        return total, nonzero, float(products.min())


def exact_statistics(
    recorder: Recorder,
    samples: Iterable[Sample],
    calibration: dict[str, TensorCalibration],
    progress: Callable[[], None] = lambda: None,
) -> dict[str, ExactTensor]:
    """One more forward and backward pass over the samples, with taps of our own and the recorder's sums closed."""
    if tied := [name for name, site in recorder.sites.items() if site.tied]:
        raise SystemExit(f"{tied[0]} is tied; use a model whose embeddings and head are apart")
    recorder.open({}, spills=False)
    uses = {name: site.uses[0] for name, site in recorder.sites.items()}
    tensors = {name: ExactTensor(use, calibration[name]) for name, use in uses.items()}
    met: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    last_hidden: list[torch.Tensor] = []
    handles = [recorder.decoder.register_forward_hook(lambda *a: last_hidden.append(a[2].last_hidden_state))]
    for module_name, module in {use.module_name: use.module for use in uses.values()}.items():
        handles.append(attach(module, partial(_keep, met[module_name]), lambda: True))
    for sample in samples:
        recorder.run(sample)
        for name, use in uses.items():
            X, G = (torch.cat(parts).double() for parts in zip(*met[use.module_name], strict=True))
            inputs = last_hidden[0][0].detach().double() if use.module is recorder.head.module else X
            tensors[name].add(_gradient(use, X, G), _mean_square(use, inputs))
        last_hidden.clear()
        for pairs in met.values():
            pairs.clear()
        progress()
    for handle in handles:
        handle.remove()
    return tensors


def _keep(pairs: list[tuple[torch.Tensor, torch.Tensor]], X: torch.Tensor, G: torch.Tensor) -> None:
    pairs.append((X, G.detach().reshape(-1, G.shape[-1])))


def _normalised(use: Use, X: torch.Tensor) -> torch.Tensor:
    if use.operation == "layer_norm":
        X = X - X.mean(-1, keepdim=True)
    return X / torch.sqrt(X.square().mean(-1, keepdim=True) + use.eps)


def _gradient(use: Use, X: torch.Tensor, G: torch.Tensor) -> Float64:
    """Gradient of the sample's loss on the tensor, float64 [rows, columns]."""
    if use.operation == "embedding":
        gradient = torch.zeros(use.module.get_parameter("weight").shape, dtype=torch.float64)
        gradient.index_add_(0, X.long(), G * use.scale)
    elif use.operation in ("linear", "conv1d"):
        gradient = G.T @ X if use.operation == "linear" else X.T @ G
    elif use.operation == "bias":
        gradient = G.sum(0)[None]
    else:
        gradient = (_normalised(use, X) * G).sum(0)[None]
    return np.ascontiguousarray(gradient.numpy())


def _mean_square(use: Use, X: torch.Tensor) -> Float64:
    """Mean square of each input of the tensor over the tokens, float64 [inputs]."""
    if use.operation == "embedding":
        counts = torch.bincount(X.long(), minlength=use.module.get_parameter("weight").shape[0])
        return np.asarray(counts.double().numpy() * (use.scale**2 / X.numel()))
    if use.operation == "bias":
        return np.ones(use.module.get_parameter("bias").numel())
    if use.operation not in ("linear", "conv1d"):
        X = _normalised(use, X)
    return np.asarray(X.square().mean(0).numpy())


@njit(nogil=True, cache=True)
def _add_gradient(gradient: Any, base: int, log2: Any, nonzero: Any, levels: Any) -> float:
    buffer = np.empty(gradient.shape[1], np.float32)
    bits = buffer.view(np.int32)
    least = np.inf
    for i in range(gradient.shape[0]):
        for j in range(gradient.shape[1]):
            value = abs(gradient[i, j])
            buffer[j] = value
            if value >= SMALLEST:
                log2[i, j] += math.log2(value)
                nonzero[i, j] += 1
                least = min(least, value)
        for j in range(gradient.shape[1]):
            levels[i, j] += min(max((bits[j] >> 22) - base, 0), 15)
    return least


@njit(nogil=True, cache=True)
def _count_levels(W_IO: Any, rms_IS: Any, base: int, threshold: float, act: Any, above: Any) -> None:
    buffer = np.empty(W_IO.shape[1], np.float32)
    bits = buffer.view(np.int32)
    for i in range(W_IO.shape[0]):
        for s in range(rms_IS.shape[1]):
            for o in range(W_IO.shape[1]):
                value = W_IO[i, o] * rms_IS[i, s]
                buffer[o] = value
                above[i, o] += value > threshold
            for o in range(W_IO.shape[1]):
                act[i, o] += min(max((bits[o] >> 22) - base, 0), 15)
