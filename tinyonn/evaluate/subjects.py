"""What tasks are measured on: the original model, what quantization makes of it, and the sparse models of a run.

Quantized here, tensor by tensor, the weights of the linear layers within the decoder's layers, as NF4 does; the rest
stays as it is. With W the weights of a tensor, held afterwards in the model's own dtype:

- ``int8``: absmax by row (of an output), ``round(W / s) s`` with ``s = max |row| / 127``;
- ``gobo3``, ``gobo4``: GOBO (Zadeh et al. 2020, arXiv:2005.03842). A weight whose log-density under the normal
  distribution of its tensor lies below -4 is an outlier and stays exact. The others become the nearest of 2^bits
  centroids in float32, which begin as the means of bins of equal population and are moved to the means of what is
  nearest as long as the summed distance falls.

``nf4`` is the model as it is recorded; ``llmint8`` is LLM.int8 of bitsandbytes, outliers of the activations included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyonn.config import ModelConfig
from tinyonn.dense.load import DTYPES, choose_device, load_model, model_folder, prepare_model
from tinyonn.dense.parameters import list_parameters
from tinyonn.dense.source import fingerprint_model
from tinyonn.errors import InputError
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.experts.folder import open_assembled
from tinyonn.show.escape import shortened
from tinyonn.train.spec import experts_of, read_student

ORIGINAL, NF4 = "original", "nf4"  # always measured: what the others are compared with
ASSEMBLED, TRAINED = "assembled", "trained"
GGUF = "gguf"
LOG_DENSITY = -4.0  # below which a weight is an outlier of GOBO
MOST_ROUNDS = 200  # of moved centroids; some tens are enough
PARTS = (2, 10)  # a trained model is measured with all experts, half of them, a tenth

Float32 = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Subject:
    """A row of the table.

    Attributes
    ----------
    name : str
        Such as ``original`` or ``trained@5``.
    kind : str
        What it is loaded as; the name without the number of experts.
    model : dict
        Digests of what it is made of.
    experts : int or None
        On for a prompt, by the router; None of a dense model, or for all.
    """

    name: str
    kind: str
    model: dict[str, Any]
    experts: int | None = None


def int8_rows(weight: torch.Tensor) -> torch.Tensor:
    """A tensor [out, in] after rounding to int8 by row and back."""
    values = weight.float()
    scale = values.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return ((values / scale).round_() * scale).to(weight.dtype)


def gobo(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """A tensor after GOBO: outliers as they are, of the others one of ``2^bits`` centroids each."""
    values = weight.detach().float().cpu().numpy().ravel()
    inner = np.flatnonzero(~outliers(values))
    order = inner[np.argsort(values[inner], kind="stable")]
    ascending = values[order]
    centroids, bounds = find_centroids(ascending, 1 << bits)
    rounded = values.copy()
    rounded[order] = np.repeat(centroids, np.diff(bounds))
    return torch.from_numpy(rounded).reshape(weight.shape).to(weight.device, weight.dtype)


def outliers(values: Float32) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which values lie below GOBO's log-density in their own normal distribution."""
    mean, deviation = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    if deviation == 0:
        return np.zeros(values.shape, np.bool_)
    density = -0.5 * ((values - mean) / deviation) ** 2 - np.log(deviation * np.sqrt(2 * np.pi))
    return np.asarray(density < LOG_DENSITY)


def find_centroids(ascending: Float32, count: int) -> tuple[Float32, np.ndarray[Any, np.dtype[np.int64]]]:
    """Centroids float32 [count] of sorted values, and where the values of each begin, int64 [count + 1]."""
    sums = np.concatenate([[0.0], np.cumsum(ascending, dtype=np.float64)])
    bounds = np.linspace(0, ascending.size, count + 1).astype(np.int64)
    best = _centroids(sums, bounds)
    least, least_bounds = np.inf, bounds
    centroids = best
    for _ in range(MOST_ROUNDS):
        middles = (centroids[1:] + centroids[:-1]) / 2
        bounds = np.concatenate([[0], np.searchsorted(ascending, middles), [ascending.size]]).astype(np.int64)
        distance = float(np.abs(ascending - np.repeat(centroids, np.diff(bounds))).sum(dtype=np.float64))
        if distance >= least:
            break
        least, best, least_bounds = distance, centroids, bounds
        centroids = _centroids(sums, bounds, centroids)
    return best.astype(np.float32), least_bounds


def _centroids(sums: Any, bounds: Any, before: Any = None) -> Any:
    """Means of the bins; an empty one keeps its centroid."""
    sizes = np.diff(bounds)
    means = np.diff(sums[bounds]) / np.maximum(sizes, 1)
    return means if before is None else np.where(sizes > 0, means, before)


ROUNDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int8": int8_rows,
    "gobo3": lambda weight: gobo(weight, 3),
    "gobo4": lambda weight: gobo(weight, 4),
}
KINDS = (ORIGINAL, NF4, *ROUNDED, "llmint8", GGUF, ASSEMBLED, TRAINED)


