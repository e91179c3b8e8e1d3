"""Parts of `gpu.py` about recording: bits, model, record, memory, profile."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_models import (
    ANY_CALIBRATION,
    QWEN_4B,
    ROOT,
    TINY,
    Result,
    Setting,
    by_turns,
    device_seconds,
    host_kernels,
    random_model,
    random_samples,
    ratio,
    shipped_model,
    texts,
)
from report import at_most

from tinyonn.corpus.file import Sample
from tinyonn.dense.load import DenseModel
from tinyonn.dense.parameters import Parameter, Use, list_uses
from tinyonn.dense.passes import attach
from tinyonn.plan.demands import CUDA_BYTES, DataFacts, Machine, ModelFacts
from tinyonn.plan.recording import RecordOptions, layer_windows, plan_record
from tinyonn.profile.groups import Identity
from tinyonn.profile.kernel import Totals
from tinyonn.profile.measure import Measurer
from tinyonn.record.activations import add_dense_levels, input_bins
from tinyonn.record.device import gpu_kernels
from tinyonn.record.gradients import LevelSink, product_bands, spill
from tinyonn.record.levels import SUM_SAMPLES
from tinyonn.record.recorder import Recorder
from tinyonn.record.sums import WithRows, embedding_gradient
from tinyonn.record.worker import calibrate
from tinyonn.store.records import TensorCalibration

GIB = 1 << 30
POISON = 7  # token whose embedding is infinite, in the part that looks for bad samples


# bits: the same numbers in, the same bits out


def bits(setting: Setting) -> Result:
    """Levels, sums, spills, embedding and tied rows, column histograms: the device against the CPU's own kernels."""
    torch.manual_seed(0)
    rows, columns, tokens = setting.of((6912, 2560, 1024), (691, 2560, 256), (40, 70, 40))
    given = {"random": torch.randn(rows, columns) * 1e-4, "denormal": torch.randn(rows, columns) * 1e-40}
    given["wide"] = torch.randn(rows, columns) * torch.exp2(torch.randint(-30, 10, (rows, columns)).float())
    given["infinite"] = given["random"].clone()
    given["infinite"][::7, ::11] = torch.inf
    given["infinite"][1, 1] = torch.nan
    given["real"] = real_gradient()[:rows]
    differing: dict[str, int] = {}
    for name, values in given.items():
        for dtype in (torch.float32, torch.bfloat16):
            differing[f"sums and spills, {name}, {dtype}"] = _differing_sums(values.to(dtype), setting.device)
    for dtype in (torch.float32, torch.bfloat16):
        X = (torch.randn(tokens, columns) * torch.exp2(torch.randint(-20, 20, (columns,)).float())).to(dtype)
        differing[f"column bins, {dtype}"] = _differing_bins(X, setting.device)
        G = (torch.randn(tokens, columns) * 1e-3).to(dtype)
        ids = torch.randint(0, 60, (tokens,))
        ids[::5] = 11
        differing[f"embedding rows, {dtype}"] = _differing_rows(ids, G, setting.device)
        differing[f"tied rows, {dtype}"] = _differing_tied(ids, G, setting.device)
    if gpu_kernels(torch.zeros(1, device=setting.device)) is not None:
        differing["product and levels in one"] = _differing_product(setting, rows, columns, tokens)
    differing["a sample recorded twice"] = _differing_again(setting)
    worst = max(differing.values())
    return Result([at_most("bits: values that differ", worst, 0)], {"differing": differing})


def real_gradient() -> torch.Tensor:
    """The weight gradient of a layer of the shipped model on a text."""
    dense = shipped_model(torch.device("cpu"), torch.float32, nf4=False, layers=1)
    found: list[torch.Tensor] = []
    with host_kernels():
        recorder = Recorder(dense)
        weight = "model.layers.0.mlp.up_proj"
        module = dict(dense.model.named_modules())[weight]
        attach(module, lambda X, G: found.append(G.reshape(-1, G.shape[-1]).T @ X), lambda: True)
        recorder.run(texts(1, 48)[0])
    return found[0]


