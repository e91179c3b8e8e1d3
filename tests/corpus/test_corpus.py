"""The corpus: every row once, in its order, labelled, and again only when something changes."""

from __future__ import annotations

import pickle
import random
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpus.sources import CHAT, MARKED, REWRITING, SAID, Room, everything, texts
from tests.dense.architectures import CHAT_TEMPLATE
from tinyonn.corpus.corpus import Corpus
from tinyonn.corpus.rows import REFERENCE_CORPUS
from tinyonn.errors import InputError, StoreDamagedError


def test_texts_are_labelled_whole_and_every_row_is_there_once(room: Room) -> None:
    corpus = room.prepare(room.jsonl(texts(50)), slice="kind")
    assert corpus.slices == {"even": 25, "odd": 25}
    assert len(corpus) == 50
    for name, indices in everything(corpus).items():
        assert sorted(indices) == list(range(0 if name == "even" else 1, 50, 2))
        assert indices != sorted(indices)  # shuffled
    sample = corpus.sample("odd", 3)
    assert room.text(sample.input_ids) == f"text number {sample.index}"
    assert np.array_equal(sample.labels, sample.input_ids)
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    assert corpus.tokens == sum(len(f"text number {number}") for number in range(50))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED])
def test_only_the_assistants_turns_are_labelled(room: Room, template: str) -> None:
    room.tokenizer.chat_template = template
    corpus = room.prepare(room.jsonl([{"messages": CHAT}]), slices=1)
    sample = corpus.sample(next(iter(corpus.slices)), 0)
    labelled = sample.labels != -100
    assert np.array_equal(sample.labels[labelled], sample.input_ids[labelled])
    assert room.text(sample.labels[labelled]) == "".join(SAID)
    whole = room.text(sample.input_ids)
    assert whole.count("<|im_start|>") == 4
    starts = np.flatnonzero(np.diff(np.concatenate([[False], labelled]).astype(int)) == 1)
    assert [room.text(sample.input_ids[:start]).endswith("assistant\n") for start in starts] == [True, True]


def test_a_row_without_messages_falls_back_to_its_text(room: Room) -> None:
    schema = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    path = room.parquet(
        {
            "messages": pa.array([CHAT, None, [], None], schema),
            "text": pa.array([None, "plain text", "another", None]),
        }
    )
    corpus = room.prepare(path, slices=1)
    name = next(iter(corpus.slices))
    found = {sample.index: sample for sample in corpus.range(name, 0, 3)}
    assert sorted(found) == [0, 1, 2]
    assert (found[0].labels == -100).any()
    assert room.text(found[1].input_ids) == "plain text"
    assert [(item.index, item.reason) for item in corpus.set_aside] == [(3, "'messages' or 'text' is empty")]


def test_long_samples_are_cut_and_counted(room: Room) -> None:
    rows = [{"text": "x" * 10}, {"text": "y" * 21}, {"text": "z" * 20}, {"messages": CHAT}]
    corpus = room.prepare(room.jsonl(rows), slices=1, max_tokens=20)
    assert corpus.truncated == 1
    name = next(iter(corpus.slices))
    assert max(len(sample.input_ids) for sample in corpus.range(name, 0, len(corpus))) == 20
    assert [item.index for item in corpus.set_aside] == [
        3
    ]  # its first 20 tokens hold nothing of the assistant's
    assert "no labelled token in its first 20 tokens" in corpus.set_aside[0].reason


def test_bad_rows_are_set_aside_with_index_and_reason(room: Room) -> None:
    rows: list[Any] = [*texts(100)]
    rows[3] = {"text": "  \n", "kind": "odd"}
    rows[10] = b'{"text": "cut sho'
    rows[20] = b'{"text": "\xff\xfe"}'
    rows[30] = {"text": None, "kind": "even"}
    rows[40] = {"text": 7, "kind": "even"}
    rows[50] = {"text": "a", "kind": "even"}
    rows[60] = b'{"text": "\\ud800 alone", "kind": "even"}'
    rows[70] = b'["a list"]'
    rows[81] = {"kind": "odd"}
    corpus = room.prepare(room.jsonl(rows), slice="kind")
    assert {item.index: item.reason.split(" (")[0] for item in corpus.set_aside} == {
        3: "empty text",
        10: "malformed JSON",
        20: "not UTF-8 at byte 10 of the line",
        30: "'text' is empty",
        40: "'text' is int, not a string",
        50: "1 token(s), at least 2 are needed",
        60: "not valid Unicode",
        70: "malformed JSON",
        81: "'text' is empty",
    }
    assert corpus.slices == {"even": 43, "odd": 48}
    assert {item.index: item.slice for item in corpus.set_aside}[81] == "odd"


