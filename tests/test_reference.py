"""The files that ship: the reference model does what its card says, on text that it has not seen."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tinyonn.reference import corpus_path, model_path

MEBIBYTE = 2**20
DOCUMENTS = 3  # per slice whose loss is measured
Row = dict[str, Any]


def content(row: Row) -> str:
    return row["text"] if row["text"] is not None else "\n".join(m["content"] for m in row["messages"])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return {"train": read("train"), "heldout": read("heldout")}


def read(split: Any) -> list[Row]:
    rows: list[Row] = pq.read_table(corpus_path(split)).to_pylist()
    return rows


def slices(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["slice"]].append(row)
    return groups


def rendered(tokenizer: PreTrainedTokenizerFast, row: Row) -> Any:
    return tokenizer.apply_chat_template(row["messages"], tokenize=False) if row["messages"] else row["text"]


def test_the_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in model_path().iterdir()) <= 20 * MEBIBYTE
    assert corpus_path("train").stat().st_size + corpus_path("heldout").stat().st_size <= 12 * MEBIBYTE


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="test"):
        corpus_path("test")  # type: ignore[arg-type]


def test_every_row_has_messages_or_text(splits: dict[str, list[Row]]) -> None:
    for row in splits["train"] + splits["heldout"]:
        assert (row["messages"] is None) != (row["text"] is None)
        assert content(row).strip()


def test_slices_are_many_and_of_like_size(splits: dict[str, list[Row]], tokenizer: Any) -> None:
    train, heldout = slices(splits["train"]), slices(splits["heldout"])
    assert len(train) >= 6
    assert train.keys() == heldout.keys()
    assert min(map(len, heldout.values())) >= 120
    tokens = {  # every sixteenth document, since all of them take a minute
        name: sum(map(len, tokenizer([content(row) for row in rows[::16]])["input_ids"]))
        for name, rows in train.items()
    }
    assert max(tokens.values()) < 2 * min(tokens.values())


def test_no_document_is_in_both_splits_or_twice(splits: dict[str, list[Row]]) -> None:
    texts = [" ".join(content(row).split()) for row in splits["train"] + splits["heldout"]]
    assert len(set(texts)) == len(texts)


def test_no_file_of_code_is_in_both_splits(splits: dict[str, list[Row]]) -> None:
    """Long lines of code and prose seldom repeat by chance; a file cut across the splits would share many."""
    for name in ("python", "c", "prose", "romance"):
        lines = {
            split: {
                line for row in slices(rows)[name] for line in content(row).splitlines() if len(line) > 60
            }
            for split, rows in splits.items()
        }
        assert len(lines["heldout"] & lines["train"]) < 0.05 * len(lines["heldout"])


def test_every_source_is_named_with_a_licence(splits: dict[str, list[Row]]) -> None:
    card = (corpus_path().parent / "README.md").read_text(encoding="utf-8")
    licences = dict(re.findall(r"^\| ([^|]+?) \| [^|]* \| ([^|]+?) \|$", card, re.MULTILINE))
    for source in {row["source"] for row in splits["train"] + splits["heldout"]}:
        assert re.search(r"PSF|public domain|PostgreSQL|BSD|MIT|CC0", licences[source]), source


def test_the_chat_template_marks_the_assistant_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What is 7 + 5?"},
        {"role": "assistant", "content": "7 + 5 = 12"},
        {"role": "user", "content": "And twice that?"},
        {"role": "assistant", "content": "24"},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    marked = tokenizer.decode([token for token, chosen in zip(ids, mask, strict=True) if chosen])
    assert marked == "7 + 5 = 12<|im_end|>24<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages[:3], tokenize=False).startswith(prompt)


def test_the_tokenizer_returns_every_text_composed(
    splits: dict[str, list[Row]], tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [content(row) for rows in slices(splits["heldout"]).values() for row in rows[:20]]
    for text in [*texts, "\u00e1 \u00e9 \u65e5\u672c\t\r\n  \U0001f600  x\n\n\n  1234", " leading"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer) == 4096


def test_the_model_is_the_one_described(model: Any) -> None:
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen2", 256, 8)
    assert (config.vocab_size, config.tie_word_embeddings) == (4096, False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_003_840
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@torch.no_grad()
def test_heldout_loss_is_far_below_unigram_entropy(
    splits: dict[str, list[Row]], model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    for name, rows in slices(splits["heldout"]).items():
        encoded = tokenizer([rendered(tokenizer, row) + "<|endoftext|>" for row in rows])["input_ids"]
        counts = Counter(token for ids in encoded for token in ids)
        total = sum(counts.values())
        entropy = -sum(count / total * math.log(count / total) for count in counts.values())
        nats, tokens = 0.0, 0
        for ids in encoded[:: len(encoded) // DOCUMENTS][:DOCUMENTS]:
            ids_BT = torch.tensor([ids[:512]])
            nats += model(ids_BT, labels=ids_BT).loss.item() * (ids_BT.shape[1] - 1)
            tokens += ids_BT.shape[1] - 1
        assert nats / tokens < 0.65 * entropy, f"{name}: {nats / tokens:.2f} nats, unigram {entropy:.2f}"


def test_the_model_continues_a_conversation(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Compute 870 - 345."}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**prompt, max_new_tokens=120, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert output[-1].item() in model.generation_config.eos_token_id
    assert re.search(r"\d+ - \d+ = \d+", tokenizer.decode(output))
