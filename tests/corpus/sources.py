"""A folder of sources, and the corpus that is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.dense.architectures import CHAT_TEMPLATE
from tinyonn.config import Config, DataConfig, ModelConfig
from tinyonn.corpus.corpus import Corpus, prepare_corpus
from tinyonn.dense.load import load_tokenizer

CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "\n  Hi there"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]
SAID = ["\n  Hi there<|im_end|>", "Ciao<|im_end|>"]
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING = "{{ messages | string | length }}" + CHAT_TEMPLATE


class Room:
    """A folder to put sources into, a model's tokenizer, and the way to prepare."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = ModelConfig(path=str(model), device="cpu")
        self.tokenizer = load_tokenizer(self.model)

    def jsonl(self, rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = self.folder / name
        path.write_bytes(
            b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
        )
        return path

    def parquet(self, columns: dict[str, Any], name: str = "rows.parquet") -> Path:
        path = self.folder / name
        pq.write_table(pa.table(columns), path)
        return path

    def prepare(self, path: Path | str, out: str = "corpus.arrow", **options: Any) -> Corpus:
        data = DataConfig(path=str(path), **options)
        return prepare_corpus(Config(model=self.model, data=data), self.tokenizer, self.folder / out)

    def text(self, ids: Any) -> str:
        return str(self.tokenizer.decode([int(token) for token in ids]))


def texts(count: int) -> list[dict[str, str]]:
    return [
        {"text": f"text number {number}", "kind": "even" if number % 2 == 0 else "odd"}
        for number in range(count)
    ]


def everything(corpus: Corpus) -> dict[str, list[int]]:
    return {name: [s.index for s in corpus.range(name, 0, count)] for name, count in corpus.slices.items()}
