"""The teacher's likeliest tokens on disk are those of the teacher that runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.dense.architectures import make_model, make_tokenizer
from tests.model.assembled import dense_model
from tests.train.trained import make_corpus
from tinyonn.errors import InputError
from tinyonn.train import teacher as module
from tinyonn.train.data import Order
from tinyonn.train.teacher import Cached, Live, cache_key, cache_teacher, check_tokenizers


def test_a_cache_holds_the_largest_log_probabilities(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus.arrow")
    live = Live(dense_model(make_model("qwen2", tmp_path / "model")))
    cached = cache_teacher(live, corpus, tmp_path / "cache", "model", k=5)
    batch = Order(corpus, 4, seed=0).step(0)
    said = cached(batch)
    assert said.indices_BTK is not None and said.logprobs_BTK is not None and cached.vocabulary == 264
    logits_BTV = live.model(input_ids=batch.ids_BT).logits[:, :-1]
    top = logits_BTV.float().log_softmax(-1).topk(5)
    labelled = batch.labels_BT[:, 1:] >= 0
    assert labelled.sum() > 20
    torch.testing.assert_close(said.logprobs_BTK[labelled], top.values[labelled], atol=5e-3, rtol=0)
    picked = logits_BTV.log_softmax(-1).gather(2, said.indices_BTK)[labelled]
    torch.testing.assert_close(picked, top.values[labelled], atol=1e-4, rtol=0)
    assert bool((said.logprobs_BTK[~labelled] == -torch.inf).all())


def test_a_cache_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 6)
    corpus = make_corpus(tmp_path / "corpus.arrow")
    live = Live(dense_model(make_model("qwen2", tmp_path / "model")))

    class Killed(Exception):
        pass

    def kill(done: int, parts: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        cache_teacher(live, corpus, tmp_path / "cache", "model", 3, kill)
    folder = tmp_path / "cache" / cache_key(corpus, "model", 3)
    with pytest.raises(InputError, match="no teacher cache"):
        Cached(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    cache_teacher(live, corpus, tmp_path / "cache", "model", 3)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) == 2 and len(after) == 4  # three parts and what says that they are all
    assert all(after[name] == time for name, time in before.items())
    next(folder.glob("part-*1.safetensors")).unlink()
    with pytest.raises(InputError, match="2 of 3 parts"):
        Cached(folder)


def test_a_cache_of_other_samples_is_refused(tmp_path: Path) -> None:
    live = Live(dense_model(make_model("qwen2", tmp_path / "model")))
    small = make_corpus(tmp_path / "small.arrow", {"code": 2})
    cached = cache_teacher(live, small, tmp_path / "cache", "model", 2)
    large = make_corpus(tmp_path / "large.arrow", {"code": 6})
    with pytest.raises(InputError, match="not in the teacher's cache"):
        cached(Order(large, 6, seed=0).step(0))
    with pytest.raises(InputError, match="from 1 to 264"):
        cache_teacher(live, small, tmp_path / "cache", "model", 300)


def test_tokenizers_that_differ_are_refused(tmp_path: Path) -> None:
    one = make_tokenizer(tmp_path / "one")
    check_tokenizers(one, make_tokenizer(tmp_path / "same"))
    other = AutoTokenizer.from_pretrained(tmp_path / "one")
    other.add_tokens(["<extra>"])
    with pytest.raises(InputError, match="different vocabularies"):
        check_tokenizers(one, other)
