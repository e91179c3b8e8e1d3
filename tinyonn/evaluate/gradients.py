"""Sizes of the gradients in float32, without levels and codes: what recording is compared with.

``g_ij = 1/n Σ_s |Σ_t G_ti X_tj|`` over samples s, of the token-mean loss of each, as `tinyonn.record` counts in levels.
The sums of some layers are held at a time, in as many passes over the samples as it takes, and then lie in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch

from tinyonn.corpus.file import Sample
from tinyonn.dense.head import head_of
from tinyonn.dense.passes import attach, forward_backward
from tinyonn.errors import InputError
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.score.source import Float32

WINDOW_BYTES = 1 << 30  # of sums held at a time, or one tensor's
SUM_BYTES = 4


def float_gradients(
    dense: DenseWeights, samples: Sequence[Sample], names: Sequence[str], folder: Path
) -> Callable[[str], Float32]:
    """Mean absolute gradients of some matrices.

    Parameters
    ----------
    dense : DenseWeights
        Whole.
    samples : sequence of Sample
    names : sequence of str
        Of matrices.
    folder : Path
        Where they are written, 4 bytes a weight, unless they are there already.

    Returns
    -------
    callable
        By name float32 in the tensor's own shape, mapped from the file.

    Raises
    ------
    InputError
        A gradient is not finite.
    """
    if not folder.exists():
        new = folder.with_name(f"{folder.name}.new")
        rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for window in windows(dense, names):
            for name, sums in _sums(dense, samples, window).items():
                if not bool(torch.isfinite(sums).all()):
                    raise InputError(
                        f"{name} has gradients that are not finite in {len(samples)} calibration samples; "
                        "leave out root-float, or set model.dtype to float32"
                    )
                np.save(new / f"{name}.npy", (sums / len(samples)).cpu().numpy())
        new.replace(folder)
    return lambda name: np.load(folder / f"{name}.npy", mmap_mode="c")


def windows(dense: DenseWeights, names: Sequence[str]) -> Iterator[list[str]]:
    """Matrices whose sums are held together."""
    held: list[str] = []
    total = 0
    for name in names:
        size = SUM_BYTES * dense.module(name).get_parameter("weight").numel()
        if held and total + size > WINDOW_BYTES:
            yield held
            held, total = [], 0
        held.append(name)
        total += size
    if held:
        yield held


def _sums(dense: DenseWeights, samples: Sequence[Sample], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Over the samples: float32, the tensor's own shape, on the device."""
    sums = {
        name: torch.zeros_like(dense.module(name).get_parameter("weight"), dtype=torch.float32)
        for name in names
    }
    head = head_of(dense.model)

    def add(name: str, X: torch.Tensor, G: torch.Tensor) -> None:
        X_TI, G_TO = X.float(), G.detach().reshape(-1, G.shape[-1]).float()
        pair = (G_TO.T, X_TI) if isinstance(dense.module(name), torch.nn.Linear) else (X_TI.T, G_TO)
        sums[name] += torch.matmul(*pair).abs_()

    handles = [attach(dense.module(name), partial(add, name), lambda: True) for name in names]
    try:
        for sample in samples:
            forward_backward(dense.model.base_model, head, sample)
    finally:
        for handle in handles:
            handle.remove()
    return sums
