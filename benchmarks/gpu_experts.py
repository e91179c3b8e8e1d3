"""Parts of `gpu.py` about sparse experts: decode and train."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from drawn import drawn, random_matrix
from gpu_models import Result, Setting, by_turns, device_seconds, random_model, ratio
from report import Goal, at_least, at_most
from torch import nn
from torch.nn import functional

from tinyonn.model.sparse_tinyonn import Form, Merged, merge, sparse_linear
from tinyonn.train.data import Batch
from tinyonn.train.optimizers import build_optimizers
from tinyonn.train.options import LossWeights, OptimizerOptions
from tinyonn.train.student import Student, prepare_model, total
from tinyonn.train.teacher import Live

SHARES = (0.03, 0.1, 0.31, 0.5, 0.7)
GOALS = {0.1: 3.0, 0.31: 1.5}
LAYERS = 12  # 1.9 GB of dense weights, 114 MB at 3 %: more than a last cache holds


# decode: products of one token, or four


def decode(setting: Setting) -> Result:
    """Sparse kernels beside cuBLAS and Torch's CSR on layers of the 4B model's shape, as a captured graph."""
    hidden, middle, layers = setting.of((2560, 6912, LAYERS), (2560, 6912, 2), (32, 48, 1))
    shapes = {(hidden, hidden): 4, (middle, hidden): 2, (hidden, middle): 1}
    shapes = dict.fromkeys(shapes, 1) if setting.tiny else shapes
    torch.manual_seed(0)
    one = {shape: torch.randn(shape, device=setting.device).bfloat16() for shape in shapes}
    dense = [[one[shape].clone() for shape, n in shapes.items() for _ in range(n)] for _ in range(layers)]
    figures: dict[str, Any] = {"layers": layers, "GB/s of a copy": _bandwidth(setting), "shares": {}}
    goals: list[Goal] = []
    worst = 0.0
    for share in setting.of(SHARES, SHARES, (0.31,)):
        merged, peers = _sparse(shapes, share, layers, setting.device)
        worst = max(worst, _largest_error(merged, setting))
        bytes_of = {form: sum(part.bytes for part in found[0]) for form, found in merged.items()}
        chosen = {part.form for part in merged["chosen"][0]}
        found: dict[str, Any] = {"forms": sorted(chosen), "bytes a layer": bytes_of}
        for tokens in setting.of((1, 4), (1, 4), (1,)):
            X = {
                width: torch.randn(tokens, width, device=setting.device).bfloat16()
                for width in (hidden, middle)
            }
            ways: dict[str, Callable[[], None]] = {
                "dense": partial(_all, dense, lambda W, x: functional.linear(x, W), X),
                "torch CSR": partial(_all, peers, lambda W, x: W @ x.T.to(W.dtype), X),
            }
            ways |= {
                way: partial(_all, weights, lambda W, x: sparse_linear(x, W), X)
                for way, weights in merged.items()
            }
            found[f"batch {tokens}"] = _timed(ways, setting, layers, bytes_of)
            goal = GOALS.get(share) if tokens == 1 else None
            if goal:
                times = found[f"batch {tokens}"]["times dense"]["chosen"]
                goals.append(at_least(f"decode, {share:.0%} active: times dense", times, goal))
        figures["shares"][str(share)] = found
        del merged, peers, ways  # the next share's come before these would go
    goals.append(at_most("decode: largest difference from the dense product", worst, 0.01))
    return Result(goals, figures)


def _largest_error(merged: dict[str, list[list[Merged]]], setting: Setting) -> float:
    """Of one to eight tokens, beside a float32 product with the same weight, as a share of its largest value."""
    worst = 0.0
    for layers in merged.values():
        for weight in {(one.out, one.inputs): one for one in layers[0]}.values():
            X = torch.randn(8, weight.inputs, device=weight.values.device).bfloat16()
            expected = functional.linear(X.float(), weight.dense().float())
            for tokens in setting.of((1, 3, 8), (1, 3, 8), (1, 2)):
                apart = (sparse_linear(X[:tokens], weight).float() - expected[:tokens]).abs().max()
                worst = max(worst, float(apart / expected.abs().max()))
    return worst


def _sparse(
    shapes: dict[tuple[int, int], int], share: float, layers: int, device: torch.device
) -> tuple[dict[str, list[list[Merged]]], list[list[torch.Tensor]]]:
    """Layers in every form that this machine has, and as Torch's CSR, each in memory of its own."""
    forms: dict[str, Form | None] = {"chosen": None, "rows": "rows", "masks": "masks"}
    merged: dict[str, list[list[Merged]]] = {form: [[] for _ in range(layers)] for form in forms}
    peers: list[list[torch.Tensor]] = [[] for _ in range(layers)]
    for shape, count in shapes.items():
        matrix = random_matrix(shape, share, device)
        for way, form in forms.items():
            try:
                whole = merge(matrix, torch.ones(1, device=device), form)
            except ValueError:  # no kernel for it
                merged.pop(way, None)
                continue
            for layer in merged[way]:
                layer += [copy.deepcopy(whole) for _ in range(count)]
        columns = matrix.columns.view(torch.int16).int() & 0xFFFF
        values = matrix.values if device.type == "cuda" else matrix.values.float()  # all that a CPU takes
        for peer in peers:
            for _ in range(count):
                parts = matrix.row_pointer.clone(), columns.clone(), values.clone()
                peer.append(torch.sparse_csr_tensor(*parts, shape, check_invariants=False))
    return merged, peers


