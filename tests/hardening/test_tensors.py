"""A turned bit in a model's files is an error that names the file, or is mended; never another model."""

from __future__ import annotations

import json
import logging
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.base.architectures import make_model
from tests.experts.assembled import assembled
from tests.experts.runs import by_cells, clustered_run
from tests.train.trained import make_corpus, make_models
from tinyonn.config import Config, ModelConfig
from tinyonn.errors import InputError
from tinyonn.experts.assemble import assemble_run, open_assembled
from tinyonn.experts.configuration_tinyonn import FREE
from tinyonn.experts.export import Assembled, export_model
from tinyonn.train.save import save_model

IDS = torch.arange(8)[None]


def turn(path: Path, place: int, bit: int = 0) -> None:
    """Turn one bit of a file; places from the end are negative. Time of change stays."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def place_of(path: Path, name: str, element: int = 0) -> int:
    """Where an element of a tensor lies in its file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    key = next(key for key in header if key.endswith(name))
    first, last = header[key]["data_offsets"]
    elements = torch.Size(header[key]["shape"]).numel()
    return int(8 + length + first + element * (last - first) // elements)


def bare(folder: Path) -> None:
    """Take the digests out of a folder, as an earlier version wrote it."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            known = {k: v for k, v in file.metadata().items() if k not in ("digests", "seal")}
        save_file(load_file(path), path, known)
    tree = json.loads((folder / "config.json").read_text("utf-8"))
    tree.pop("digests", None)
    (folder / "config.json").write_text(json.dumps(tree), "utf-8")
    (folder / "digests.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of several shards, as `tinyonn train` and ``save_pretrained`` write it."""
    folder = tmp_path_factory.mktemp("saved")
    _, model = make_models(folder / "base")
    save_model(model, folder / "model", {"steps": 3}, folder / "base", torch.float32)
    open_assembled(folder / "model").save_pretrained(folder / "sharded", max_shard_size="40KB")
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "model", tmp_path / "model"))


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))


def refusal(folder: Path) -> str:
    """What ``from_pretrained`` says; empty if it loads."""
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        return str(error) or "?"
    return ""


def refused(folder: Path) -> str:
    """What this package says; empty if it loads."""
    try:
        open_assembled(folder)
    except InputError as error:
        return str(error)
    return ""


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


def test_no_turned_bit_of_the_settings_is_silent(model: Path) -> None:
    path = model / "config.json"
    whole, chance, harmless = path.read_bytes(), random.Random(3), 0
    before = AutoConfig.from_pretrained(model).to_dict()
    for _ in range(150):
        turn(path, chance.randrange(len(whole)), chance.randrange(7))
        said = refused(model)
        if not said:
            after = AutoConfig.from_pretrained(model).to_dict()
            assert all(after.get(key) == before[key] for key in before if key not in (*FREE, "_name_or_path"))
            harmless += 1
        assert not said or str(model) in said
        path.write_bytes(whole)
    assert harmless < 75  # mostly white space


def test_settings_can_be_changed_in_python_and_not_by_accident(model: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.config.experts_top_k, loaded.config.use_cache = 2, False
    loaded.save_pretrained(tmp_path / "again")
    path = tmp_path / "again" / "config.json"
    tree = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**tree, "dtype": "bfloat16", "transformers_version": "9"}), "utf-8")
    again = open_assembled(tmp_path / "again")
    assert again.config.experts_top_k == 2 and again.dtype == torch.bfloat16
    path.write_text(json.dumps({**tree, "experts_top_k": 3}), "utf-8")
    with pytest.raises(InputError, match=r"again/config\.json: 'experts_top_k' is not what was written"):
        open_assembled(tmp_path / "again")
    tree.pop("digests")
    path.write_text(json.dumps({**tree, "experts_top_k": 3}), "utf-8")
    assert open_assembled(tmp_path / "again").config.experts_top_k == 3