def test_bad_messages_are_set_aside(room: Room) -> None:
    bad = [
        "text",
        [{"content": "no role"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "only the user speaks"}],
        [{"role": "assistant", "content": " "}],
    ]
    corpus = room.prepare(room.jsonl([{"messages": row} for row in [*bad, *[CHAT] * 3]]), slices=1)
    assert [item.index for item in corpus.set_aside] == [0, 1, 2, 3, 4]
    assert [item.reason[:20] for item in corpus.set_aside] == [
        "messages are str, no",
        "a message without a ",
        "a user message witho",
        "no labelled token: t",
        "empty text",
    ]


def test_a_template_that_raises_sets_the_row_aside(room: Room) -> None:
    room.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'user' and messages[0]['content'] == 'Be' %}"
        "{{ raise_exception('not that') }}{% endif %}" + CHAT_TEMPLATE
    )
    rows = [{"messages": [{"role": "user", "content": "Be"}, *CHAT[1:]]}, {"messages": CHAT}]
    corpus = room.prepare(room.jsonl(rows), slices=1)
    assert [(item.index, item.reason) for item in corpus.set_aside] == [
        (0, "the chat template refuses the messages (not that)")
    ]


def test_a_template_that_rewrites_earlier_turns_is_refused(room: Room) -> None:
    room.tokenizer.chat_template = REWRITING
    with pytest.raises(InputError, match=r"in 3 rows, 0 first.*\{% generation %\}"):
        room.prepare(room.jsonl([{"messages": CHAT}] * 3))


def test_messages_without_a_template(room: Room) -> None:
    room.tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"no chat template.*data\.text"):
        room.prepare(room.jsonl([{"messages": CHAT}]))


def test_a_prepared_corpus_is_reused_until_something_changes(room: Room) -> None:
    path = room.jsonl(texts(30))
    first = room.prepare(path, slice="kind")
    stamp = first.path.stat().st_mtime_ns
    assert room.prepare(path, slice="kind").path.stat().st_mtime_ns == stamp
    moved = room.folder / "moved.jsonl"
    path.rename(moved)
    assert room.prepare(moved, slice="kind").path.stat().st_mtime_ns == stamp
    prints = {first.fingerprint}
    prints.add(room.prepare(moved, slice="kind", seed=1).fingerprint)
    prints.add(room.prepare(moved, slice="kind", samples=20).fingerprint)
    prints.add(room.prepare(moved, slice="kind", max_tokens=13).fingerprint)
    room.jsonl([*texts(29), {"text": "changed", "kind": "odd"}], "moved.jsonl")
    prints.add(room.prepare(moved, slice="kind").fingerprint)
    room.jsonl([*texts(30)][::-1], "moved.jsonl")
    prints.add(room.prepare(moved, slice="kind").fingerprint)
    assert len(prints) == 6
    room.jsonl(texts(30), "moved.jsonl")
    assert room.prepare(moved, slice="kind").fingerprint == first.fingerprint


def test_another_tokenizer_makes_another_corpus(room: Room) -> None:
    path = room.jsonl([{"messages": CHAT}] * 4)
    first = room.prepare(path, slices=1)
    room.tokenizer.chat_template = CHAT_TEMPLATE.replace("\n", " ")
    assert room.prepare(path, slices=1).fingerprint != first.fingerprint


def test_the_source_may_be_jsonl_parquet_or_a_folder(room: Room) -> None:
    rows = texts(20)
    lines = room.prepare(room.jsonl(rows), "a.arrow", slice="kind")
    table = room.prepare(
        room.parquet({key: [row[key] for row in rows] for key in rows[0]}), "b.arrow", slice="kind"
    )
    (room.folder / "many").mkdir()
    room.jsonl(rows[:7], "many/0.jsonl")
    room.parquet({key: [row[key] for row in rows[7:]] for key in rows[0]}, "many/1.parquet")
    many = room.prepare(room.folder / "many", "c.arrow", slice="kind")
    assert lines.fingerprint == table.fingerprint == many.fingerprint


