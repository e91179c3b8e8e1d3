from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.dense.architectures import ARCHITECTURES, COMMON
from tests.dense.gguf_models import TOKENS, say_sentencepiece, write_gguf
from tinyonn.config import ModelConfig
from tinyonn.dense import gguf_folder
from tinyonn.dense.gguf_file import LLAMA3, GGUFFile, llama3_factors
from tinyonn.dense.gguf_folder import cache_folder
from tinyonn.dense.load import load_model, load_shape, load_tokenizer
from tinyonn.dense.parameters import list_parameters
from tinyonn.dense.source import fingerprint_model, model_folder, resolve_model
from tinyonn.dense.weights import BaseWeights
from tinyonn.errors import CapacityError, InputError
from tinyonn.plan.facts import describe_model

IDS = torch.arange(40, 56)[None]
CHAT = [{"role": "user", "content": "hello, né 中"}, {"role": "assistant", "content": "x\n"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return cache_folder()


def config_of(path: object, **options: Any) -> ModelConfig:
    return ModelConfig(
        path=str(path), device="cpu", **{"quantization": "none", "dtype": "float32", **options}
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def original(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


BIASES = {"attention_bias": True, "mlp_bias": True}
LONG: dict[str, Any] = {
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0} | LLAMA3,
}
GEMMA = COMMON | {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
FAR = {"rope_parameters": {"rope_type": "default", "rope_theta": 999999.4}}
MODELS = [
    ("llama", {}, "F32"), ("llama", {}, "Q8_0"), ("llama", {"tie_word_embeddings": True}, "Q4_1"),
    ("llama", BIASES, "Q8_0"), ("llama", {"num_key_value_heads": 4}, "Q4_0"), ("qwen2", {}, "Q8_0"),
    ("qwen3", {"head_dim": 32}, "Q4_1"), ("gpt2", {}, "Q5_1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "kind"), MODELS)
def test_a_gguf_is_the_model_that_it_was_written_from(
    name: str, changes: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    folder = write_gguf(path, name, kind, **changes)
    assert torch.equal(
        logits(load_model(config_of(path)).model), logits(original(folder, dtype=torch.float32))
    )


OTHERS = [
    ("gemma2", GEMMA, lambda writer: writer.add_sliding_window(8)),
    ("gemma3_text", GEMMA, lambda writer: writer.add_sliding_window(8)),
    ("starcoder2", COMMON | FAR | {"tie_word_embeddings": True}, None),
    ("phi3", COMMON, None),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "say"), OTHERS)
def test_architectures_whose_files_say_more(
    kind: str, options: dict[str, Any], say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms stored plus one, scales of queries, far rotary bases, fused projections."""
    monkeypatch.setitem(ARCHITECTURES, "other", (kind, options | {"pad_token_id": 256}))
    folder = write_gguf(tmp_path / "m.gguf", "other", "Q8_0", say)
    made = model_folder(config_of(tmp_path / "m.gguf"))
    assert torch.equal(logits(original(made)), logits(original(folder, dtype=torch.float32)))


@pytest.mark.parametrize("add_bos", [None, False])
def test_a_tokenizer_of_sentencepiece(add_bos: bool | None, tmp_path: Path) -> None:
    def say(writer: gguf.GGUFWriter) -> None:
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)

    write_gguf(tmp_path / "m.gguf", "llama", say=say, tokenizer=say_sentencepiece, vocab_size=270)
    tokenizer = load_tokenizer(config_of(tmp_path / "m.gguf"))
    wanted = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("hello", " hello  hello\n", "né 中 <s>h</s>"):
        assert tokenizer(text).input_ids == wanted(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == wanted.decode(wanted(text).input_ids)
    assert tokenizer("hello").input_ids == ([1, 268] if add_bos is None else [268])
    assert tokenizer.special_tokens_map == wanted.special_tokens_map


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_and_tokens_are_those_that_transformers_reads(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", "Q4_1")
    dense = load_model(config_of(path, dtype=dtype))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=getattr(torch, dtype)
    ).eval()
    assert torch.equal(logits(dense.model), logits(theirs))
    settings: Any = dense.model.generation_config
    assert settings.eos_token_id == theirs.config.eos_token_id == 258
    tokenizer, wanted = (
        load_tokenizer(config_of(path)),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name),
    )
    assert tokenizer.special_tokens_map == wanted.special_tokens_map
    assert tokenizer.chat_template == wanted.chat_template
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer(text).input_ids == wanted(text).input_ids
    assert tokenizer("hello<|im_end|>").input_ids == [TOKENS.index("hello"), 258]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_tensors_one_at_a_time_are_those_of_the_loaded_model(quantization: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", "Q8_0")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.move(tmp_path / "m.gguf", folder / "m.gguf")
    config = config_of(
        folder, quantization=quantization, dtype="bfloat16"
    )  # the folder stands for its one file
    model, weights = load_model(config).model, BaseWeights(config)
    linear = [
        parameter.name for parameter in list_parameters(load_shape(config)) if parameter.kind == "linear"
    ]
    assert len(linear) > 10
    assert torch.equal(weights.tensor("model.norm.weight"), model.get_parameter("model.norm.weight"))
    if quantization == "none":
        assert all(torch.equal(weights.matrix(name), model.get_parameter(name)) for name in linear)


def test_the_fingerprint_follows_the_content_alone(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", "Q8_0")
    first = fingerprint_model(config_of(path))
    copy = shutil.copy(path, tmp_path / "other name.GGUF")
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "elsewhere"))
    assert fingerprint_model(config_of(copy)) == first
    assert fingerprint_model(config_of(path, dtype="bfloat16")) == first
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    Path(copy).write_bytes(content)
    assert fingerprint_model(config_of(copy)).keys() == first.keys()
    assert fingerprint_model(config_of(copy)) != first


def test_a_file_is_converted_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = tmp_path / "m.gguf", []
    write_gguf(path, "llama")

    class Counted(GGUFFile):
        def __init__(self, path: Path) -> None:
            reads.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf_folder, "GGUFFile", Counted)
    first = model_folder(config_of(path))
    assert len(reads) == 2  # configuration and tokenizer; weights
    assert model_folder(config_of(path)) == first
    assert model_folder(config_of(shutil.copy(path, tmp_path / "copy.gguf"))) == first
    assert len(reads) == 2
    write_gguf(path, "llama", seed=1)
    assert model_folder(config_of(path)) != first


def test_what_a_file_says_of_its_values(tmp_path: Path) -> None:
    said = {}
    for kind in ("F32", "Q8_0", "Q4_1"):
        write_gguf(tmp_path / f"{kind}.gguf", "llama", kind)
        said[kind] = describe_model(config_of(tmp_path / f"{kind}.gguf"))[1].origin
    assert said == {
        "F32": "F32.gguf: F32 (21 tensors): not quantized",
        "Q8_0": "Q8_0.gguf: Q8_0 (16 tensors), F32 (5): the values come from 8-bit weights already",
        "Q4_1": "Q4_1.gguf: Q4_1 (16 tensors), F32 (5): the values come from 4-bit weights already",
    }


def test_weights_are_spread_over_files_that_are_held_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_folder, "SHARD", 70_000)
    folder = write_gguf(tmp_path / "m.gguf", "llama", "Q8_0")
    made = model_folder(config_of(tmp_path / "m.gguf"))
    sizes = [file.stat().st_size for file in made.glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 75_000
    assert torch.equal(logits(load_model(config_of(tmp_path / "m.gguf")).model), logits(original(folder)))


def convert(path: Path, assets: Path, barrier: Any) -> None:
    import huggingface_hub.constants

    huggingface_hub.constants.HF_ASSETS_CACHE = str(assets)
    barrier.wait()
    model_folder(config_of(path))


def test_two_processes_at_once(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", "Q4_1")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    others = [context.Process(target=convert, args=(path, tmp_path / "assets", barrier)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(120)
        assert other.exitcode == 0
    assert sorted(entry.suffix for entry in cache.iterdir() if entry.is_dir()) == ["", ""]
    load_model(config_of(path))


def test_what_a_killed_process_left_is_no_model(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", "Q4_1")

    def killed() -> None:
        write = gguf_folder._write_shards

        def half(*arguments: Any) -> None:
            write(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(gguf_folder, "_write_shards", half)
        model_folder(config_of(path))

    other = multiprocessing.get_context("fork").Process(target=killed)
    other.start()
    other.join(120)
    assert other.exitcode == -signal.SIGKILL
    assert list(cache.glob("*.part"))
    load_model(config_of(path))
    assert not list(cache.glob("*.part"))


def test_a_disk_that_is_too_small(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", "llama")
    monkeypatch.setattr(gguf_folder, "free_disk", lambda folder: 1000)
    with pytest.raises(
        CapacityError, match=r"need .* KiB in .* where 0.977 KiB are free; set HF_HOME or HF_ASSETS_CACHE"
    ):
        model_folder(config_of(tmp_path / "m.gguf"))
    assert not list(cache.glob("*.part"))


def refused(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_shape(config_of(path))  # what `tinyonn plan` reads


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", "Q8_0")
    content = path.read_bytes()
    for length in (0, 3, 30, 1000, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:length])
        refused(path, r"m\.gguf: not a readable GGUF .*fetch it again")
    path.write_bytes(b"GGML" + content[4:])
    refused(path, "not a readable GGUF")


def test_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path / "m.gguf", r"pip install 'tiny-onn\[gguf\]'")


def test_several_files_and_parts_of_one(tmp_path: Path) -> None:
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    refused(tmp_path, r"holds 2 GGUF files \(a-Q4_K_M\.gguf, a-Q8_0\.gguf\); give one")
    parts = tmp_path / "parts"
    parts.mkdir()
    for at in (1, 2, 3):
        (parts / f"big-0000{at}-of-00003.gguf").write_bytes(b"GGUF")
    merge = r"llama-gguf-split --merge big-00001-of-00003\.gguf whole\.gguf"
    refused(parts, rf"part 1 of 3 of a split GGUF.*{merge}")
    refused(parts / "big-00002-of-00003.gguf", rf"part 2 of 3 of a split GGUF.*{merge}")
    refused(tmp_path / "none.gguf", "does not exist")


def test_a_gguf_beside_a_configuration_is_not_taken_for_the_model(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "m.gguf", "llama")
    shutil.copy(tmp_path / "m.gguf", folder)
    assert resolve_model(config_of(folder)) == folder


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "abacus")
    writer.add_block_count(1)
    writer.add_tensor("x", torch.zeros(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "m.gguf", "architecture 'abacus', which this version of transformers does not read")


SAID = [
    (lambda writer: writer.add_type("adapter"), r"is a GGUF of type 'adapter', and no model"),
    (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), r"llama\.rope\.scaling\.type = yarn"),
    (lambda writer: writer.add_expert_count(8), r"llama\.expert_count = 8"),
    (lambda writer: writer.add_logit_scale(0.5), r"llama\.logit_scale = 0\.5"),
    (lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", torch.ones(4).numpy()), r"attn_sinks.* has no place"),
    (lambda writer: writer.add_tensor("rope_freqs.weight", torch.rand(8).numpy() + 1), "are not Llama 3's"),
]  # fmt: skip


@pytest.mark.parametrize(("say", "match"), SAID)
def test_what_would_not_be_heard_is_refused(say: Any, match: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", say=say)
    refused(tmp_path / "m.gguf", match)


def test_what_says_nothing_is_no_reason_to_refuse(tmp_path: Path) -> None:
    def say(writer: gguf.GGUFWriter) -> None:
        writer.add_expert_count(0)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_tensor("rope_freqs.weight", torch.ones(8).numpy())

    folder = write_gguf(tmp_path / "m.gguf", "llama", say=say)
    assert torch.equal(logits(load_model(config_of(tmp_path / "m.gguf")).model), logits(original(folder)))


def test_llama_3_keeps_its_rotary_factors(tmp_path: Path) -> None:
    def say(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", llama3_factors(10000.0, 16, 8.0))

    folder = write_gguf(tmp_path / "m.gguf", "llama", say=say, **LONG)
    model: Any = load_model(config_of(tmp_path / "m.gguf")).model
    wanted = original(folder)
    assert torch.equal(model.model.rotary_emb.inv_freq, wanted.model.rotary_emb.inv_freq)
    assert torch.equal(logits(model), logits(wanted))


def test_linear_scaling_of_positions_is_kept(tmp_path: Path) -> None:
    def say(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    scaled: dict[str, Any] = {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    }
    folder = write_gguf(tmp_path / "m.gguf", "llama", say=say, **scaled)
    assert torch.equal(logits(load_model(config_of(tmp_path / "m.gguf")).model), logits(original(folder)))
    write_gguf(tmp_path / "plain.gguf", "llama")
    plain = logits(load_model(config_of(tmp_path / "plain.gguf")).model)
    assert not torch.equal(plain, logits(original(folder)))


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", drop="blk.1.ffn_up.weight")
    refused(tmp_path / "m.gguf", r"model's model\.layers\.1\.mlp\.up_proj\.weight is not there")


def test_the_licence_reaches_the_card(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", say=lambda writer: writer.add_license("apache-2.0"))
    shell = model_folder(config_of(tmp_path / "m.gguf"), weights=False)
    assert 'license: "apache-2.0"' in (shell / "README.md").read_text("utf-8")
    assert json.loads((shell / "config.json").read_text("utf-8"))["architectures"] == ["LlamaForCausalLM"]
    assert not list(shell.glob("*.safetensors"))