def find_subjects(
    names: Sequence[str] | None, config: ModelConfig, run: Path, gguf: Path | None, model: dict[str, Any]
) -> list[Subject]:
    """The rows that are asked for; the original and NF4 always come first.

    Parameters
    ----------
    names : sequence of str, optional
        Kinds, or ``trained@5`` for so many experts; by default the original, NF4, int8 and the sparse
        models that are there.
    config : ModelConfig
    run : Path
        The run's folder.
    gguf : Path, optional
    model : dict
        Fingerprint of the recorded model.

    Raises
    ------
    InputError
        No such subject, or a sparse model that is not there.
    """
    sparse = {kind: folder for kind, folder in _folders(run).items() if (folder / "config.json").is_file()}
    if names is None:
        names = (ORIGINAL, NF4, "int8", *([GGUF] if gguf else ()), *sparse)
    found = []
    for name in dict.fromkeys((ORIGINAL, NF4, *names)):
        kind, _, number = name.partition("@")
        if kind not in KINDS or (number and (kind != TRAINED or not number.isdigit())):
            raise InputError(
                f"--subjects has {shortened(name)}; there are {', '.join(KINDS)}, and such as trained@5"
            )
        if kind in (ASSEMBLED, TRAINED):
            found += _sparse(name, kind, _folders(run)[kind], number)
        elif kind == GGUF:
            found.append(Subject(GGUF, kind, {"gguf": _gguf_fingerprint(config, gguf)}))
        else:
            found.append(Subject(name, kind, {"model": model, "dtype": config.dtype}))
    return list({subject.name: subject for subject in found}.values())


def _folders(run: Path) -> dict[str, Path]:
    return {ASSEMBLED: run / "experts", TRAINED: run / "model"}


def _sparse(name: str, kind: str, folder: Path, number: str) -> list[Subject]:
    if not (folder / "config.json").is_file():
        command = "assemble" if kind == ASSEMBLED else "train"
        raise InputError(f"--subjects has {name}, but {folder} holds no model; run `tinyonn {command}` first")
    student = read_student(folder)
    made = {"assembly": (student.get("assembly") or {}).get("id")}
    if kind == ASSEMBLED:
        return [Subject(name, kind, made)]
    experts = experts_of(student)
    if number and not 1 <= int(number) <= experts:
        raise InputError(f"--subjects has {name}; from 1 to {experts} experts can be on")
    if student.get("router") is None:
        return [Subject(TRAINED, kind, made)]
    numbers = [int(number)] if number else [experts, *(max(1, experts // part) for part in PARTS)]
    return [Subject(f"{TRAINED}@{k}", kind, made, k if k < experts else None) for k in numbers]


def gguf_config(config: ModelConfig, gguf: Path | None) -> ModelConfig:
    """The configuration of a GGUF in place of the model."""
    if gguf is None or not gguf.is_file():
        raise InputError(
            f"--subjects has gguf, but --gguf {gguf} is no file; give the GGUF of the same model, such as its Q4_K_M"
        )
    return config.model_copy(update={"path": str(gguf), "quantization": "none", "revision": None})


def _gguf_fingerprint(config: ModelConfig, gguf: Path | None) -> dict[str, str]:
    return fingerprint_model(gguf_config(config, gguf))


def load_subject(subject: Subject, config: ModelConfig, run: Path, gguf: Path | None) -> Any:
    """A model that is ready to be asked, with all experts on or with a router that chooses so many.

    Raises
    ------
    InputError
        It cannot be loaded.
    """
    if subject.kind in (ASSEMBLED, TRAINED):
        model = open_assembled(_folders(run)[subject.kind]).eval().to(choose_device(config.device))
        if subject.experts is None:
            model.set_gates(torch.ones(model.config.experts))
        elif model.router is not None:
            model.router.top_k = subject.experts
        return model
    if subject.kind == NF4:
        return DenseWeights(config.model_copy(update={"quantization": "nf4"})).model
    if subject.kind == "llmint8":
        return _llm_int8(config)
    plain = config.model_copy(update={"quantization": "none"})
    model = load_model(gguf_config(config, gguf) if subject.kind == GGUF else plain).model
    if subject.kind in ROUNDED:
        round_linear(model, ROUNDED[subject.kind])
    return model


@torch.no_grad()
def round_linear(model: Any, rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace the weights of all linear layers within the decoder's layers, in place; rows are outputs."""
    for parameter in list_parameters(model):
        if parameter.kind == "linear" and parameter.layer is not None:
            module = model.get_submodule(parameter.name.rpartition(".")[0])
            weight = module.get_parameter("weight")
            upright = isinstance(module, torch.nn.Linear)
            found = rounded(weight if upright else weight.T.contiguous())
            weight.copy_(found if upright else found.T)


def _llm_int8(config: ModelConfig) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tinyonn.dense.quiet import quiet

    plain = config.model_copy(update={"quantization": "none"})
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            model_folder(plain),
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            dtype=DTYPES[config.dtype],
            device_map={"": str(choose_device(config.device))},
            local_files_only=True,
            trust_remote_code=False,
        )
    return prepare_model(model, checkpointing=False)


def sparse_settings(subject: Subject, run: Path) -> dict[str, Any] | None:
    """``config.json`` of a sparse subject; None of a dense one."""
    return read_student(_folders(run)[subject.kind]) if subject.kind in (ASSEMBLED, TRAINED) else None
