"""The memory that evaluation needs, as pure functions of the model and of what is evaluated.

With ``Q`` weights of linear layers in the decoder's layers, ``R`` others and ``b`` bytes a value, a model that can be
cut holds ``b (Q + R)``, and to restore its matrices 9/16 byte a weight in NF4, else another ``b`` (`DenseWeights`). A
pass without gradients of ``T`` tokens holds the activations of one layer, ``T b (3 I + 8 H)``, and some logits in
float32. Methods that go from layer to layer hold what a layer gives of all their samples, ``b H`` a token; float
gradients are summed in 4 bytes a weight of the layers at hand, at most `WINDOW_BYTES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tinyonn.config import ModelConfig
from tinyonn.dense.load import choose_device
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import CapacityError
from tinyonn.evaluate.gradients import SUM_BYTES, WINDOW_BYTES
from tinyonn.evaluate.loss import BATCH_TOKENS, HEAD_BYTES
from tinyonn.model.batched_tinyonn import CHUNK_BYTES as MATRIX_BYTES
from tinyonn.plan.demands import (
    CUDA_BYTES,
    CUDA_PROCESS_BYTES,
    NF4_BYTES,
    ModelFacts,
    Need,
    codec_bytes,
    is_quantized,
    state_ram,
)
from tinyonn.plan.training import StudentFacts, sparse_bytes
from tinyonn.show.sizes import MiB, format_size

# Of the process: Python with the store, Torch and Transformers, Numba's kernels and Torch's own.
OWN_BYTES = 800 * MiB
LOGITS = 3  # copies of a chunk of logits in float32: as they are, their logarithms, and in the head's dtype
HARNESS_BYTES = 256 * MiB  # that tasks bring along
GOBO_BYTES = (
    44  # of a weight while its tensor is sorted: copies in float32 and float64, and where each stands
)
HESSIANS = 6  # of an update: H, its factor and its inverse in float64
REMEDY = (
    "use a shorter data.max_tokens, fewer methods that update weights, or a machine with more of it; "
    "model.quantization: nf4 holds less than none"
)


def dense_needs(parameters: Sequence[Parameter], model: ModelFacts) -> list[Need]:
    """Of a model whose matrices can be cut and restored."""
    b = model.dtype_bytes
    cut = [p.size for p in parameters if p.kind == "linear" and p.layer is not None]
    packed = [p.size for p in parameters if is_quantized(p, model)]
    copies = round(NF4_BYTES * sum(packed)) + b * (sum(cut) - sum(packed))
    return [
        Need("the dense model", b * sum(p.size for p in parameters)),
        Need("what its matrices are restored from", copies),
    ]


def pass_needs(model: ModelFacts, tokens: int) -> list[Need]:
    """Of a forward pass without gradients, of so many tokens at a time."""
    b = model.dtype_bytes
    layer = tokens * b * (3 * model.intermediate + 8 * model.hidden)
    chunk = max(16 * 4 * model.vocabulary, min(HEAD_BYTES, tokens * 4 * model.vocabulary))
    return [Need("activations of a layer", layer), Need("logits", LOGITS * chunk)]


def cut_needs(parameters: Sequence[Parameter], model: ModelFacts, select: int) -> list[Need]:
    """Of a cut: the tensor at hand, its groups and its mask, and the task that finds them."""
    largest = _largest(parameters)
    return [
        Need("a matrix while it is cut", largest * (2 * model.dtype_bytes + 2)),
        Need("its cuts", select, host=True),
    ]


def update_needs(parameters: Sequence[Parameter]) -> list[Need]:
    """Of methods that update what is kept: second moments of a layer's inputs, float32, and of one matrix the rest."""
    layers: dict[int, int] = {}
    for parameter in parameters:
        if parameter.kind == "linear" and parameter.layer is not None:
            moments = 4 * parameter.shape[-1] ** 2
            layers[parameter.layer] = layers.get(parameter.layer, 0) + moments
    widest = max((p.shape[-1] for p in parameters if p.kind == "linear" and p.layer is not None), default=0)
    own = HESSIANS * 8 * widest**2 + 12 * _largest(parameters)
    return [Need("second moments of a layer", max(layers.values(), default=0)), Need("an update", own)]


def layerwise_needs(model: ModelFacts, calibrated: int, longest: int) -> list[Need]:
    """Of passes from layer to layer: what the last layer gave, of all calibration samples."""
    return [Need("outputs of a layer", calibrated * longest * model.dtype_bytes * model.hidden)]


def gradient_needs(parameters: Sequence[Parameter], model: ModelFacts, tokens: int) -> list[Need]:
    """Of float gradients: the sums of some layers, a tensor's product, and what a backward pass saves of all layers."""
    b, largest = model.dtype_bytes, SUM_BYTES * _largest(parameters)
    sums = SUM_BYTES * sum(p.size for p in parameters if p.kind == "linear" and p.layer is not None)
    saved = model.layers * tokens * (4 * b * model.intermediate + (6 * b + 17) * model.hidden)
    return [
        Need("sums of gradients", max(largest, min(WINDOW_BYTES, sums))),
        Need("a tensor's gradient", 3 * largest),
        Need("activations for a backward pass", saved),
        Need("the logits' gradient", 2 * tokens * model.vocabulary * b),
    ]


@dataclass(frozen=True)
class Work:
    """What an evaluation does beside cutting.

    Attributes
    ----------
    calibrated, updated, differentiated : int
        Recorded samples at most for methods that go from layer to layer, for those that update weights, and for those
        with float gradients.
    longest : int
        Tokens of a recorded sample at most.
    original : bool
        Whether the model as it was published is evaluated first.
    """

    calibrated: int = 0
    updated: int = 0
    differentiated: int = 0
    longest: int = 0
    original: bool = True


