"""A row of fifty megabytes costs what its first tokens cost, in every form and with every tokenizer."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from tests.dense.gguf_models import say_sentencepiece, write_gguf
from tinyonn.config import parse_config
from tinyonn.corpus.corpus import prepare_corpus
from tinyonn.corpus.rows import Row
from tinyonn.corpus.tokens import encode_rows
from tinyonn.dense.gguf_file import GGUFFile
from tinyonn.dense.source import REFERENCE_MODEL

WORDS = "All work and no play makes a dull row. "
UNITS = {"words": WORDS, "one word": "a", "special tokens": "<|im_end|>", "blanks": " ", "wide": "é🙂"}
FORMS = ("text", "user", "assistant", "system", "thought")
SECONDS = 10.0  # of a core
BYTES = 2 << 30


def reference() -> Any:
    return AutoTokenizer.from_pretrained(REFERENCE_MODEL)


def measured(call: Any) -> Any:
    before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = call()
    assert time.process_time() - cpu < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
    return found


QUICK = {(form, "words") for form in FORMS} | {("user", "special tokens")}


@pytest.mark.parametrize(
    ("form", "unit"),
    [
        pytest.param(form, unit, marks=[] if (form, unit) in QUICK else [pytest.mark.slow])
        for form in FORMS
        for unit in UNITS
    ],
)
def test_only_the_beginning_is_encoded(form: str, unit: str) -> None:
    huge = "x" + UNITS[unit] * (52_000_000 // len(UNITS[unit]) // (4 if form != "text" else 1))
    said = {"role": "assistant", "content": "Fine."}
    rows = {
        "text": Row(0, text=huge),
        "user": Row(0, messages=({"role": "user", "content": huge}, said)),
        "assistant": Row(0, messages=({"role": "user", "content": "Go on."}, {**said, "content": huge})),
        "system": Row(
            0, messages=({"role": "system", "content": huge}, {"role": "user", "content": "a"}, said)
        ),
        "thought": Row(0, messages=({"role": "user", "content": "Go."}, {**said, "reasoning_content": huge})),
    }
    tokenizer = reference()
    encoded = measured(lambda: next(iter(encode_rows([rows[form]], tokenizer, 64))))
    if form in ("text", "assistant"):
        assert (len(encoded.input_ids), encoded.truncated, encoded.fault) == (64, True, None)
    elif form != "thought":
        assert encoded.fault == "no labelled token in its first 64 tokens: the assistant says nothing"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokenizers_of_gguf_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(
        path, "qwen2" if kind == "gpt2" else "llama", tokenizer=None if kind == "gpt2" else say_sentencepiece
    )
    tokenizer = GGUFFile(path).tokenizer()
    row = Row(0, text="hello " * 8_000_000)
    encoded = measured(lambda: next(iter(encode_rows([row], tokenizer, 64))))
    assert (len(encoded.input_ids), encoded.truncated) == (64, True)


def test_a_corpus_of_several_sources_with_such_rows(tmp_path: Path) -> None:
    """All readings together: columns, survey, slices, tokens."""
    huge = WORDS * (52_000_000 // len(WORDS))
    short = [{"text": f"{WORDS}{n}"} for n in range(30)]
    lines = "".join(json.dumps(row) + "\n" for row in [{"text": huge}, *short])
    (tmp_path / "a.jsonl").write_text(lines, "utf-8")
    chat = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": huge}]
    brief = [chat[0], {"role": "assistant", "content": "Fine."}]
    pq.write_table(pa.table({"messages": [chat, brief]}), tmp_path / "b.parquet")
    sources = [{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.parquet")]
    config = parse_config({"data": {"sources": sources, "max_tokens": 64}})
    tokenizer = reference()
    corpus = measured(lambda: prepare_corpus(config, tokenizer, tmp_path / "corpus.arrow"))
    assert len(corpus) == 33
    assert corpus.header.truncated == 2
