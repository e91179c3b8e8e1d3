"""The model in memory and in files: lossless, with gates, as users of ``transformers`` expect it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.dense.architectures import ARCHITECTURES
from tests.dense.conftest import ModelFactory
from tests.model.assembled import UP, assemble, assembled, dense_model, random_groups, saved, tokens
from tinyonn.config import ModelConfig
from tinyonn.dense.load import load_model
from tinyonn.experts import TinyONNForCausalLM
from tinyonn.model.sparse_tinyonn import dense_of
from tinyonn.reference import model_path


def gated(base: Any, model: TinyONNForCausalLM, gates: torch.Tensor) -> Any:
    """The base with the weights that gates [experts] leave."""
    base = copy.deepcopy(base)
    for name, layer in model.sparse_layers.items():
        weight = dense_of(layer.matrix, torch.cat([gates, torch.ones(1)])).detach()
        base.get_submodule(name).weight.data = weight.to(base.dtype)
    return base


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# Lossless


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_on_is_the_dense_model(model_of: ModelFactory, tmp_path: Path, name: str) -> None:
    base, model = assembled(model_of(name))
    ids = tokens()
    with torch.no_grad():
        wanted = base(ids).logits
        model.set_path("dense")
        assert torch.equal(model(ids).logits, wanted)
        model.set_path("sparse")
        assert far(model(ids).logits, wanted) <= 1e-5
        model.set_path("auto")
        again = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "saved"))
        assert isinstance(again, TinyONNForCausalLM)
        assert torch.equal(again(ids).logits, wanted)
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "pad_token_id": 256}
    assert torch.equal(again.generate(ids, **settings), base.generate(ids, **settings))
    for (key, one), (other_key, other) in zip(model.named_buffers(), again.named_buffers(), strict=True):
        assert (key, one.dtype) == (other_key, other.dtype)
        assert torch.equal(one.double(), other.double()), key
    embedding, head = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert (embedding is head) == base.config.tie_word_embeddings
    assert again.num_parameters() == base.num_parameters()


def test_reference_model_continues_the_same() -> None:
    """200 tokens, greedy, of the dequantized NF4 model and of its cut in eight experts."""
    config = ModelConfig(path=str(model_path()), quantization="nf4", dtype="float32", device="cpu")
    quantized = load_model(config)
    base = dense_model(model_path(), dtype=torch.float32)
    for name, module in quantized.model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            weight = dequantize_4bit(module.weight.data, state).float()
            base.get_submodule(name).weight.data = weight
    model = assemble(base, random_groups(base, 8), 8)
    ids = quantized.tokenizer("def add(a, b):", return_tensors="pt")
    settings = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False, "pad_token_id": 0}
    wanted = base.generate(**ids, **settings)
    for path in ("dense", "sparse"):
        model.set_path(path)
        with torch.no_grad():
            assert far(model(wanted).logits, base(wanted).logits) <= 1e-5
        assert torch.equal(model.generate(**ids, **settings), wanted)


def test_bfloat16_is_kept(model_of: ModelFactory, tmp_path: Path) -> None:
    base = dense_model(model_of("qwen2"), dtype=torch.bfloat16)
    model = assemble(base, random_groups(base, 3), 3)
    saved(model, tmp_path)
    for options in ({}, {"dtype": "auto"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        layer = again.sparse_layers[UP]
        kinds = (layer.values.dtype, layer.columns.dtype, layer.row_pointer.dtype)
        assert kinds == (torch.bfloat16, torch.uint16, torch.int32)
        with torch.no_grad():
            assert torch.equal(again(tokens()).logits, base(tokens()).logits)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.sparse_layers[UP].values.dtype == torch.float32
    assert wide.sparse_layers[UP].columns.dtype == torch.uint16
    assert wide.to(torch.bfloat16).sparse_layers[UP].row_pointer.dtype == torch.int32


# Gates and paths


@pytest.mark.parametrize("path", ["auto", "dense", "sparse"])
def test_each_sample_has_its_gates(pair: tuple[Any, TinyONNForCausalLM], path: str) -> None:
    base, model = pair
    model.set_path(path)
    gates = torch.tensor([[1, 0, 0.5, 0], [0, 0, 1, 1], [1, 0, 0.5, 0]])
    ids = tokens(3)
    ones = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256}
    with torch.no_grad():
        logits = model(ids, gates=gates).logits
        by_token = model(ids, gates=gates[:, None].expand(-1, 9, -1)).logits
    generated = model.generate(ids, gates=gates, attention_mask=torch.ones_like(ids), **ones)
    for sample, row in enumerate(gates):
        one = slice(sample, sample + 1)
        alone = gated(base, model, row)
        with torch.no_grad():
            wanted = alone(ids[one]).logits
        assert far(logits[one], wanted) <= 1e-5
        assert far(by_token[one], wanted) <= 1e-5
        mask = torch.ones_like(ids[one])
        assert torch.equal(generated[one], alone.generate(ids[one], attention_mask=mask, **ones))


def test_gates_per_token_mix(pair: tuple[Any, TinyONNForCausalLM]) -> None:
    """More patterns than groups: each token of a layer is as if its gates were the only ones."""
    _, model = pair
    layer = model.sparse_layers[UP]
    X = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    gates = torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), model.switch.use(model.switch.sorted(gates, 2, 9)):
        Y = layer(X)
        for sample, token in ((0, 0), (1, 5)):
            with model.switch.use(model.switch.sorted(gates[sample, token], 1, 1)):
                assert far(Y[sample, token], layer(X[sample : sample + 1, token])[0]) <= 1e-5


def test_rule_chooses_by_prior(model_of: ModelFactory) -> None:
    prior = [0.1, 0.9, 0.4, 0.9]
    base, model = assembled(model_of("qwen2"), kept=0.6, expert_prior=prior, experts_top_k=2)
    assert model.config.chosen_experts == [1, 3]
    with torch.no_grad():
        wanted = gated(base, model, torch.tensor([0.0, 1, 0, 1]))(tokens()).logits
        assert far(model(tokens()).logits, wanted) <= 1e-5
        with model.gates([1.0, 1, 1, 1]):
            assert far(model(tokens()).logits, wanted) > 1e-3
        assert far(model(tokens()).logits, wanted) <= 1e-5
    assert "expert_prior" in model.config.gate_rule


def test_what_is_kept_follows_gates_and_values(pair: tuple[Any, TinyONNForCausalLM]) -> None:
    _, model = pair
    layer = model.sparse_layers[UP]
    model.set_path("sparse")
    with torch.no_grad():
        before = model(tokens(), gates=[1, 0, 0, 0]).logits
        (first,) = layer._kept.values()
        model(tokens(), gates=[1, 0, 0, 0])
        assert next(iter(layer._kept.values())).form is first.form
        for number in range(4):
            model(tokens(), gates=torch.eye(4)[number])
        assert len(layer._kept) == 2
        layer.values.mul_(2)
        assert not torch.equal(model(tokens(), gates=[1, 0, 0, 0]).logits, before)
    model.set_path("dense")
    with torch.no_grad():
        for number in range(4):
            model(tokens(), gates=torch.eye(4)[number])
    assert len(layer._kept) == 1
    model.train()
    assert not layer._kept


def test_of_a_batch_that_nothing_goes_on_from_no_pattern_is_kept(
    pair: tuple[Any, TinyONNForCausalLM],
) -> None:
    _, model = pair
    layer, batch, gates_BE = model.sparse_layers[UP], tokens(), torch.eye(4)[:2]
    model.set_path("sparse")
    with torch.no_grad():
        once = model(batch, gates=gates_BE, use_cache=False).logits
        assert not layer._kept
        assert torch.equal(model(batch, gates=gates_BE).logits, once)
        assert len(layer._kept) == 2
        model.generate(batch, gates=gates_BE[0], max_new_tokens=2, use_cache=False)
        model(batch, gates=gates_BE[1], use_cache=False)
        kept = set(layer._kept)
        model(batch, gates=gates_BE[1], use_cache=False)
    assert set(layer._kept) == kept and len(kept) == 2


class Counting(torch.nn.Module):
    """A router that switches the expert of the latest token's number on, and notes what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        assert attention_mask is None or attention_mask.shape == input_ids.shape
        self.seen.append(input_ids.shape[1])
        return torch.eye(4)[input_ids % 4][:, -1]


