"""A turned bit in a model's tensors is an error that names the file; never another model."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.hardening.models import bare, place_of, refusal, refused, turn
from tinyonn.config import ModelConfig
from tinyonn.errors import InputError
from tinyonn.experts.export import export_model
from tinyonn.experts.folder import open_assembled

IDS = torch.arange(8)[None]


def test_no_turned_bit_of_a_shard_is_silent(sharded: Path) -> None:
    chance = random.Random(1)
    shards = sorted(sharded.glob("*.safetensors"))
    whole = {path: path.read_bytes() for path in shards}
    for _ in range(40):
        path = chance.choice(shards)
        turn(path, chance.randrange(len(whole[path])), chance.randrange(8))
        assert path.name in refusal(sharded)
        path.write_bytes(whole[path])
    assert refusal(sharded) == ""


@pytest.mark.parametrize("name", ["up_proj.values", "up_proj.columns", "norm.weight", "router.main.weight"])
def test_the_tensor_is_named(model: Path, name: str) -> None:
    path = model / "model.safetensors"
    turn(path, place_of(path, name))
    with pytest.raises(InputError, match=rf"model\.safetensors.*{name}"):
        open_assembled(model)


def test_no_turned_bit_of_a_header_is_silent(model: Path) -> None:
    """Names, types, shapes, places, the assembly's id, digests and seal."""
    path = model / "model.safetensors"
    whole, chance = path.read_bytes(), random.Random(2)
    text = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    words = [
        b'"digests"',
        b'"seal"',
        b"blake2b",
        b'"assembly"',
        b"F32",
        b"shape",
        b"data_offsets",
        b"__metadata__",
    ]
    places = [8 + text.index(word) + chance.randrange(1, len(word) - 1) for word in words]
    for place in places + [8 + chance.randrange(len(text.rstrip())) for _ in range(30)]:
        turn(path, place, chance.randrange(5))
        assert path.name in refusal(model)
        path.write_bytes(whole)


def test_reading_the_bytes_twice_can_be_left_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model / "model.safetensors"
    turn(path, place_of(path, "up_proj.values"))
    monkeypatch.setenv("TINYONN_CHECK", "off")
    assert refused(model) == ""
    turn(path, path.read_bytes().index(b"F32"))
    assert "model.safetensors is damaged" in refused(model)


def test_other_peoples_loaders_read_what_is_written(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in tensors.items())


PROGRAM = """
import sys
from importlib.machinery import PathFinder


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "tinyonn" else super().find_spec(name, path, target)


sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        print("loaded")
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_the_models_own_code_says_so_without_this_package(saved: Path, tmp_path: Path) -> None:
    folders = [
        shutil.copytree(saved / "sharded", tmp_path / name)
        for name in ("whole", "shard", "settings", "index")
    ]
    whole, shard, settings, index = map(Path, folders)
    path = sorted(shard.glob("*.safetensors"))[1]
    turn(path, -3)
    text = (settings / "config.json").read_text("utf-8")
    (settings / "config.json").write_text(
        text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'), "utf-8"
    )
    names = (index / "model.safetensors.index.json").read_text("utf-8")
    (index / "model.safetensors.index.json").write_text(names[: len(names) // 2], "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, (whole, shard, settings, index))],
        capture_output=True, text=True, timeout=300, check=True, cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert said[0] == "loaded"
    assert said[1].startswith(f"ValueError {path} is damaged")
    assert "settings/config.json: 'base_config' is not what was written" in said[2]
    assert f"{index / 'model.safetensors.index.json'} is truncated or damaged" in said[3]


def test_an_export_of_what_is_damaged_is_refused(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    turn(path, place_of(path, "down_proj.values", 5))
    for format in ("dense", "npz", "parquet"):
        with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
            export_model(model, tmp_path / format, format)
    path.write_bytes(whole)
    export_model(model, tmp_path / "whole", "dense")
    dense = next((tmp_path / "whole").glob("*.safetensors"))
    turn(dense, -2)
    from tinyonn.dense.load import load_model

    with pytest.raises(InputError, match=rf"{dense.name} is damaged"):
        load_model(ModelConfig(path=str(tmp_path / "whole"), quantization="none", device="cpu"))


def test_a_hub_export_of_damaged_tensors_is_refused(model: Path, tmp_path: Path) -> None:
    turn(model / "model.safetensors", -2)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        export_model(model, tmp_path / "hub", "hub")


def test_folders_without_digests_still_open(model: Path, saved: Path, tmp_path: Path) -> None:
    bare(model)
    wanted, found = open_assembled(saved / "model"), open_assembled(model)
    assert all(
        torch.equal(a, b)
        for a, b in zip(wanted.state_dict().values(), found.state_dict().values(), strict=True)
    )
    export_model(model, tmp_path / "dense", "dense")


def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    if name.endswith("columns"):
        tensor = torch.cat([tensor[:2].int().flip(0), tensor[2:].int()]).to(tensor.dtype)
    elif name.endswith("row_pointer"):
        tensor[3] = tensor[-1]
    else:
        tensor.view(-1)[1] = torch.inf
    return tensor


@pytest.mark.parametrize("part", ["columns", "row_pointer", "values", "norm.weight", "router.main.weight"])
def test_what_cannot_be_is_refused_without_digests_too(model: Path, part: str) -> None:
    bare(model)
    path = model / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        known = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(part))
    save_file({**tensors, name: spoil(name, tensors[name])}, path, known)
    says = {"columns": "columns do not rise", "row_pointer": "row_pointer falls"}.get(part, "not finite")
    with pytest.raises(InputError, match=says):
        open_assembled(model)


def test_buffers_that_accelerate_left_out_are_noticed(model: Path, tmp_path: Path) -> None:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    outside = ("embed_tokens", "rotary_emb", "norm")
    places = {**{f"base.model.{name}": "cpu" for name in outside}, "base.lm_head": "cpu", "router": "cpu"}

    def load(buffers: bool) -> Any:
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        return load_checkpoint_and_dispatch(
            empty, str(model), {**places, "base.model.layers": "disk"},
            offload_folder=str(tmp_path / f"{buffers}"), offload_buffers=buffers,
        )  # fmt: skip

    gates = torch.ones(6)
    gates[1] = 0
    with torch.no_grad():
        wanted = open_assembled(model)(IDS, gates=gates).logits
        assert torch.equal(load(True)(IDS, gates=gates).logits, wanted)
        with pytest.raises(ValueError, match="offload_buffers=True"):
            load(False)(IDS, gates=gates)