def _all(layers: list[list[Any]], product: Callable[[Any, Any], Any], X: dict[int, torch.Tensor]) -> None:
    for layer in layers:
        for weight in layer:
            inputs = weight.inputs if isinstance(weight, Merged) else weight.shape[1]
            product(weight, X[inputs])


def _timed(
    ways: dict[str, Callable[[], None]], setting: Setting, layers: int, bytes_of: dict[str, int]
) -> dict[str, Any]:
    """Milliseconds a layer: of the device alone, in a captured graph, and called one by one."""
    with torch.inference_mode():
        eager = by_turns(ways, setting)
        graphs = {way: _captured(run, setting) for way, run in ways.items()}
        captured = by_turns(graphs, setting) if setting.on_gpu else eager
    best = {way: min(found) / layers for way, found in captured.items()}
    return {
        "ms a layer": {way: 1e3 * value for way, value in best.items()},
        "ms a layer, called one by one": {way: 1e3 * min(found) / layers for way, found in eager.items()},
        "times dense": {way: 1 / ratio(captured, way, "dense") for way in ways},
        "GB/s": {way: size / best[way] / 1e9 for way, size in bytes_of.items()},
    }


def _captured(run: Callable[[], None], setting: Setting) -> Callable[[], None]:
    """A CUDA graph of the calls, so that the host's own time does not count; the calls where that cannot be."""
    if not setting.on_gpu:
        return run
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # Torch's CSR products allocate in ways that a graph does not allow
        torch.cuda.synchronize()
        return run
    return graph.replay