@pytest.mark.parametrize(("every", "seen"), [(None, [9]), (3, [9, 12, 15])])
def test_router_is_asked_again(
    pair: tuple[Any, TinyONNForCausalLM], every: int | None, seen: list[int]
) -> None:
    _, model = pair
    model.config.reroute_every = every
    model.router = Counting()
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    settings = {"attention_mask": mask, "do_sample": False, "pad_token_id": 256}
    out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, **settings)
    assert model.router.seen == seen
    assert model.generate(ids, max_new_tokens=4, num_beams=2, **settings).shape[0] == 2
    whole = model.generate(ids, max_new_tokens=8, min_new_tokens=8, use_cache=False, **settings)
    if every is None:  # with a cache, earlier tokens keep what earlier gates made of them
        assert torch.equal(whole, out)
    by_hand, cache = ids, None
    with torch.no_grad():
        for _ in range(8):
            given = by_hand if cache is None else by_hand[:, -1:]
            result = model(given, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            result.logits[..., 256] = -torch.inf  # the end, which generate held back too
            by_hand = torch.cat([by_hand, result.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(by_hand, out)


# What users of transformers expect


def test_padding_on_the_left_changes_nothing(pair: tuple[Any, TinyONNForCausalLM]) -> None:
    _, model = pair
    short, long = tokens(1, 5), tokens(1, 9, seed=1)
    ids = torch.cat([torch.cat([torch.full((1, 4), 256), short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    gates = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256}
    both = model.generate(ids, attention_mask=mask, gates=gates, **settings)
    for sample, prompt in enumerate((short, long)):
        ones = torch.ones_like(prompt)
        alone = model.generate(prompt, attention_mask=ones, gates=gates[sample], **settings)
        assert torch.equal(both[sample, 9:], alone[0, prompt.shape[1] :])


def test_sampling_beams_and_static_cache(pair: tuple[Any, TinyONNForCausalLM]) -> None:
    _, model = pair
    ids, gates = tokens(), torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "pad_token_id": 256}
    greedy = model.generate(ids, gates=gates, do_sample=False, **settings)
    static = model.generate(ids, gates=gates, do_sample=False, cache_implementation="static", **settings)
    assert torch.equal(greedy, static)
    sampled = model.generate(ids, gates=gates, do_sample=True, num_return_sequences=3, top_k=1, **settings)
    assert torch.equal(sampled, greedy.repeat_interleave(3, 0))
    with model.gates([1.0, 0, 0, 1]):
        beams = model.generate(ids, num_beams=2, num_return_sequences=2, do_sample=False, **settings)
    assert beams.shape[0] == 4


def test_pipeline_and_chat(pair: tuple[Any, TinyONNForCausalLM], model_of: ModelFactory) -> None:
    _, model = pair
    tokenizer = AutoTokenizer.from_pretrained(model_of("qwen2"))
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "hi"}]
    answer = write(chat, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert [message["role"] for message in answer] == ["user", "assistant"]
    texts = write(["one", "another"], max_new_tokens=4, do_sample=False, batch_size=2, pad_token_id=256)
    assert texts[1][0]["generated_text"].startswith("another")


def test_training_reaches_values_and_gates(pair: tuple[Any, TinyONNForCausalLM]) -> None:
    """Checkpointed layers run a second time, with the gates of their own pass."""
    _, model = pair
    model.train()
    ids = tokens()

    def gradients(gates: torch.Tensor) -> list[torch.Tensor]:
        gates = gates.clone().requires_grad_()
        model.zero_grad()
        loss = model(ids, labels=ids, gates=gates).loss
        model.eval().train()
        with torch.no_grad():
            model(ids, gates=[0, 0, 0, 0])  # another pass before the backward one
        loss.backward()
        found = [parameter.grad for parameter in model.parameters()]
        return [gradient.clone() for gradient in [*found, gates.grad] if gradient is not None]

    given = torch.tensor([[1, 0, 0.5, 0.2], [0, 2, 1, 1]])
    plain = gradients(given)
    model.gradient_checkpointing_enable()
    for one, other in zip(gradients(given), plain, strict=True):
        assert torch.equal(one, other)
    assert len(plain) == len(list(model.parameters())) + 1

    model.gradient_checkpointing_disable()
    step = 1e-2
    with torch.no_grad():
        above, below = given.clone(), given.clone()
        above[1, 2] += step
        below[1, 2] -= step
        losses = [model(ids, labels=ids, gates=g).loss for g in (above, below)]
    assert float((losses[0] - losses[1]) / (2 * step)) == pytest.approx(float(plain[-1][1, 2]), rel=0.02)


def test_compiled_is_the_same(pair: tuple[Any, TinyONNForCausalLM]) -> None:
    _, model = pair
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for gates in ([1, 0, 0, 1], [0.0, 0, 2, 0]):
            wanted = model(tokens(), gates=gates).logits
            assert far(compiled(tokens(), gates=gates).logits, wanted) <= 1e-5


def test_embeddings_resize_and_stay(pair: tuple[Any, TinyONNForCausalLM], tmp_path: Path) -> None:
    _, model = pair
    model.resize_token_embeddings(300)
    assert model.base.get_input_embeddings() is model.get_input_embeddings()
    assert model.config.vocab_size == 300
    again = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    with torch.no_grad():
        logits = again(tokens()).logits
        assert torch.equal(logits, model(tokens()).logits)
    assert logits.shape[-1] == 300


def test_experts_add_up(pair: tuple[Any, TinyONNForCausalLM]) -> None:
    base, model = pair
    experts = [model.expert(number) for number in range(5)]
    assert [expert.size for expert in experts] == model.config.expert_sizes
    assert [expert.is_core for expert in experts] == [False] * 4 + [True]
    whole = base.get_submodule(UP).weight
    kept = torch.stack([expert.dense(UP) for expert in experts]).sum(0)
    assert torch.equal(kept[kept != 0], whole[kept != 0])
    for expert in experts:
        rows, columns, values = expert.entries(UP)
        assert torch.equal(whole[rows, columns], values)
        assert len(values) == expert.sizes[UP]
    with pytest.raises(ValueError, match="no expert 5"):
        model.expert(5)


def test_a_copy_is_its_own(pair: tuple[Any, TinyONNForCausalLM]) -> None:
    _, model = pair
    other = copy.deepcopy(model)
    other.set_gates([0, 0, 0, 0])
    other.set_path("sparse")
    with torch.no_grad():
        assert not torch.equal(other(tokens()).logits, model(tokens()).logits)
    assert (model.switch.path, other.sparse_layers[UP].switch.path) == ("auto", "sparse")


def test_without_weights_everything_else_is_saved(
    pair: tuple[Any, TinyONNForCausalLM], tmp_path: Path
) -> None:
    """What assembles shards by itself starts from the empty model."""
    _, model = pair
    with torch.device("meta"):
        empty = TinyONNForCausalLM(copy.deepcopy(model.config))
    empty.save_shell(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"assembly": "test", "format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    text = (tmp_path / "config.json").read_text()
    assert str(tmp_path.parent) not in text  # no folder of the machine that it was made on
    names = json.loads(text)["auto_map"]
    for module in {name.split(".")[0] for name in names.values()}:
        assert (tmp_path / f"{module}.py").is_file()
    assert {k: v.shape for k, v in empty.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
