"""The batch of a step is a function of corpus, seed and step; what counts lies behind the prompt."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.train.trained import make_corpus
from tinyonn.corpus.file import Corpus
from tinyonn.errors import InputError
from tinyonn.train.data import WINDOW, Order, collate, held_out_batches, prompt_lengths, share


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus.arrow")  # 16 samples


def test_prompts_of_chats_end_where_labels_begin_and_those_of_texts_are_cut() -> None:
    labels_BT = torch.arange(24).view(3, 8).clone()
    labels_BT[0, :3] = -100
    labels_BT[2, 5:] = -100
    lengths_B = torch.tensor([8, 8, 5])
    assert prompt_lengths(labels_BT, lengths_B, 3).tolist() == [3, 3, 2]
    assert prompt_lengths(labels_BT, lengths_B, 100).tolist() == [3, 4, 2]
    with pytest.raises(InputError, match="prompt_tokens = 0"):
        prompt_lengths(labels_BT, lengths_B, 0)


def test_only_labelled_tokens_after_the_prompt_count(corpus: Corpus) -> None:
    batch = collate(corpus.range("code", 0, 9), prompt_tokens=4)
    after, every = batch.targets(), batch.targets(prompts=True)
    for row in range(len(batch)):
        length, prompt = int(batch.lengths_B[row]), int(batch.prompts_B[row])
        places = (after[row] >= 0).nonzero().flatten() + 1  # of the tokens that are predicted
        assert places.tolist() == list(range(prompt, length))
        assert torch.equal(after[row, prompt - 1 : length - 1], batch.ids_BT[row, prompt:length])
        first = 1 if batch.labels_BT[row, 0] >= 0 else prompt
        assert int((every[row] >= 0).sum()) == length - first


def test_every_epoch_has_every_sample_once_in_another_order(corpus: Corpus) -> None:
    order = Order(corpus, 1, seed=3)
    epochs = [[order.step(16 * epoch + step).indexes[0] for step in range(16)] for epoch in range(3)]
    everything = sorted(
        sample.index for name, count in corpus.slices.items() for sample in corpus.range(name, 0, count)
    )
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_step_can_be_made_without_those_before_it(corpus: Corpus) -> None:
    order = Order(corpus, 3, seed=1)
    there = {step: order.step(step) for step in (0, 5, 40, 21)}
    for step in (40, 0, 21, 5):
        again = Order(corpus, 3, seed=1).step(step)
        assert again.indexes == there[step].indexes and torch.equal(again.ids_BT, there[step].ids_BT)
    assert Order(corpus, 3, seed=2).step(0).indexes != there[0].indexes


def test_batches_of_a_window_do_not_overlap_in_length_and_mix_slices(corpus: Corpus) -> None:
    order = Order(corpus, 4, seed=0)
    batches = [order.step(step) for step in range(WINDOW)]
    spans = sorted((int(batch.lengths_B.min()), int(batch.lengths_B.max())) for batch in batches)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    assert any(len(set(batch.slices)) == 2 for batch in batches)
    taken = sorted(index for batch in batches for index in batch.indexes)
    assert len(taken) == 64 and all(taken.count(index) == 4 for index in taken)


def test_workers_share_a_batch_without_gap_or_overlap(corpus: Corpus) -> None:
    batch = Order(corpus, 5, seed=0).step(0)
    parts = [share(batch, rank, 2) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(5)) and len(parts[0]) == 3
    some = batch.rows(parts[1])
    assert some.ids_BT.shape[1] == int(batch.lengths_B[parts[1]].max())
    assert some.indexes == tuple(batch.indexes[row] for row in parts[1])


def test_held_out_batches_do_not_depend_on_the_order_of_samples(corpus: Corpus) -> None:
    samples = corpus.range("code", 0, 9) + corpus.range("prose", 0, 7)
    batches = held_out_batches(samples, tokens=64, prompt_tokens=4)
    again = held_out_batches(samples[::-1], tokens=64, prompt_tokens=4)
    assert [batch.indexes for batch in batches] == [batch.indexes for batch in again]
    assert all(batch.ids_BT.numel() <= 64 for batch in batches)
    assert sum(len(batch) for batch in batches) == 16


def test_a_corpus_without_tokens_after_prompts_is_refused(corpus: Corpus) -> None:
    samples = corpus.range("code", 2, 3)
    samples[0].labels[:] = -100
    with pytest.raises(InputError, match="none of the 1 samples"):
        held_out_batches(samples)


def test_impossible_orders_are_refused(corpus: Corpus) -> None:
    with pytest.raises(InputError, match="batch = 0"):
        Order(corpus, 0, seed=0)
    with pytest.raises(InputError, match="no samples"):
        Order(corpus, 1, seed=0, places=[])