def _slot(device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def _differing_sums(values: torch.Tensor, device: torch.device) -> int:
    """After 34 samples and two spills; the tops too."""
    base = 220
    total = [np.zeros(values.numel(), np.uint16) for _ in range(2)]
    sums = [
        torch.zeros(values.shape, dtype=torch.uint8, device=place) for place in (torch.device("cpu"), device)
    ]
    tops = [_slot(torch.device("cpu")), _slot(device)]
    there = values.to(device)
    for sample in range(2 * SUM_SAMPLES):
        with host_kernels():
            LevelSink(sums[0], base + sample % 3).add(values, 0, tops[0])
        LevelSink(sums[1], base + sample % 3).add(there, 0, tops[1])
        if (sample + 1) % SUM_SAMPLES == 0:
            for part, into in zip(sums, total, strict=True):
                spill(part.cpu().numpy().reshape(-1), into)
                part.zero_()
    return int((total[0] != total[1]).sum()) + int(int(tops[0]) != int(tops[1]))


def _differing_bins(X: torch.Tensor, device: torch.device) -> int:
    tops = _slot(torch.device("cpu")), _slot(device)
    with host_kernels():
        expected = input_bins(X, tops[0])
    found = input_bins(X.to(device), tops[1]).cpu()
    return int((found != expected).sum()) + int(int(tops[0]) != int(tops[1]))


def _differing_rows(ids: torch.Tensor, G: torch.Tensor, device: torch.device) -> int:
    sums = torch.zeros((60, G.shape[1]), dtype=torch.uint8)
    found = sums.clone().to(device)
    with host_kernels():
        rows, values = embedding_gradient(ids, G, 1.7)
        LevelSink(sums, 220).add_rows(rows, values, _slot(torch.device("cpu")))
    gpu = gpu_kernels(found)
    if gpu is None:
        LevelSink(found, 220).add_rows(*embedding_gradient(ids.to(device), G.to(device), 1.7), _slot(device))
    else:
        gpu.add_row_levels(ids.to(device), G.to(device), 1.7, 220, found, _slot(device))
    return int((found.cpu() != sums).sum())


def _differing_tied(ids: torch.Tensor, G: torch.Tensor, device: torch.device) -> int:
    """An embedding's rows added to the bands of the head's gradient; `act` and `freq` of both inputs."""
    columns = G.shape[1]
    band = (torch.randn(60, columns) * 1e-2).to(G.dtype)
    W, row_square, column_square = torch.randn(60, columns).to(G.dtype), torch.rand(60), torch.rand(columns)
    sums = torch.zeros((3, 60, columns), dtype=torch.uint8)
    found = sums.clone().to(device)
    with host_kernels():
        WithRows(LevelSink(sums[0], 220), [(ids, G, 0.3)]).add(band.clone(), 0, _slot(torch.device("cpu")))
    arrays = W.float().numpy(), row_square.numpy(), column_square.numpy()
    add_dense_levels(*arrays, 230, 2.0 ** (-5 / 8), sums[1].numpy(), sums[2].numpy())
    WithRows(LevelSink(found[0], 220), [(ids.to(device), G.to(device), 0.3)]).add(
        band.to(device, copy=True), 0, _slot(device)
    )
    if (gpu := gpu_kernels(found)) is not None:
        squares = row_square.to(device), column_square.to(device)
        gpu.add_dense_levels(W.to(device), *squares, 230, 2.0 ** (-5 / 8), found[1], found[2])
    else:
        found[1:] = sums[1:].to(device)
    return int((found.cpu() != sums).sum())


def _differing_product(setting: Setting, rows: int, columns: int, tokens: int) -> int:
    """Small integers, whose sums are exact in any order."""
    A, B = (torch.randint(-4, 5, (tokens, n)).to(torch.bfloat16).to(setting.device) for n in (rows, columns))
    sums = torch.zeros((2, rows, columns), dtype=torch.uint8, device=setting.device)
    for first, band in product_bands(A, B):
        LevelSink(sums[0], 252).add(band, first, _slot(setting.device))
    gpu = gpu_kernels(A)
    assert gpu is not None
    gpu.add_product_levels(A, B, 252, sums[1], _slot(setting.device))
    return int((sums[0] != sums[1]).sum())


def _differing_again(setting: Setting) -> int:
    """Exactly once holds on a GPU only if a sample gives the same sums every time."""
    shape = setting.layers(1)
    recorder = Recorder(random_model(shape, setting.device, torch.bfloat16, nf4=True))
    sample = random_samples(1, setting.of(1024, 256, 24), shape["vocab_size"])
    found = []
    for _ in range(2):
        recorder.open(dict.fromkeys(recorder.sites, ANY_CALIBRATION), spills=False)
        assert not recorder.record(sample)
        found.append(
            {name: site.grad.cpu() for name, site in recorder.sites.items() if site.grad is not None}
        )
    return sum(int((found[0][name] != found[1][name]).sum()) for name in found[0])


# model: the same model on both devices


def model(setting: Setting) -> Result:
    """The shipped model recorded on both devices: levels of every weight, sample by sample; the same bad samples."""
    count, tokens = setting.of((64, 256), (4, 256), (2, 24))
    samples = setting.texts(count, tokens)
    cpu = torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    threads = 1 if setting.tiny else max(1, torch.get_num_threads())
    found: list[tuple[Recorder, DenseModel]] = []
    with host_kernels():
        found.append(_opened(setting.shipped(cpu, torch.float32), threads))
        calibration = calibrate(found[0][0], samples[:8], [list(found[0][0].sites)])
    found.append(_opened(setting.shipped(setting.device, torch.float32), threads))
    off = {1: 0, 2: 0}
    weights = 0
    for sample in samples:
        with host_kernels():
            expected = _levels(found[0][0], sample, calibration)
        levels = _levels(found[1][0], sample, calibration)
        for name, level in expected.items():
            apart = (levels[name].to(torch.int16) - level.to(torch.int16)).abs()
            weights += apart.numel()
            off[1] += int((apart == 1).sum())
            off[2] += int((apart > 1).sum())
    poisoned = [_poisoned(sample) if sample.index % 3 == 0 else sample for sample in samples[:12]]
    reasons = []
    for place, (recorder, dense) in enumerate(found):
        dense.model.get_input_embeddings().weight.data[POISON] = torch.inf  # type: ignore[operator]
        recorder.open(calibration, spills=False)
        if place:
            reasons.append(recorder.record(poisoned))
        else:
            with host_kernels():
                reasons.append(recorder.record(poisoned))
    figures = {
        "samples": count, "weights": weights // count, "off by one": off[1] / weights, "by more": off[2],
        "set aside": {str(index): reason for index, reason in reasons[1].items()},
    }  # fmt: skip
    same = float(reasons[0].keys() != reasons[1].keys())
    return Result(
        [
            at_most("model: share of levels off by one", off[1] / weights, 0.001),
            at_most("model: levels off by more", off[2], 0),
            at_most("model: good and bad samples that differ", same, 0),
        ],
        figures,
    )


def _opened(dense: DenseModel, threads: int) -> tuple[Recorder, DenseModel]:
    return Recorder(dense, threads), dense


def _levels(
    recorder: Recorder, sample: Sample, calibration: dict[str, TensorCalibration]
) -> dict[str, torch.Tensor]:
    """Of one sample's gradients, on the host."""
    recorder.open(calibration, spills=False)
    if bad := recorder.record([sample]):
        raise RuntimeError(f"sample {sample.index} was set aside: {bad}")
    sums = {name: site.grad for name, site in recorder.sites.items() if site.grad is not None}
    return {name: part.cpu() for name, part in sums.items()}


def _poisoned(sample: Sample) -> Sample:
    ids = sample.input_ids.copy()
    ids[len(ids) // 2] = POISON
    return Sample(sample.index, sample.slice, ids, sample.labels)


# record: what recording costs beside what cannot be avoided


def record(setting: Setting) -> Result:
    """Forward and backward; the same with every weight gradient formed and dropped; ours, in one kernel and in two."""
    count = setting.of(4, 2, 1)
    shape = setting.layers(setting.of(4, 1, 1))
    figures: dict[str, Any] = {"layers": shape["num_hidden_layers"], "tokens": {}}
    goals = []
    load = partial(random_model, shape, setting.device, torch.bfloat16, nf4=True)
    limit, plain = _forming(load()), Recorder(load())
    ours = Recorder(load())
    ours.open(dict.fromkeys(ours.sites, ANY_CALIBRATION), spills=False)
    for tokens in setting.of((256, 1024, 2048), (256,), (8,)):
        samples = random_samples(count, tokens, shape["vocab_size"])
        ways: dict[str, Callable[[], object]] = {
            "forward, backward": partial(_run_all, plain, samples),
            "and gradients formed": partial(_run_all, limit, samples),
            "ours": partial(_run_all, ours, samples),
            "ours, product and levels in one kernel": partial(_fused, 1 << 30, ours, samples),
            "ours, one after the other": partial(_fused, 0, ours, samples),
        }
        seconds = by_turns(ways, setting)
        here: dict[str, Any] = {
            "ms a sample": {way: 1e3 * statistics.median(found) / count for way, found in seconds.items()},
            "to the limit": {way: ratio(seconds, way, "and gradients formed") for way in ways},
            "device ms a sample": {
                way: 1e3 * device_seconds(ways[way], setting) / count
                for way in ("and gradients formed", "ours")
            },
            "waits inside a sample": _waits(ours, samples[0], setting),
        }
        figures["tokens"][str(tokens)] = here
        goals.append(at_most(f"record, {tokens} tokens: ours / limit", here["to the limit"]["ours"], 1.15))
        if setting.on_gpu:
            device = here["device ms a sample"]
            share = device["ours"] / device["and gradients formed"]
            goals.append(
                at_most(f"record, {tokens} tokens: the device's own time, ours / limit", share, 1.15)
            )
    started = time.perf_counter()
    for site in ours.sites.values():
        if site.grad is not None:
            site.grad_total = np.zeros(site.matrix_shape, np.uint16)
    for site in ours.sites.values():
        site.keep_batch()
    weights = sum(parameter.size for parameter in ours.parameters)
    figures["ns a weight and spill"] = 1e9 * (time.perf_counter() - started) / weights
    if setting.on_gpu:
        waits = [here["waits inside a sample"] for here in figures["tokens"].values()]
        most = max(sum(place.startswith("tinyonn/") for place in places) for places in waits)
        goals.append(at_most("record: waits of ours for the device in a sample", most, 2))
    return Result(goals, figures)


def _run_all(recorder: Recorder, samples: Sequence[Sample]) -> None:
    for sample in samples:
        recorder.run(sample)


def _fused(limit: int, recorder: Recorder, samples: Sequence[Sample]) -> None:
    """With the kernel that forms product and levels in one for samples of up to so many tokens."""
    from tinyonn.record import sums

    before = sums.FUSED_TOKENS
    sums.FUSED_TOKENS = limit
    try:
        _run_all(recorder, samples)
    finally:
        sums.FUSED_TOKENS = before


def _waits(recorder: Recorder, sample: Sample, setting: Setting) -> list[str]:
    """Where a sample makes the host wait for the device; the loss and the checks at its end are two."""
    if not setting.on_gpu:
        return []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            recorder.run(sample)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [_place(one) for one in found if "synchronizing" in str(one.message)]


def _place(warning: warnings.WarningMessage) -> str:
    """File and line; of ours below the project's folder."""
    path = Path(warning.filename)
    return (
        f"{path.relative_to(ROOT) if path.is_relative_to(ROOT / 'tinyonn') else path.name}:{warning.lineno}"
    )


def _forming(dense: DenseModel) -> Recorder:
    """A recorder that records nothing; behind every linear layer its weight gradient is formed into one buffer."""
    recorder = Recorder(dense)
    modules: dict[str, list[Use]] = defaultdict(list)
    for use in list_uses(dense.model):
        modules[use.module_name].append(use)
    size = max(parameter.size for parameter in recorder.parameters if parameter.kind == "linear")
    buffer = torch.empty(size, dtype=torch.bfloat16, device=dense.device)

    def meet(use: Use, X: torch.Tensor, G: torch.Tensor) -> None:
        G_TO = G.reshape(-1, G.shape[-1])
        torch.mm(G_TO.T, X, out=buffer[: G_TO.shape[1] * X.shape[1]].view(G_TO.shape[1], X.shape[1]))

    for uses in modules.values():
        if uses[0].operation == "linear":
            attach(uses[0].module, partial(meet, uses[0]), lambda: True)
    return recorder


# 8 GiB: the whole model on a small card


def memory(setting: Setting) -> Result:
    """The 4B model's whole shape under a hard cap of 8 GiB, in as many windows as the plan says."""
    shape = setting.of(QWEN_4B, setting.layers(1), TINY)
    tokens, count = setting.of((1024, 4), (256, 2), (16, 2))
    cap = 8 * GIB
    context = 0
    if setting.on_gpu:
        torch.zeros(1, device=setting.device)
        free, total = torch.cuda.mem_get_info(setting.device)
        context = total - free  # of this process, and of others if there are any
        torch.cuda.set_per_process_memory_fraction((cap - context) / total, torch.cuda.current_device())
    dense = random_model(shape, setting.device, torch.bfloat16, nf4=True, checkpointing=True)
    recorder = Recorder(dense)
    parameters = recorder.parameters
    facts = ModelFacts(
        "Qwen1.5-4B", shape["num_hidden_layers"], shape["hidden_size"], shape["intermediate_size"],
        shape["vocab_size"], "nf4", 2, checkpointing=True,
    )  # fmt: skip
    options = RecordOptions(segment=SUM_SAMPLES, workers=1, threads=1, windows="auto", max_live=3)
    plan = plan_record(
        parameters, facts, DataFacts(count, tokens, tokens, 1),
        Machine("cuda", cap, 64 * GIB, None, 1), options,
    )  # fmt: skip
    planned = next(tier for tier in plan.tiers if tier.name.startswith("VRAM")).total
    windows = layer_windows([(p.name, p.layer, p.size) for p in parameters], plan.windows)
    samples = random_samples(count, tokens, shape["vocab_size"])
    setting.wait()
    started = time.perf_counter()
    for names in windows:
        recorder.open(dict.fromkeys(names, ANY_CALIBRATION), spills=False)
        if recorder.record(samples):
            raise RuntimeError("a sample was set aside")
    setting.wait()
    seconds = time.perf_counter() - started
    figures: dict[str, Any] = {
        "weights": sum(parameter.size for parameter in parameters), "windows": plan.windows, "tokens": tokens,
        "planned bytes": planned, "samples an hour": 3600 * count / seconds,
    }  # fmt: skip
    goals = []
    if setting.on_gpu:
        peak = torch.cuda.max_memory_reserved(setting.device) + context
        figures |= {"peak bytes": peak, "context bytes": context, "assumed context bytes": CUDA_BYTES}
        goals.append(at_most("8 GiB: peak, share of the cap", peak / cap, 1.0))
        goals.append(at_most("8 GiB: distance of peak and plan", abs(peak / planned - 1), 0.1))
    return Result(goals, figures)


# profile


@dataclass(frozen=True)
class RandomGroups:
    """Groups of weights, drawn."""

    tensors: tuple[Parameter, ...]
    identity: Identity = field(default=Identity("assembly", "random", 101))

    def read(self, name: str) -> Any:
        """A uint8 of every weight; above 100 it is in no group."""
        parameter = next(one for one in self.tensors if one.name == name)
        seed = self.tensors.index(parameter)
        return np.random.default_rng(seed).integers(0, 200, parameter.shape).astype(np.uint8)


def profile(setting: Setting) -> Result:
    """What every group of weights does on a sample, on the device and on the CPU."""
    count, tokens = setting.of((16, 256), (2, 256), (2, 24))
    torch.backends.cuda.matmul.allow_tf32 = False
    samples = setting.texts(count, tokens)
    found: list[tuple[list[Totals], float]] = []
    with host_kernels():
        found.append(_profiled(setting, torch.device("cpu"), samples))
    found.append(_profiled(setting, setting.device, samples))
    worst = dict.fromkeys(Totals._fields, 0.0)
    for expected, totals in zip(found[0][0], found[1][0], strict=True):
        for name in worst:
            a, b = (np.asarray(getattr(one, name), np.float64) for one in (expected, totals))
            scale = np.abs(np.asarray(expected.contribution if name == "pull" else a)).max()
            worst[name] = max(worst[name], float(np.abs(a - b).max() / max(scale, 1e-30)))
    figures = {"worst": worst, "seconds a sample, CPU and device": [seconds for _, seconds in found]}
    return Result([at_most("profile: largest difference", max(worst.values()), 1e-3)], figures)


def _profiled(
    setting: Setting, device: torch.device, samples: Sequence[Sample]
) -> tuple[list[Totals], float]:
    """Every sample's totals, and seconds a sample."""
    dense = setting.shipped(device, torch.float32)
    tensors = tuple(p for p in Recorder(dense).parameters if p.kind == "linear")
    calibration = dict.fromkeys((p.name for p in tensors), ANY_CALIBRATION)
    measurer = Measurer(dense, RandomGroups(tensors), calibration)
    started = time.perf_counter()
    totals = [measurer.run(sample).totals for sample in samples]
    return totals, (time.perf_counter() - started) / len(samples)
