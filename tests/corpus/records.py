"""Rows of a file of records, and what stands in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinyonn.config import DataConfig
from tinyonn.corpus.rows import Row, Source

ASKED, ANSWERED = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
EARLIER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = [ASKED, ANSWERED]
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Lima"}}}
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]


def rows_of(folder: Path, *records: Any, **options: Any) -> list[Row]:
    return list(source_of(folder, *records, **options))


def source_of(folder: Path, *records: Any, **options: Any) -> Source:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return Source(DataConfig(path=str(path), **options))