def evaluate_needs(
    parameters: Sequence[Parameter], model: ModelFacts, longest: int, select: int, work: Work | None = None
) -> list[Need]:
    """Of a whole evaluation, held-out samples of at most so many tokens."""
    work = work or Work()
    needs = dense_needs(parameters, model)
    plain = sum(need.bytes for need in dense_needs(parameters, replace(model, quantization="none"))[:1])
    more = plain - sum(need.bytes for need in needs) if work.original else 0
    if more > 0:
        needs.append(Need("the model as it was published", more))
    needs += pass_needs(model, max(BATCH_TOKENS, longest))
    needs += cut_needs(parameters, model, select)
    needs += update_needs(parameters) if work.updated else []
    needs += layerwise_needs(model, work.calibrated, work.longest) if work.calibrated else []
    needs += gradient_needs(parameters, model, work.longest) if work.differentiated else []
    needs.append(
        Need("chunks of the store", codec_bytes(parameter.shape for parameter in parameters), host=True)
    )
    return needs


def allocate_needs(
    parameters: Sequence[Parameter], model: ModelFacts, longest: int, select: int
) -> list[Need]:
    """Of a search of the allocation: beside an evaluation's a rank of 2 bytes for each weight, and of one tensor what
    they are sorted by; parameters as of `evaluate_needs`.
    """
    ranks = 2 * sum(p.size for p in parameters if p.kind == "linear" and p.layer is not None)
    needs = evaluate_needs(parameters, model, longest, select, Work(original=False))
    return [
        *needs,
        Need("ranks of all weights", ranks, True),
        Need("a tensor's scores", 26 * _largest(parameters), True),
    ]


def trained_needs(
    parameters: Sequence[Parameter], model: ModelFacts, sparse: int, longest: int
) -> tuple[list[Need], list[Need]]:
    """Of the dense model, and of a sparse one: one is there at a time."""
    largest = _largest(parameters) * model.dtype_bytes
    whole = model.dtype_bytes * sum(p.size for p in parameters if p.kind != "linear" or p.layer is None)
    routed = [
        Need("the sparse model", sparse, mapped=True),
        Need("experts merged for a prompt", max(0, sparse - whole)),
        Need("matrices of a layer", max(MATRIX_BYTES, 4 * largest)),
    ]
    passes = pass_needs(model, max(BATCH_TOKENS, longest))
    return [*dense_needs(parameters, model), *passes], [*routed, *passes]


def task_needs(
    parameters: Sequence[Parameter],
    model: ModelFacts,
    kind: str,
    sparse: Mapping[str, Any] | None,
    passes: Sequence[tuple[int, int, bool]],
) -> list[Need]:
    """Of tasks asked of one model.

    Parameters
    ----------
    parameters, model
        Of the dense model.
    kind : str
        Of the subject.
    sparse : mapping or None
        ``config.json`` of a sparse model.
    passes : sequence of (int, int, bool)
        Requests at a time, tokens of the longest, and whether the logits of all tokens are held at once, as lm-eval
        does where it compares continuations: in the model's dtype and twice in float32.
    """
    b = model.dtype_bytes
    needs = [Need("the model", b * sum(p.size for p in parameters))]
    if sparse is not None:
        needs = [
            *trained_needs(parameters, model, sparse_bytes(StudentFacts.of(sparse, parameters), b), 0)[1][:3]
        ]
    elif kind == "nf4":
        needs = dense_needs(parameters, replace(model, quantization="nf4"))
    elif kind.startswith(("int8", "gobo")):
        needs.append(Need("a matrix while it is rounded", GOBO_BYTES * _largest(parameters)))

    def size(one: tuple[int, int, bool]) -> int:
        return sum(need.bytes for need in _request_needs(model, *one))

    needs.append(Need("lm-eval and its libraries", HARNESS_BYTES, host=True))
    return [*needs, *_request_needs(model, *max(passes, key=size))]


def _request_needs(model: ModelFacts, batch: int, tokens: int, whole: bool) -> list[Need]:
    """Of so many requests at a time."""
    b, together = model.dtype_bytes, batch * tokens
    states = Need("keys and values", 2 * b * model.layers * model.hidden * together)
    held = [*pass_needs(model, together), states]
    return [held[0], Need("logits", together * model.vocabulary * (b + 8)), states] if whole else held


def state(what: str, config: ModelConfig, needs: Sequence[Need]) -> int:
    """Say what is needed where the model runs, or refuse; bytes of RAM.

    Parameters
    ----------
    what : str
    config : ModelConfig
    needs : sequence of Need
        Beside the process.

    Raises
    ------
    CapacityError
        It does not fit into RAM, or into the GPU's memory.
    """
    device = choose_device(config.device)
    if device.type != "cuda":
        return state_ram(what, [*needs, Need("the process", OWN_BYTES)], REMEDY)
    total = sum(need.bytes for need in needs if not need.host) + CUDA_BYTES
    free = torch.cuda.mem_get_info(device)[0]
    if total > free:
        raise CapacityError(
            f"{what} needs {format_size(total)} of VRAM and {format_size(free)} are there; {REMEDY}; "
            "model.device: cpu evaluates without the GPU"
        )
    return state_ram(
        what, [*(need for need in needs if need.host), Need("the process", CUDA_PROCESS_BYTES)], REMEDY
    )


def _largest(parameters: Sequence[Parameter]) -> int:
    return max((p.size for p in parameters if p.kind == "linear" and p.layer is not None), default=0)
