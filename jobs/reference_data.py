"""Tokenizer and token rows of the reference model."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 4096
# Qwen2's pattern: words with one leading mark, single digits, runs of punctuation, line ends, white space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

Row = dict[str, Any]


def read_split(corpus: Path, split: str) -> list[Row]:
    """Rows of one split of the reference corpus."""
    rows: list[Row] = pq.read_table(corpus / f"{split}.parquet").to_pylist()
    return rows


def plain_text(row: Row) -> str:
    """The words of a row, without chat marks."""
    return row["text"] if row["text"] is not None else "\n".join(m["content"] for m in row["messages"])


def train_tokenizer(rows: list[Row], folder: Path) -> None:
    """Train the byte-level BPE on `rows` and save it as a fast tokenizer with its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    roles = ("\n".join(["", *(message["role"] for message in row["messages"] or ()), ""]) for row in rows)
    tokenizer.train_from_iterator(itertools.chain((plain_text(row) for row in rows), roles), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # `AutoTokenizer` takes this class beside a Qwen2 model in any case: same normalizer, same pattern.
    values = json.loads(config.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    config.write_text(json.dumps(values, indent=2) + "\n")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder`."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def render(tokenizer: PreTrainedTokenizerFast, row: Row) -> str:
    """A row as the model reads it: chat template for messages, the text itself otherwise."""
    if row["messages"]:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    return str(row["text"])


def token_documents(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[NDArray[np.int32]]:
    """Token ids of each row, closed by ``<|endoftext|>``."""
    texts = [render(tokenizer, row) + END for row in rows]
    return [
        np.asarray(encoding.ids, np.int32) for encoding in tokenizer.backend_tokenizer.encode_batch(texts)
    ]


def pack(documents: list[NDArray[np.int32]], order: NDArray[np.int64], length: int) -> NDArray[np.int32]:
    """Concatenate documents in `order`, cut into rows ``[rows, length + 1]`` that overlap by a token."""
    stream = np.concatenate([documents[i] for i in order])
    rows = (len(stream) - 1) // length
    starts = np.arange(rows)[:, None] * length
    packed: NDArray[np.int32] = stream[starts + np.arange(length + 1)[None, :]]
    return packed


class Batches:
    """Training batches as a pure function of (seed, step), so that a resumed run sees the same tokens."""

    def __init__(self, documents: list[NDArray[np.int32]], length: int, batch: int, seed: int) -> None:
        self.documents, self.length, self.batch, self.seed = documents, length, batch, seed
        self.per_epoch = (sum(map(len, documents)) - 1) // length // batch
        self._epoch, self._rows = -1, np.empty((0, 0), np.int32)

    def __getitem__(self, step: int) -> NDArray[np.int32]:
        """Token ids ``[batch, length + 1]`` of a step."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            self._epoch, self._rows = epoch, pack(self.documents, order, self.length)
        return self._rows[index * self.batch : (index + 1) * self.batch]


def unigram_entropy(documents: list[NDArray[np.int32]]) -> float:
    """Entropy in nats of the tokens of `documents`: no model without context can do better on them."""
    counts = Counter(np.concatenate(documents).tolist())
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())
