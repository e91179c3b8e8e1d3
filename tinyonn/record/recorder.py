"""Record what every weight did on a sample: one forward and one backward pass of the dense model.

Data flow of a sample: token ids -> decoder -> hidden states -> head and loss, in chunks of tokens -> backward. Every
module's tap (`tinyonn.dense.passes`) then has its input X and the gradient G of its output, and the module's sites
(`sums.py`) journal the inputs and add the levels of the weight gradient to their sums.

The head is run apart from the decoder and only on the labelled tokens, so that the logits of a long sample with a
large vocabulary are never held whole. A tensor with several uses (tied embeddings) waits until all have come.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import isfinite
from typing import Any

import numpy as np
import torch

from tinyonn.corpus.file import Sample
from tinyonn.dense.load import DenseModel
from tinyonn.dense.parameters import Parameter, Use, list_parameters, list_uses
from tinyonn.dense.passes import Meeting, Taps, checked_head, forward_backward
from tinyonn.record.activations import column_bins, input_bins
from tinyonn.record.levels import SUM_SAMPLES, Checks
from tinyonn.record.sums import (
    Site,
    VectorSums,
    WithRows,
    feed_embedding,
    feed_linear,
    mean_square,
    norm_sums,
    normalised,
    token_share,
    weight_of,
)
from tinyonn.store.records import TensorCalibration


class BadSampleError(Exception):
    """A sample that must be set aside; the message is the reason.

    Parameters
    ----------
    reason : str
    touched : bool
        Whether sums have been touched already.
    """

    def __init__(self, reason: str, touched: bool = True) -> None:
        super().__init__(reason)
        self.touched = touched


class Recorder:
    """Records samples on one device.

    Parameters
    ----------
    dense : DenseModel
    threads : int
        CPU threads. They decide how products are rounded, so all workers of a run use the same number.

    Raises
    ------
    InputError
        The model has parameters that cannot be recorded, or does more after its head than a scale or a soft cap.
    """

    def __init__(self, dense: DenseModel, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        model: Any = dense.model
        self.model, self.decoder, self.head = model, model.base_model, checked_head(model)
        self.device = dense.device
        self.parameters = list_parameters(self.model)
        uses: dict[str, list[Use]] = defaultdict(list)
        for use in list_uses(self.model):
            uses[use.parameter_name].append(use)
        self.sites = {p.name: Site(p, uses[p.name]) for p in self.parameters}
        self._pool = ThreadPoolExecutor(1) if threads > 1 else None
        self._active: set[str] = set()
        self._spills = False
        self._checks = Checks(self.device)
        self._shared_input: tuple[torch.Tensor, torch.Tensor] | None = None
        self._vectors = VectorSums([], self.device)
        ours = {name: site.uses for name, site in self.sites.items()}
        self._taps = Taps(ours, self.head.module, self._meet, lambda name: name in self._active, "recorded")

    def open(self, calibration: dict[str, TensorCalibration], spills: bool) -> None:
        """Start sums for the tensors named in `calibration`; the others are left alone."""
        for name, site in self.sites.items():
            site.close()
            if name in calibration:
                site.open(calibration[name], self.device, spills, self._pool)
        vectors = [site for name, site in self.sites.items() if name in calibration and site.vector]
        self._vectors = VectorSums(vectors, self.device)
        self._active = set(calibration)
        self._spills = spills

    def open_counts(self, names: Iterable[str]) -> None:
        """Start the counts of the calibration's first pass for some tensors."""
        for site in self.sites.values():
            site.close()
        self._vectors = VectorSums([], self.device)
        self._active = set(names)
        self._spills = True
        for name in self._active:
            self.sites[name].open_counts()

    def record(
        self, samples: Iterable[Sample], progress: Callable[[], None] = lambda: None
    ) -> dict[int, str]:
        """Add samples to the sums of the tensors that are open.

        Returns
        -------
        dict
            Reason by index of the samples that were set aside; they left no trace in the sums.
        """
        bad: dict[int, str] = {}
        batch: list[Sample] = []
        spilled = False
        for sample in samples:
            batch.append(sample)
            if len(batch) == SUM_SAMPLES:
                assert self._spills or not spilled, "more than 17 samples need spills"
                self._record_batch(batch, bad, progress)
                batch, spilled = [], True
        assert self._spills or not (spilled and batch), "more than 17 samples need spills"
        self._record_batch(batch, bad, progress)
        return bad

    def weights(self, parameter: Parameter) -> Callable[[int, int], np.ndarray]:
        """Rows of a tensor as float32, NF4 dequantized; a vector is one row."""
        use = self.sites[parameter.name].uses[0]
        tensor = weight_of(use)
        matrix = tensor.reshape(self.sites[parameter.name].matrix_shape)
        return lambda first, last: matrix[first:last].float().cpu().numpy()

    def _record_batch(self, batch: list[Sample], bad: dict[int, str], progress: Callable[[], None]) -> None:
        """At most 17 samples; a bad one is found after it has touched some sums, so the batch starts again."""
        done: set[int] = set()
        while True:
            for sample in batch:
                if sample.index in bad:
                    continue
                try:
                    self.run(sample)
                except BadSampleError as reason:
                    bad[sample.index] = str(reason)
                    if reason.touched:
                        break
                    continue
                if sample.index not in done:
                    done.add(sample.index)
                    progress()
            else:
                break
            for name in self._active:
                self.sites[name].forget_batch()
        for name in self._active:
            self.sites[name].keep_batch()

    def run(self, sample: Sample) -> float:
        """One forward and backward pass into whatever sinks are open; returns the loss in nats per token.

        Raises
        ------
        BadSampleError
            A loss, activation or gradient was not finite; sums since the last spill are spoilt.
        """
        self._taps.clear()
        self._checks.clear()
        self._vectors.clear()
        self._shared_input = None
        loss, hidden_TH = forward_backward(self.decoder, self.head, sample, self._check_loss)
        self._finish(hidden_TH)
        self._checks.add("input or gradient of a norm or bias", self._vectors.add())
        return finite_loss(loss, self._checks)

    def _check_loss(self, loss: torch.Tensor) -> None:
        if loss.device.type == "cpu" and not isfinite(loss):
            raise BadSampleError(f"loss is {float(loss)}", touched=False)

    def _meet(self, use: Use, X: torch.Tensor, G_TO: torch.Tensor) -> None:
        self._feed(self.sites[use.parameter_name], use, X, G_TO)

    def _feed(self, site: Site, use: Use, X: torch.Tensor, G_TO: torch.Tensor) -> None:
        name, operation = site.parameter.name, use.operation
        if operation == "embedding":
            share = token_share(X, site.inputs, use.scale)
            site.journal.append(column_bins(share, self._checks.slot(f"input of {name}")))
            feed_embedding(self._sink(site), use, X, G_TO, self._checks.slot(f"gradient of {name}"))
        elif operation in ("linear", "conv1d"):
            site.journal.append(self._column_bins(X, name))
            feed_linear(self._sink(site), use, X, G_TO, self._checks.slot(f"gradient of {name}"))
        elif operation == "bias":
            self._feed_vector(site, G_TO.sum(0, dtype=torch.float32), self._ones(site.inputs))
        else:
            X = normalised(X.reshape(G_TO.shape), use)
            self._feed_vector(site, *norm_sums(X, G_TO))

    def _feed_vector(self, site: Site, gradient: torch.Tensor, square: torch.Tensor) -> None:
        if site.counting:
            self._sink(site).add(gradient[None], 0, self._checks.slot(f"gradient of {site.parameter.name}"))
            site.add_dense(weight_of(site.uses[0]).reshape(1, -1), torch.zeros(1, device=self.device), square)
            finite = torch.isfinite(gradient).all() & torch.isfinite(square).all()
            self._checks.add(f"input or gradient of {site.parameter.name}", finite)
        else:
            self._vectors.gather(site.parameter.name, gradient, square)

    def _finish(self, hidden_TH: torch.Tensor) -> None:
        """Feed the head and the tied tensors, whose uses have all come by now."""
        for name, uses in self._taps.late.items():
            site = self.sites[name]
            if site.tied:
                self._feed_tied(site, uses, hidden_TH)
                continue
            use, X, G = uses[0][0], torch.cat([X for _, X, _ in uses]), torch.cat([G for _, _, G in uses])
            if use.operation == "linear":  # every token is the head's input, labelled or not
                site.journal.append(self._column_bins(hidden_TH, name))
                feed_linear(self._sink(site), use, X, G, self._checks.slot(f"gradient of {name}"))
            else:
                self._feed(site, use, X, G)
        self._taps.late.clear()

    def _feed_tied(self, site: Site, uses: list[Meeting], hidden_TH: torch.Tensor) -> None:
        rows, columns = site.matrix_shape
        row_square = torch.zeros(rows, device=self.device)
        column_square = torch.zeros(columns, device=self.device)
        linear = {use.module_name: use for use, _, _ in uses if use.operation == "linear"}
        row_parts: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        for use, X, G in uses:
            if use.operation == "embedding":
                row_square += token_share(X, rows, use.scale)
                row_parts.append((X, G, use.scale))
        for use in linear.values():
            met = [X for other, X, _ in uses if other.module_name == use.module_name]
            column_square += mean_square(hidden_TH if use.module is self.head.module else torch.cat(met))
        X_TI = torch.cat([X for use, X, _ in uses if use.operation == "linear"])
        G_TO = torch.cat([G for use, _, G in uses if use.operation == "linear"])
        sink, top = (
            WithRows(self._sink(site), row_parts),
            self._checks.slot(f"gradient of {site.parameter.name}"),
        )
        feed_linear(sink, next(iter(linear.values())), X_TI, G_TO, top)
        self._checks.add(f"input of {site.parameter.name}", torch.isfinite(column_square).all())
        site.add_dense(weight_of(site.uses[0]), row_square, column_square)

    def _sink(self, site: Site) -> Any:
        assert site.sink is not None, site.parameter.name
        return site.sink

    def _column_bins(self, X: torch.Tensor, name: str) -> torch.Tensor:
        """Column bins of a layer's input, computed once for layers that share it (query, key, value; gate, up)."""
        shared = self._shared_input
        if shared is None or shared[0].data_ptr() != X.data_ptr() or shared[0].shape != X.shape:
            self._shared_input = shared = (X, input_bins(X, self._checks.slot(f"input of {name}")))
        return shared[1]

    @lru_cache(maxsize=16)  # noqa: B019 - a recorder lives as long as its process
    def _ones(self, size: int) -> torch.Tensor:
        return torch.ones(size, device=self.device)


def finite_loss(loss: torch.Tensor, checks: Checks) -> float:
    """A sample's loss; a GPU is asked here, when all of its work has been given.

    Raises
    ------
    BadSampleError
        It, or something that was checked, is not finite.
    """
    if not isfinite(found := float(loss)):
        raise BadSampleError(f"loss is {found}")
    if (name := checks.first()) is not None:
        raise BadSampleError(f"{name} is not finite")
    return found