HOSTILE: dict[str, Any] = {
    "experts": "six", "expert_sizes": {"a": 1}, "expert_prior": ["x"], "sparse_layers": [1], "assembly": "id",
    "base_config": [1], "router": [[1]], "experts_top_k": {"a": 1}, "reroute_every": "often",
}  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_settings_of_the_wrong_kind_are_a_message(model: Path, key: str) -> None:
    path = model / "config.json"
    tree = json.loads(path.read_text("utf-8"))
    tree.pop("digests", None)
    path.write_text(json.dumps({**tree, key: HOSTILE[key]}), "utf-8")
    for read in (open_assembled, Assembled):
        with pytest.raises(InputError, match=r"config\.json"):
            read(model)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 100_000 + "}" * 100_000,
        '{"a":' * 60 + "1" + "}" * 60,
        "[" * 5000,
        '{"vocab_size": ' + "9" * 5000 + "}",
        "\xff",
        "7",
    ],
    ids=["deep", "nested", "open", "digits", "bytes", "number"],
)
def test_hostile_text_is_a_message(model: Path, saved: Path, tmp_path: Path, text: str) -> None:
    base = Path(shutil.copytree(saved / "base", tmp_path / "base"))
    from tinyonn.base.load import recordable_shape

    for folder in (model, base):
        (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        open_assembled(model)
    with pytest.raises(InputError, match=r"config\.json"):
        recordable_shape(ModelConfig(path=str(base), quantization="none", device="cpu"))


OF_BASE: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", "x"), ("vocab_size", 0), ("vocab_size", "x"),
    ("text_config", {"a": {}}), ("text_config", [1]), ("hidden_act", {}), ("rope_parameters", [1]), ("model_type", {}),
    ("layer_types", [1]), ("num_attention_heads", 0), ("hidden_size", -1), ("max_position_embeddings", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), OF_BASE)
def test_a_bases_hostile_settings_are_a_message_at_once(
    saved: Path, tmp_path: Path, key: str, value: Any
) -> None:
    from tinyonn.planning import describe_model

    base = Path(shutil.copytree(saved / "base", tmp_path / "base"))
    tree = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**tree, key: value}), "utf-8")
    with pytest.raises(InputError, match=str(base)):
        describe_model(ModelConfig(path=str(base), quantization="none", device="cpu"))


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "modeling_tinyonn.py"])
def test_what_lies_beside_the_weights_is_compared_too(model: Path, name: str) -> None:
    turn(model / name, 20)
    for read in (open_assembled, Assembled):
        with pytest.raises(InputError, match=rf"model/{name} is not what was written.*digests\.json"):
            read(model)


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
    from tinyonn.base.load import load_model

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


def test_a_teachers_cache_is_compared_and_its_damaged_part_made_again(tmp_path: Path) -> None:
    from tests.experts.assembled import dense_model
    from tinyonn.train.teacher import Cached, Live, cache_key, cache_teacher

    corpus = make_corpus(tmp_path / "corpus.arrow")
    live = Live(dense_model(make_model("qwen2", tmp_path / "model")))
    cache_teacher(live, corpus, tmp_path / "cache", "model", k=5)
    folder = tmp_path / "cache" / cache_key(corpus, "model", 5)
    path = folder / "part-000000.safetensors"
    whole = path.read_bytes()
    turn(path, -1)
    with pytest.raises(InputError, match=rf"{path.name} is damaged"):
        Cached(folder)
    cache_teacher(live, corpus, tmp_path / "cache", "model", k=5)
    assert path.read_bytes() == whole
    about = (folder / "teacher.json").read_text("utf-8")
    (folder / "teacher.json").write_text(about.replace("264", "265"), "utf-8")
    with pytest.raises(InputError, match=r"teacher\.json"):
        Cached(folder)


def test_a_converted_gguf_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    pytest.importorskip("gguf")
    from tests.base.gguf_models import write_gguf
    from tinyonn.base import gguf_folder
    from tinyonn.base.source import model_folder

    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    config = ModelConfig(path=str(path), quantization="none", dtype="float32", device="cpu")
    folder = model_folder(config)
    for name in ("tokenizer.json", next(folder.glob("*.safetensors")).name, "config.json"):
        whole = (folder / name).read_bytes()
        turn(folder / name, -9)
        monkeypatch.setattr(gguf_folder, "_WHOLE", set())  # as another process sees it
        with caplog.at_level(logging.WARNING):
            assert model_folder(config) == folder
        assert (folder / name).read_bytes() == whole
        assert name in caplog.text


# Of a run: what assembly makes again, and what a profile reads


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("run")
    config = clustered_run(folder, quantization="none", rows_each=6)
    assemble_run(str(folder / "run"), config.model, by_cells(budget=0.6))
    return folder / "run", config


@pytest.fixture
def experts(run: tuple[Path, Config]) -> Iterator[Path]:
    """The assembled folder; whole again behind every test."""
    folder = run[0] / "experts"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    for name, content in before.items():
        (folder / name).write_bytes(content)