def test_a_data_set_of_the_hub_reads_like_a_file(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = texts(20)
    wanted = room.prepare(room.jsonl(rows), "a.arrow", slice="kind").fingerprint
    published = datasets.Dataset.from_list([{"other": 1.0, **row} for row in rows])
    asked: list[tuple[Any, ...]] = []

    def fetched(*args: Any, split: str) -> datasets.Dataset:  # the network's part alone
        asked.append((*args, split))
        return published

    monkeypatch.setattr("datasets.load_dataset", fetched)
    corpus = room.prepare("org/set", "b.arrow", name="small", split="train_sft", slice="kind")
    assert asked == [("org/set", "small", "train_sft")]
    assert corpus.fingerprint == wanted


def test_samples_are_taken_evenly_and_bad_rows_replaced(room: Room) -> None:
    rows = [{"text": f"{'good' * (number % 5 > 0)}", "kind": "ab"[number % 10 == 0]} for number in range(200)]
    rows = [{**row, "text": row["text"] or "x"} for row in rows]  # one token: found out when tokenised
    rows[0]["text"] = rows[10]["text"] = "fine"
    corpus = room.prepare(room.jsonl(rows), slice="kind", samples=40)
    assert corpus.slices == {"a": 38, "b": 2}
    assert all(len(s.input_ids) == 4 for s in corpus.range("a", 0, 38))


def test_calibration_takes_turns(room: Room) -> None:
    rows = [{"text": f"text {number}", "kind": "abc"[min(number // 3, 2)]} for number in range(20)]
    corpus = room.prepare(room.jsonl(rows), slice="kind")
    first = corpus.calibration(11)
    assert "".join(sample.slice for sample in first) == "abcabcabccc"
    assert [s.index for s in first if s.slice == "c"] == [s.index for s in corpus.range("c", 0, 5)]
    assert len(corpus.calibration(500)) == 20


def test_a_corpus_travels_as_its_path(room: Room) -> None:
    corpus = room.prepare(room.jsonl(texts(30)), slice="kind")
    content = pickle.dumps(corpus)
    assert len(content) < 1000
    assert everything(pickle.loads(content)) == everything(corpus)


def test_derived_slices_are_saved(room: Room) -> None:
    generator = random.Random(0)
    rows = [
        {"text": "select name from table where id = 3;" * 3} if generator.random() < 0.4
        else {"text": "the old man walked along the quiet river " * 3}
        for _ in range(60)
    ]  # fmt: skip
    corpus = room.prepare(room.jsonl(rows), slices=2)
    assert corpus.slicer is not None
    kinds = {
        name: {room.text(s.input_ids)[:6] for s in corpus.range(name, 0, n)}
        for name, n in corpus.slices.items()
    }
    assert sorted(map(sorted, kinds.values())) == [["select"], ["the ol"]]


def test_a_damaged_file_is_told_or_made_anew(room: Room) -> None:
    path = room.jsonl(texts(300))
    corpus = room.prepare(path, slice="kind")
    whole = corpus.path.read_bytes()
    fingerprint = corpus.fingerprint
    corpus.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreDamagedError, match=r"corpus\.arrow is damaged"):
        Corpus(corpus.path)
    assert room.prepare(path, slice="kind").fingerprint == fingerprint
    assert sorted(file.name for file in room.folder.iterdir()) == ["corpus.arrow", "rows.jsonl"]


def test_positions_and_slices_that_are_not_there(room: Room) -> None:
    corpus = room.prepare(room.jsonl(texts(10)), slice="kind")
    with pytest.raises(InputError, match=r"slice 'none'.*\['even', 'odd'\]"):
        corpus.sample("none", 0)
    with pytest.raises(InputError, match="it has 0 to 4"):
        corpus.sample("odd", 5)


def test_the_shipped_corpus_needs_no_options(room: Room) -> None:
    corpus = room.prepare("reference", split="heldout", samples=70)
    raw = pq.read_table(REFERENCE_CORPUS / "heldout.parquet", columns=["slice"])["slice"].to_pylist()
    assert set(corpus.slices) == set(raw)
    assert len(corpus) == 70
    for name, indices in everything(corpus).items():
        assert {raw[index] for index in indices} == {name}
    with pytest.raises(InputError, match=r"data\.split = 'test'.*heldout.*train"):
        room.prepare("reference", split="test")
