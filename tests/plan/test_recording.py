"""The plan: pure, right to the byte where arithmetic is exact, and it refuses what does not fit."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyonn.config import DataConfig, ModelConfig, RecordConfig, load_config
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import CapacityError, InputError
from tinyonn.machine import free_ram, parse_gpus
from tinyonn.plan.demands import BATCH, DataFacts, Machine, ModelFacts, compute_needs
from tinyonn.plan.facts import describe_data, describe_machine, describe_model, plan_run
from tinyonn.plan.recording import (
    EXACT_SAMPLES,
    LOST_SECONDS,
    RecordOptions,
    RecordPlan,
    commit_seconds,
    plan_record,
    sample_seconds,
    segment_size,
)
from tinyonn.show.sizes import GiB, MiB

QWEN = Path(__file__).parents[2] / "configs" / "qwen1.5-4b.yaml"


def model_of(layers: int = 4, hidden: int = 256, inner: int = 512, vocabulary: int = 1000) -> ModelFacts:
    return ModelFacts("test", layers, hidden, inner, vocabulary, "nf4", 2)


def parameters_of(model: ModelFacts) -> list[Parameter]:
    H, inner, V = model.hidden, model.intermediate, model.vocabulary
    found = [Parameter("embed.weight", (V, H), None, "embedding")]
    for layer in range(model.layers):
        shapes = {"q": (H, H), "up": (inner, H), "down": (H, inner)}
        found += [
            Parameter(f"{layer}.{name}.weight", shape, layer, "linear") for name, shape in shapes.items()
        ]
        found.append(Parameter(f"{layer}.norm.weight", (H,), layer, "norm"))
    return [*found, Parameter("head.weight", (V, H), None, "linear")]


DATA = DataFacts(samples=6400, mean_tokens=100, max_tokens=256, slices=4)
CPU = Machine("cpu", None, 32 * GiB, 200 * GiB, 4)
GPU = Machine("cuda", 8 * GiB, 32 * GiB, 200 * GiB, 1)


def needs_of(plan: RecordPlan) -> dict[str, int]:
    return {need.what: need.bytes for tier in (plan.worker, *plan.tiers) for need in tier.needs}


def plan_of(
    machine: Machine, model: ModelFacts | None = None, data: DataFacts = DATA, **record: Any
) -> RecordPlan:
    model = model or model_of()
    return plan_record(parameters_of(model), model, data, machine, RecordConfig(**record))


def test_weights_and_sums_are_counted_to_the_byte() -> None:
    model = model_of()
    linear = sum(p.size for p in parameters_of(model) if p.kind == "linear" and p.layer is not None)
    total = sum(p.size for p in parameters_of(model))
    needs = needs_of(plan_of(CPU, windows=1, workers=1))
    assert needs["NF4 weights"] == linear // 2 + linear // 64 * 4
    assert needs["trunk"] == 2 * (total - linear)
    assert needs["uint8 sums"] == total
    assert needs["uint16 sums"] == 2 * total
    inputs = 1000 + model.layers * (3 * 256 + 512) + 256
    assert needs["column histograms"] == inputs * 512


def test_seventeen_samples_need_no_uint16_sums() -> None:
    assert "uint16 sums" not in needs_of(plan_of(CPU, segment=BATCH, calibration=BATCH + 1))
    assert "uint16 sums" in needs_of(plan_of(CPU, segment=BATCH + 1, calibration=BATCH))


def test_a_tied_tensor_needs_three_sums_a_weight_and_no_histogram() -> None:
    model = model_of()
    tied = replace(model, tied=frozenset(["embed.weight"]))
    free, bound = needs_of(plan_of(CPU, model, windows=1)), needs_of(plan_of(CPU, tied, windows=1))
    assert bound["uint8 sums"] - free["uint8 sums"] == 2 * 1000 * 256
    assert free["column histograms"] - bound["column histograms"] == 1000 * 512


def test_on_a_gpu_compute_lies_in_vram_and_sums_over_seventeen_in_ram() -> None:
    plan = plan_of(GPU)
    tiers = {tier.name: {need.what for need in tier.needs} for tier in (plan.worker, *plan.tiers)}
    assert {"NF4 weights", "uint8 sums", "CUDA itself"} <= tiers["VRAM of a GPU"]
    assert "uint16 sums" in tiers["RAM of a worker"]
    assert "NF4 weights" not in tiers["RAM of a worker"]


@pytest.mark.parametrize("quantity", ["vram", "ram", "disk"])
def test_less_memory_never_fits_more(quantity: str) -> None:
    """Going down in steps: fits, fits with more windows or fewer workers, then refused for good."""
    model = model_of(layers=8, hidden=2048, inner=4096, vocabulary=32000)
    machine = replace(GPU, units=4) if quantity == "vram" else CPU
    size, plans, refused = 16 * GiB, [], False
    while size > 512 * MiB:
        try:
            smaller: Any = {quantity: size}
            plans.append(plan_of(replace(machine, **smaller), model))
            assert not refused
        except CapacityError:
            refused = True
        size = size * 14 // 15
    assert plans
    assert refused
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds)
    if quantity == "vram":
        assert plans[0].windows == 1 < plans[-1].windows
    if quantity == "ram":
        assert plans[0].workers == 4 > plans[-1].workers


@settings(max_examples=60, deadline=None)
@given(
    vram=st.one_of(st.none(), st.integers(1 * GiB, 24 * GiB)),
    ram=st.integers(2 * GiB, 64 * GiB),
    disk=st.one_of(st.none(), st.integers(GiB, 500 * GiB)),
    units=st.integers(1, 16),
    tokens=st.integers(1, 4096),
    checkpointing=st.booleans(),
)
def test_a_plan_fits_in_every_tier(
    vram: int | None, ram: int, disk: int | None, units: int, tokens: int, checkpointing: bool
) -> None:
    model = replace(
        model_of(layers=6, hidden=1024, inner=3072, vocabulary=50000), checkpointing=checkpointing
    )
    machine = Machine("cpu" if vram is None else "cuda", vram, ram, disk, units)
    data = replace(DATA, max_tokens=tokens, mean_tokens=min(tokens, 100))
    try:
        plan = plan_of(machine, model, data)
    except CapacityError:
        return
    assert all(
        tier.limit is None or sum(need.bytes for need in tier.needs) <= tier.limit for tier in plan.tiers
    )
    assert 1 <= plan.workers <= units
    assert plan.workers_for(plan.places) == plan.workers
    assert plan.figures()["segments"] * plan.segment_size >= data.samples


def test_a_remedy_has_been_tried() -> None:
    model = model_of(layers=8, hidden=2048, inner=8192, vocabulary=32000)
    tight = replace(GPU, vram=3 * GiB)
    data = replace(DATA, max_tokens=2048)
    wanted = r"VRAM of a GPU are needed and 3\.00 GiB are there .*it fits with model\.checkpointing: true"
    with pytest.raises(CapacityError, match=wanted):
        plan_of(tight, model, data)
    assert plan_of(tight, replace(model, checkpointing=True), data).windows >= 1


def test_numbers_in_the_configuration_are_kept_or_refused() -> None:
    assert plan_of(CPU, workers=3, windows=2).workers == 3
    assert plan_of(CPU, workers=3, windows=2).windows == 2
    with pytest.raises(CapacityError, match=r"it fits with record\.windows: auto and record\.workers: auto"):
        plan_of(replace(CPU, ram=8 * GiB), workers=100)


def test_a_full_disk_names_the_disk_and_a_remedy() -> None:
    model = model_of(layers=8, hidden=2048, inner=8192, vocabulary=32000)
    wanted = r"of disk are needed and 4\.00 GiB are there .*it fits with record\.max_live: 1"
    with pytest.raises(CapacityError, match=wanted):
        plan_of(replace(CPU, disk=4 * GiB), model)


def test_qwen_4b_fits_in_8_gib_of_vram_and_32_gib_of_ram(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    limits = {"vram": 8 * GiB, "ram": 32 * GiB, "disk": 200 * GiB}
    plan = plan_run("storage/qwen", tmp_path, load_config(QWEN), limits)
    assert plan.weights == 3_950_369_280
    assert plan.windows > 1
    assert all(tier.fits for tier in plan.tiers)
    assert any("data.samples" in text for text in plan.data.assumed)
    with pytest.raises(CapacityError, match="VRAM of a GPU"):
        plan_run("storage/qwen", tmp_path, load_config(QWEN), {**limits, "vram": 4 * GiB})


@settings(max_examples=200, deadline=None)
@given(
    hidden=st.sampled_from([64, 512, 2560]),
    samples=st.integers(1, 10**7),
    tokens=st.floats(1, 4096),
    slices=st.integers(1, 16),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_a_segment_obeys_its_bounds(
    hidden: int, samples: int, tokens: float, slices: int, device: Any
) -> None:
    parameters = parameters_of(model_of(8, hidden, 4 * hidden, 30000))
    weights = sum(p.size for p in parameters)
    size = segment_size(parameters, samples, tokens, slices, device)
    each = sample_seconds(weights, tokens, device)
    assert 1 <= size <= EXACT_SAMPLES
    assert size == 1 or size * each <= LOST_SECONDS
    cheap = commit_seconds(weights, len(parameters)) <= 0.03 * size * each * 1.0001
    assert cheap or size == EXACT_SAMPLES or (size + 1) * each > LOST_SECONDS


def test_a_run_has_about_64_segments_evenly_over_its_slices() -> None:
    parameters = parameters_of(model_of())
    for slices in (1, 3, 6, 8, 16):
        samples = 9600 * slices // 4
        size = segment_size(parameters, samples, 2000, slices, "cpu")
        assert 56 <= -(-samples // slices // size) * slices <= 72


def test_levels_of_the_largest_segment_fit_in_a_uint16() -> None:
    assert EXACT_SAMPLES * 15 <= 65535 < (EXACT_SAMPLES + 1) * 15


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma"])
def test_activations_are_what_the_backward_pass_keeps(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    layers, hidden, inner, tokens = 2, 128, 384, 64
    settings = AutoConfig.for_model(
        kind, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64, head_dim=32, pad_token_id=0,
    )  # fmt: skip
    net: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval().requires_grad_(False)
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    net.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (keep(inputs[0]),))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    measured = sum(kept.values())

    facts = ModelFacts(kind, layers, hidden, inner, 64, "none", 2)
    parameters = [
        Parameter(name, tuple(p.shape), 0, "norm" if p.ndim == 1 else "linear")
        for name, p in net.named_parameters()
    ]
    data = replace(DATA, max_tokens=tokens)
    needs = {need.what: need.bytes for need in compute_needs(parameters, [parameters], facts, data, "cpu")}
    passing = tokens * ((3 * 2 + 4) * inner + 6 * 2 * hidden)
    assert needs["activations"] - passing == pytest.approx(measured, rel=0.1)


def test_data_are_counted_where_they_can_be_and_assumed_aloud_where_not(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), path)
    counted = describe_data(DataConfig(path=str(path), max_tokens=100), tmp_path)
    assert (counted.samples, counted.mean_tokens) == (3, 50.0)
    assert not any("samples" in text and "not counted" in text for text in counted.assumed)
    assert describe_data(DataConfig(path=str(path), samples=2), tmp_path).samples == 2
    named = describe_data(DataConfig(path="org/name", samples=1234), tmp_path)
    assert named.samples == 1234
    assert "data.samples" in named.assumed[0]
    assert "not set" in describe_data(DataConfig(path="org/name"), tmp_path).assumed[0]


def test_the_reference_model_is_described_like_any_other(tmp_path: Path) -> None:
    parameters, facts = describe_model(ModelConfig(path="Qwen/Qwen1.5-4B"))
    assert len(parameters) == 483
    assert (facts.layers, facts.hidden, facts.intermediate, facts.vocabulary) == (40, 2560, 6912, 151936)
    assert facts.tied == frozenset()


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="no usable GPU"):
        describe_machine("cuda", tmp_path, {})
    assert describe_machine("cuda", tmp_path, {"vram": 8 * GiB}).vram == 8 * GiB
    assert describe_machine("auto", tmp_path, {}).device == "cpu"
    assert describe_machine("cpu", tmp_path, {"vram": 8 * GiB}).device == "cpu"


def test_nvidia_smi_is_read() -> None:
    text = "NVIDIA GeForce RTX 3070, 7800, 8192\nOdd, name, 10, 20\nLost GPU, [Unknown Error], [N/A]\n"
    found = parse_gpus(text)
    assert [(gpu.name, gpu.free) for gpu in found] == [
        ("NVIDIA GeForce RTX 3070", 7800 * MiB),
        ("Odd, name", 10 * MiB),
    ]


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{300 * MiB}\n")
    (tmp_path / "memory.current").write_text(f"{100 * MiB}\n")
    assert free_ram(tmp_path) == 200 * MiB
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {50 * MiB}\n")
    assert free_ram(tmp_path) == 250 * MiB
    (tmp_path / "memory.max").write_text("max\n")
    assert free_ram(tmp_path) > 300 * MiB


def test_free_ram_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable: 3072 kB\n")
    assert free_ram(tmp_path, meminfo) == 3 * MiB
    meminfo.write_text("MemTotal: 9000 kB\n")
    assert free_ram(tmp_path, meminfo) == pytest.approx(free_ram(tmp_path), rel=0.5)


@pytest.mark.parametrize("machine", [CPU, GPU, replace(CPU, ram=2 * GiB)])
def test_options_without_a_configuration_plan_the_same(machine: Machine) -> None:
    config = RecordConfig(workers=2)
    options = RecordOptions(config.segment, config.workers, config.threads, config.windows, config.max_live)
    found = []
    for record in (config, options):
        try:
            found.append(str(plan_record(parameters_of(model_of()), model_of(), DATA, machine, record)))
        except CapacityError as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_planning_changes_nothing_it_is_given() -> None:
    model = model_of()
    parameters, record = parameters_of(model), RecordConfig()
    before = copy.deepcopy((parameters, model, DATA, GPU, record))
    assert plan_record(parameters, model, DATA, GPU, record) == plan_record(
        parameters, model, DATA, GPU, record
    )
    assert before == (parameters, model, DATA, GPU, record)
