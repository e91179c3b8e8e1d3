"""Perplexity of a stream is what its definition says, window by window."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from tests.dense.architectures import make_model
from tests.model.assembled import dense_model
from tests.train.trained import make_models
from tinyonn.corpus.tokens import PROMPT_TOKENS
from tinyonn.errors import InputError
from tinyonn.evaluate.stream import BETWEEN_ROWS, read_stream, stream_loss, windows_of

TEXT = " = Robert <unk> = \n \n It rained @-@ and snowed . \n" * 12


def test_a_stream_is_the_text_as_it_is(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_model("qwen2", tmp_path / "model"))
    (tmp_path / "plain.txt").write_text(TEXT, "utf-8")
    with gzip.open(tmp_path / "packed.txt.gz", "wt", encoding="utf-8") as file:
        file.write(TEXT)
    with pa.output_stream(tmp_path / "packed.zst", compression="zstd") as stream:
        stream.write(TEXT.encode())
    rows = [{"text": part} for part in TEXT.split("\n")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    plain, packed, joined = (
        read_stream(tmp_path / n, tokenizer) for n in ("plain.txt", "packed.txt.gz", "rows.jsonl")
    )
    assert plain.digest == packed.digest != joined.digest
    assert read_stream(tmp_path / "packed.zst", tokenizer).digest == plain.digest
    assert plain.ids_T.tolist() == tokenizer(TEXT)["input_ids"]
    assert joined.ids_T.tolist() == tokenizer(BETWEEN_ROWS.join(row["text"] for row in rows))["input_ids"]
    assert windows_of(plain, 50).shape == (len(plain.ids_T) // 50, 50)
    assert windows_of(plain, 50, limit=2).flatten().tolist() == plain.ids_T[:100].tolist()
    with pytest.raises(InputError, match="smaller --windows"):
        windows_of(plain, len(plain.ids_T) + 1)
    with pytest.raises(InputError, match="cannot be read"):
        read_stream(tmp_path / "none.txt", tokenizer)
    (tmp_path / "other.jsonl").write_text('{"line": "x"}\n', "utf-8")
    with pytest.raises(InputError, match="no text"):
        read_stream(tmp_path / "other.jsonl", tokenizer)


@torch.no_grad()
def test_loss_is_the_mean_over_all_predicted_tokens(tmp_path: Path) -> None:
    model = dense_model(make_model("qwen2", tmp_path), dtype=torch.float32)
    windows = torch.randint(0, 250, (3, 20), generator=torch.Generator().manual_seed(0))
    losses = torch.cat(
        [cross_entropy(model(w[None]).logits[0, :-1], w[1:], reduction="none") for w in windows]
    )
    ticks: list[int] = []
    found = stream_loss(model, windows, tell=lambda: ticks.append(1))
    assert found.nats == pytest.approx(float(losses.mean()), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
    assert found.error == pytest.approx(float(losses.view(3, 19).mean(1).std() / 3**0.5), rel=1e-4)
    assert (found.windows, found.tokens, len(ticks)) == (3, 57, 3)
    assert math.isnan(stream_loss(model, windows[:1]).error)


@torch.no_grad()
def test_a_router_sees_the_window_before_alone(tmp_path: Path) -> None:
    model: Any = make_models(tmp_path)[1].eval()
    windows = torch.randint(0, 250, (3, 80), generator=torch.Generator().manual_seed(0))
    prior = torch.zeros(6)
    prior[torch.tensor(model.config.expert_prior).argsort(descending=True, stable=True)[:2]] = 1
    total = 0.0
    for number, window in enumerate(windows):
        gates = prior[None]
        if number:
            before = windows[number - 1, -PROMPT_TOKENS:][None]
            gates = model.router.choose(model.router.logits(before), 2).gates_BE
        logits = model(input_ids=window[None], gates=gates).logits[0, :-1].float()
        total += float(cross_entropy(logits, window[1:], reduction="sum"))
    found = stream_loss(model, windows, experts=2)
    assert found.nats == pytest.approx(total / (3 * 79), rel=1e-5)
    assert found.tokens == 3 * 79