def _bandwidth(setting: Setting) -> float:
    """GB/s of a copy, read and written."""
    size = 1 << (20 if setting.tiny else 30)
    source = torch.empty(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = by_turns({"copy": lambda: target.copy_(source)}, setting)
    return float(2 * size / min(seconds["copy"]) / 1e9)


# train: a step of distillation


def train(setting: Setting) -> Result:
    """Steps of a routed student with other gates for every sample, beside a dense student of the same teacher."""
    goals: list[Goal] = []
    figures: dict[str, Any] = {}
    makers: dict[str, tuple[Callable[[], Any], int, int]] = {
        "shipped model": (
            lambda: setting.shipped(setting.device, torch.bfloat16, False).model,
            *setting.of((8, 256), (4, 256), (2, 12)),
        )
    }
    for tokens in setting.of((256, 1024), (256,), ()):
        makers[f"4B layers, {tokens} tokens"] = partial(_of_4b, setting), setting.of(8, 2, 2), tokens
    for name, (make, batch, tokens) in makers.items():
        found = _compare_steps(make(), batch, tokens, setting)
        figures[name] = found
        if setting.on_gpu:
            torch.cuda.empty_cache()
        goals += [
            at_most(f"train, {name}: routed to dense step", found["to dense"], 1.3),
            at_most(f"train, {name}: last loss to first", found["losses"][-1] / found["losses"][0], 0.999),
            at_most(f"train, {name}: steps not finite", found["not finite"], 0),
        ]
    return Result(goals, figures)


def _of_4b(setting: Setting) -> Any:
    return random_model(setting.layers(2), setting.device, torch.bfloat16, nf4=False).model


def _compare_steps(base: Any, batch: int, tokens: int, setting: Setting) -> dict[str, Any]:
    torch.manual_seed(0)
    samples = _batch(batch, tokens, base.config.vocab_size, setting.device)
    teacher = Live(base)
    experts, active = setting.of((100, 10), (100, 10), (3, 1))
    gates_BE = torch.zeros(batch, experts, device=setting.device)
    chosen = torch.rand(batch, experts, device=setting.device).topk(active).indices
    gates_BE.scatter_(1, chosen, 1)
    dense = copy.deepcopy(base)
    for module in dense.modules():  # as far from the teacher as it can learn something
        if isinstance(module, nn.Linear) and module is not dense.get_output_embeddings():
            module.weight.data += 0.1 * module.weight.std() * torch.randn_like(module.weight)
    losses: dict[str, list[float]] = {"dense": [], "routed": []}
    rate = setting.of(2e-4, 2e-4, 2e-3)  # of both
    steps = {
        "dense": _step(dense, teacher, samples, None, rate, losses["dense"]),
        "routed": _step(drawn(base, experts), teacher, samples, gates_BE, rate, losses["routed"]),
    }
    seconds = by_turns(steps, setting)
    peak = torch.cuda.max_memory_allocated() if setting.on_gpu else 0
    everything = [loss for found in losses.values() for loss in found]
    return {
        "ms a step": {way: 1e3 * statistics.median(found) for way, found in seconds.items()},
        "to dense": ratio(seconds, "routed", "dense"),
        "device ms a step": {way: 1e3 * device_seconds(step, setting) for way, step in steps.items()},
        "losses": losses["routed"],
        "not finite": sum(not loss < float("inf") for loss in everything),
        "peak bytes": peak,
    }


def _batch(batch: int, tokens: int, vocabulary: int, device: torch.device) -> Batch:
    ids = torch.randint(0, vocabulary, (batch, tokens), device=device)
    lengths, prompts = (torch.full((batch,), value, device=device) for value in (tokens, tokens // 4))
    return Batch(ids, ids.clone(), lengths, prompts, tuple(range(batch)), ("random",) * batch)


def _step(
    model: Any, teacher: Live, batch: Batch, gates_BE: torch.Tensor | None, rate: float, losses: list[float]
) -> Callable[[], None]:
    """A step of AdamW on all linear weights but the head, as `tinyonn.train.trainer` takes it."""
    rates = OptimizerOptions(
        router="frozen",
        experts="adamw",
        experts_lr=rate,
        trunk_lr=rate if gates_BE is None else 0,
        norms_lr=0.0,
    )
    weights = LossWeights(ce=0.1, hidden=0.1, balance=0.0)
    student = Student(model, weights, prompt_loss=True)
    optimizers = build_optimizers(model, rates)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.requires_grad_(False)
    prepare_model(model, "bfloat16", checkpointing=False)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counted = int((student.targets(batch) != -100).sum())
    counts = {"kl": counted, "ce": counted, "entropy": counted, "hidden": int(batch.lengths_B.sum())}

    def step() -> None:
        for parameter in learned:
            parameter.grad = None
        with torch.autocast(batch.ids_BT.device.type, torch.bfloat16):
            measured = student(batch, teacher(batch), gates_BE)
        loss = total(measured, weights, counts)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if gates_BE is not None:
            model.forget()
        losses.append(float(loss.detach()))

    return step
