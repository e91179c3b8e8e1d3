"""Exports: dense checkpoints that other tools read, the hub's folder, masks for other researchers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.experts.independent_reader import read_weights
from tests.experts.runs import CELLS, clustered_run
from tinyonn.config import Config, ExpertsConfig
from tinyonn.errors import InputError
from tinyonn.experts.assemble import assemble_run
from tinyonn.experts.export import Assembled, export_model, numbers_of
from tinyonn.experts.folder import open_assembled
from tinyonn.train.checkpoint import save_model

IDS = torch.randint(0, 250, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("export")
    config = clustered_run(folder)
    assemble_run(str(folder / "run"), config.model, ExpertsConfig(budget=0.5), folder=folder / "sparse")
    return folder, config


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "quantization"), [("qwen2", "nf4"), ("gpt2", "nf4"), ("gpt2", "none"), ("gemma", "nf4")]
)
def test_a_dense_checkpoint_is_the_model_with_those_gates(
    name: str, quantization: str, tmp_path: Path
) -> None:
    config = clustered_run(tmp_path, name, quantization)
    assemble_run(str(tmp_path / "run"), config.model, ExpertsConfig(budget=0.5), folder=tmp_path / "sparse")
    chosen = [1, 4]
    report = export_model(tmp_path / "sparse", tmp_path / "dense", "dense", chosen)
    sparse = open_assembled(tmp_path / "sparse")
    sparse.set_path("dense")
    with sparse.gates([float(number in chosen) for number in range(CELLS)]):
        wanted = logits(sparse)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert type(dense).__name__ == type(sparse.base).__name__
    assert dense.dtype == torch.bfloat16
    assert torch.equal(logits(dense), wanted)
    sizes = sparse.config.expert_sizes
    assert report.weights == sizes[1] + sizes[4] + sizes[CELLS]


@pytest.mark.parametrize(("name", "arch"), [("qwen2", "QWEN2"), ("llama", "LLAMA"), ("qwen3", "QWEN3")])
def test_a_dense_checkpoint_has_what_a_conversion_to_gguf_needs(name: str, arch: str, tmp_path: Path) -> None:
    config = clustered_run(tmp_path, name)
    assemble_run(str(tmp_path / "run"), config.model, ExpertsConfig(), folder=tmp_path / "sparse")
    export_model(tmp_path / "sparse", tmp_path / "dense", "dense")
    layers = 2
    known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch), layers)
    shapes: dict[str, list[int]] = {}
    for path in (tmp_path / "dense").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name = known.get_name(key, try_suffixes=(".weight", ".bias"))
                assert name, f"{key} has no place in a GGUF file"
                shapes[name] = file.get_slice(key).get_shape()
    for layer in range(layers):
        assert shapes[f"blk.{layer}.ffn_down.weight"] == [64, 128]
        assert shapes[f"blk.{layer}.ffn_up.weight"] == shapes[f"blk.{layer}.ffn_gate.weight"] == [128, 64]
        assert shapes[f"blk.{layer}.attn_q.weight"] == shapes[f"blk.{layer}.attn_output.weight"] == [64, 64]
        assert {f"blk.{layer}.{norm}.weight" for norm in ("attn_norm", "ffn_norm")} <= shapes.keys()
    assert shapes["token_embd.weight"] == shapes["output.weight"] == [264, 64]
    assert shapes["output_norm.weight"] == [64]


def test_masks_are_what_the_assembled_model_holds(assembled: tuple[Path, Config], tmp_path: Path) -> None:
    folder, _ = assembled
    export_model(folder / "sparse", tmp_path / "npz", "npz")
    report = export_model(folder / "sparse", tmp_path / "parquet", "parquet")
    arrays = {name: array for path in (tmp_path / "npz").iterdir() for name, array in np.load(path).items()}
    rows = pq.read_table(tmp_path / "parquet").to_pydict()
    seen = 0
    for module, (experts, row, column, values) in read_weights(folder / "sparse"):
        wanted = np.full_like(arrays[f"{module}.weight"], 255)
        wanted[row, column] = experts
        assert np.array_equal(arrays[f"{module}.weight"], wanted)
        its = [i for i, name in enumerate(rows["tensor"]) if name == f"{module}.weight"]
        for field, array in (("row", row), ("column", column), ("expert", experts), ("value", values)):
            assert np.array_equal(np.array([rows[field][i] for i in its]), array)
        seen += row.size
    assert seen == report.weights == len(rows["tensor"])


def test_masks_of_some_experts_leave_the_others_out(assembled: tuple[Path, Config], tmp_path: Path) -> None:
    folder, _ = assembled
    export_model(folder / "sparse", tmp_path / "npz", "npz", [2])
    found = {
        int(n)
        for path in (tmp_path / "npz").iterdir()
        for array in np.load(path).values()
        for n in np.unique(array)
    }
    assert found <= {2, CELLS, 255}


def test_the_hub_folder_loads_and_its_card_has_the_figures(
    assembled: tuple[Path, Config], tmp_path: Path
) -> None:
    folder, _ = assembled
    figures = {"dense NF4": {"code": 1.25, "mean": 2.5}, "kept": {"code": 1.5, "mean": 2.75}}
    export_model(folder / "sparse", tmp_path / "hub", "hub", figures=figures)
    card = (tmp_path / "hub" / "README.md").read_text("utf-8")
    assert "| kept | 1.500 | 2.750 |" in card
    assert torch.equal(logits(open_assembled(tmp_path / "hub")), logits(open_assembled(folder / "sparse")))


def test_a_chat_model_stops_at_the_end_of_its_turn(assembled: tuple[Path, Config], tmp_path: Path) -> None:
    """Written by assembly and, for a folder of before, by its exports."""
    folder, _ = assembled
    end = AutoTokenizer.from_pretrained(folder / "sparse").convert_tokens_to_ids("<|im_end|>")

    def eos(folder: Path) -> Any:
        return GenerationConfig.from_pretrained(folder).eos_token_id

    assert eos(folder / "model") == 256
    assert eos(folder / "sparse") == [256, end]
    former = tmp_path / "former"
    shutil.copytree(folder / "sparse", former)
    (former / "digests.json").unlink()  # which it had not
    path = former / "generation_config.json"
    for number in range(2):
        path.write_text(json.dumps({"eos_token_id": 256}), "utf-8") if number == 0 else path.unlink()
        for format in ("hub", "dense"):
            export_model(former, tmp_path / f"{format} {number}", format)
            assert eos(tmp_path / f"{format} {number}") == [256, end]


def test_a_trained_model_is_exported_as_what_it_became(
    assembled: tuple[Path, Config], tmp_path: Path
) -> None:
    folder, _ = assembled
    model = open_assembled(folder / "sparse")
    model.set_router({"branches": [[0, 1, 2], [3, 4, 5]], "width": 8, "top_k": 2})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("values"):
                parameter.mul_(1.25)
    save_model(model, tmp_path / "trained", {"steps": 3}, folder / "sparse")
    export_model(tmp_path / "trained", tmp_path / "dense", "dense", [1, 4])
    model.set_path("dense")
    with model.gates([float(number in (1, 4)) for number in range(CELLS)]):
        wanted = logits(model)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert torch.equal(logits(dense), wanted)
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"]) == set(dense.state_dict())
    report = export_model(tmp_path / "trained", tmp_path / "npz", "npz")
    assert report.weights == sum(model.config.expert_sizes)
    export_model(tmp_path / "trained", tmp_path / "hub", "hub")
    assert open_assembled(tmp_path / "hub").router is not None
    card = (tmp_path / "hub" / "README.md").read_text("utf-8")
    assert "Trained after the cut: experts, 3 steps." in card
    assert "`tinyonn evaluate --trained` measures it" in card
    assert "By default 2 of 6 experts are on." in card


def test_files_may_be_cut_anywhere(assembled: tuple[Path, Config], tmp_path: Path) -> None:
    """Parts of a matrix in two files, and several layers in one: the same export, a file for each layer."""
    folder, _ = assembled
    open_assembled(folder / "sparse").save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    open_assembled(folder / "sparse").save_pretrained(tmp_path / "whole")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 5
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1
    for name in ("cut", "whole"):
        for format in ("dense", "npz"):
            export_model(tmp_path / name, tmp_path / f"{name}-{format}", format)
            export_model(folder / "sparse", tmp_path / f"{name}-{format}-plain", format)
            paths = sorted((tmp_path / f"{name}-{format}-plain").glob("model-*"))
            assert paths
            for path in paths:
                assert path.read_bytes() == (tmp_path / f"{name}-{format}" / path.name).read_bytes()


def test_experts_of_slices_are_those_that_they_would_keep(assembled: tuple[Path, Config]) -> None:
    folder, _ = assembled
    opened = Assembled(folder / "sparse")
    needs = opened.config["assembly"]["needs"]

    def of(slices: str) -> list[int]:
        found = numbers_of(None, slices, opened)
        assert found is not None
        return found

    assert set(needs) == {"code", "prose"}
    assert of("code") == [number for number, need in enumerate(needs["code"]) if need <= 1]
    assert of("code") != of("prose")
    assert of("code,prose") == sorted({*of("code"), *of("prose")})
    assert 0 < len(of("code")) < CELLS
    with pytest.raises(InputError, match="no slice 'sums' with samples in this model; there are code, prose"):
        of("sums")
    opened.config["assembly"]["needs"] = {"code": [2.0] * CELLS}
    with pytest.raises(InputError, match="code would keep no expert's weights"):
        of("code")
    del opened.config["assembly"]["needs"]
    with pytest.raises(InputError, match=r"earlier version .* `tinyonn assemble` again"):
        of("code")


def test_an_export_that_was_cut_off_is_made_again(
    assembled: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cut, whole = assembled[0] / "sparse", tmp_path / "cut", tmp_path / "whole"
    export_model(source, whole, "hub")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tinyonn.experts.export.write_card", killed)
        with pytest.raises(KeyboardInterrupt):
            export_model(source, cut, "hub")
    (cut / "half").mkdir()
    (cut / "half" / "file").touch()
    export_model(source, cut, "hub")
    found = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (cut, whole)]
    assert found[0] == found[1]
    with pytest.raises(InputError, match="not empty"):
        export_model(source, cut, "hub")


def test_what_cannot_be_exported_is_refused(assembled: tuple[Path, Config], tmp_path: Path) -> None:
    folder, _ = assembled

    opened = Assembled(folder / "sparse")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for call, message in (
        (
            lambda: export_model(folder / "sparse", tmp_path / "x", "gguf"),
            "--format 'gguf' is unknown",
        ),
        (
            lambda: export_model(folder / "sparse", tmp_path / "x", "npz", [6]),
            "there is no expert 6; there are 0 to 5",
        ),
        (
            lambda: export_model(folder / "sparse", tmp_path / "full", "npz"),
            "full is not empty; give a new folder",
        ),
        (lambda: export_model(tmp_path / "none", tmp_path / "x", "npz"), "holds no assembled model"),
        (lambda: export_model(folder / "run", tmp_path / "x", "npz"), "holds no assembled model"),
        (lambda: numbers_of("1,b", None, opened), "'b' is not a number"),
        (lambda: numbers_of("1", "code", opened), "exclude each other"),
        (
            lambda: numbers_of(None, "sums", opened),
            "no slice 'sums' with samples in this model; there are code, prose",
        ),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            call()