def again(run: tuple[Path, Config]) -> Any:
    return assemble_run(str(run[0]), run[1].model, by_cells(budget=0.6))


def test_a_damaged_shard_is_made_again_and_the_others_are_kept(
    run: tuple[Path, Config], experts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not again(run).fresh
    shards = sorted(experts.glob("*.safetensors"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    turn(shards[1], place_of(shards[1], "up_proj.values", 7), 3)
    with caplog.at_level(logging.WARNING):
        assert again(run).fresh
    assert f"{shards[1]} is damaged" in caplog.text and "made again" in caplog.text
    assert all(path.read_bytes() == before[path][0] for path in shards)
    assert [path.stat().st_mtime_ns == before[path][1] for path in shards] == [
        path != shards[1] for path in shards
    ]
    assert not again(run).fresh


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "generation_config.json",
        "digests.json",
    ],
)
def test_a_damaged_file_beside_the_shards_is_made_again(
    run: tuple[Path, Config], experts: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = experts / name
    before = path.read_bytes()
    times = {shard: shard.stat().st_mtime_ns for shard in experts.glob("*.safetensors")}
    path.write_bytes(before[: len(before) * 2 // 3])
    with pytest.raises(InputError, match=name):
        Assembled(experts)
    with caplog.at_level(logging.WARNING):
        assert again(run).fresh
    assert str(path) in caplog.text
    tree, wanted = path.read_bytes(), before
    assert name == "config.json" or tree == wanted  # the configuration tells how long it took
    assert times == {shard: shard.stat().st_mtime_ns for shard in experts.glob("*.safetensors")}
    assert not again(run).fresh


def test_cuts_of_a_killed_call_are_taken_only_as_they_were_written(
    run: tuple[Path, Config], experts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = {path: path.read_bytes() for path in experts.glob("*.safetensors")}
    for path in (experts / "config.json", *shards):
        path.unlink()
    cuts = experts / "selection.json"
    text = cuts.read_text("utf-8")
    place = next(at for at in range(len(text) // 2, len(text)) if text[at].isdigit())
    cuts.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :], "utf-8")
    with caplog.at_level(logging.WARNING):
        again(run)
    assert str(cuts) in caplog.text
    assert all(path.read_bytes() == content for path, content in shards.items())


def test_a_profile_reads_no_damaged_groups(run: tuple[Path, Config], experts: Path) -> None:
    from tinyonn.profile.groups import find_groups
    from tinyonn.run import open_run

    groups = find_groups(open_run(run[0]), experts, run[1].model)
    name = groups.tensors[0].name
    whole = groups.read(name)
    path = next(path for path in sorted(experts.glob("*.safetensors")) if _has(path, name))
    turn(path, place_of(path, f"{name.removesuffix('.weight')}.columns", 3))
    with pytest.raises(InputError, match=rf"{path.name} is damaged.*columns"):
        find_groups(open_run(run[0]), experts, run[1].model).read(name)
    assert whole.dtype == "uint8"


def _has(path: Path, name: str) -> bool:
    with safe_open(path, framework="pt") as file:
        return any(f"{name.removesuffix('.weight')}.columns" in key for key in file.keys())  # noqa: SIM118


def test_assembled_in_memory_runs_as_before(tmp_path: Path) -> None:
    """The check at the first pass lets through what is whole."""
    base, sparse = assembled(make_model("gpt2", tmp_path / "base"), 3, 0.5)
    assert sparse(IDS).logits.isfinite().all() and base is not None


@pytest.mark.slow
def test_a_damaged_trained_model_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.train.runs import make_world
    from tinyonn.train.stage import train_run

    world = make_world(tmp_path)
    (tmp_path / "trained").mkdir()
    assert train_run(world.run, world.config, world.options(tmp_path / "trained")).fresh
    path = tmp_path / "trained" / "model" / "model.safetensors"
    wanted = {name: tensor.clone() for name, tensor in load_file(path).items()}  # which lies in the file
    turn(path, -2)
    with caplog.at_level(logging.WARNING):
        assert train_run(world.run, world.config, world.options(tmp_path / "trained")).fresh
    assert f"{path} is damaged" in caplog.text
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_file(path).items())
    assert not train_run(world.run, world.config, world.options(tmp_path / "trained")).fresh
