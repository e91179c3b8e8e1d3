from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dense.architectures import CHAT_TEMPLATE
from tests.dense.conftest import ModelFactory
from tinyonn.config import Config, DataConfig, ModelConfig
from tinyonn.corpus.corpus import Corpus, even_shares, prepare_corpus, stored_order
from tinyonn.corpus.rows import REFERENCE_CORPUS, Row
from tinyonn.corpus.slices import even_sample
from tinyonn.dense.load import load_tokenizer
from tinyonn.errors import InputError, StoreDamagedError

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


@pytest.fixture
def room(tmp_path: Path, model_of: ModelFactory) -> Room:
    return Room(tmp_path, model_of("qwen2"))


def texts(count: int) -> list[dict[str, str]]:
    return [
        {"text": f"text number {number}", "kind": "even" if number % 2 == 0 else "odd"}
        for number in range(count)
    ]


def everything(corpus: Corpus) -> dict[str, list[int]]:
    return {name: [s.index for s in corpus.range(name, 0, count)] for name, count in corpus.slices.items()}


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


def test_max_tokens_beyond_the_context(room: Room) -> None:
    path = room.jsonl(texts(4))
    with pytest.raises(InputError, match=r"max_tokens = 129 is beyond the context.*128 tokens.*128 or less"):
        room.prepare(path, max_tokens=129)
    assert room.prepare(path).max_tokens == 128  # left out, it follows the model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "body"}, r"data\.text = 'body' is not a column.*\['text', 'kind'\]"),
        ({"messages": "chat"}, r"data\.messages = 'chat' is not a column"),
        ({"slice": "topic"}, r"data\.slice = 'topic' is not a column"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_missing_columns_name_those_that_exist(
    room: Room, kind: str, options: dict[str, str], message: str
) -> None:
    rows = texts(4)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    path = room.jsonl(rows) if kind == "jsonl" else room.parquet(columns)
    with pytest.raises(InputError, match=message):
        room.prepare(path, **options)


def test_no_known_column(room: Room) -> None:
    with pytest.raises(InputError, match=r"neither a 'text' nor a 'messages' column but \['body'\]"):
        room.prepare(room.jsonl([{"body": "some"}]))


def test_truncated_parquet(room: Room) -> None:
    path = room.parquet({"text": [f"some text {number}" for number in range(5000)]})
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(InputError, match=r"not a readable Parquet file, perhaps truncated"):
        room.prepare(path)
    path.write_bytes(whole[:2000] + bytes(2000) + whole[4000:])
    with pytest.raises(InputError, match=r"unreadable from row|malformed"):
        room.prepare(path)


def test_parquet_text_that_is_not_utf8(room: Room) -> None:
    good = [b"plain text"] * 60
    good[7] = b"\xff\xfe\xfd"
    strings = pa.array(good, pa.binary()).view(pa.string())  # what a careless writer leaves behind
    for columns, name in (({"text": pa.array(good, pa.binary())}, "a"), ({"text": strings}, "b")):
        corpus = room.prepare(room.parquet(columns, f"{name}.parquet"), f"{name}.arrow", slices=1)
        assert [item.index for item in corpus.set_aside] == [7]
        assert "not UTF-8" in corpus.set_aside[0].reason
        assert len(corpus) == 59


def test_many_malformed_lines_are_refused(room: Room) -> None:
    rows: list[Any] = [*texts(40)]
    rows[5] = rows[9] = b"{"
    assert len(room.prepare(room.jsonl(rows), slice="kind").set_aside) == 2  # 5 %
    rows[11] = b"{"
    with pytest.raises(InputError, match=r"3 of 40 rows are malformed, row 5 first"):
        room.prepare(room.jsonl(rows), slice="kind")


def test_nothing_left(room: Room) -> None:
    with pytest.raises(InputError, match=r"no usable row among 3: empty text \(3 times\)"):
        room.prepare(room.jsonl([{"text": " "}] * 3))
    with pytest.raises(InputError, match=r"no usable row left: 1 token\(s\)"):
        room.prepare(room.jsonl([{"text": "x"}] * 3))
    with pytest.raises(InputError, match="no readable rows"):
        room.prepare(room.jsonl([]))


def test_too_many_slices(room: Room) -> None:
    rows = [{"text": "some text", "kind": number} for number in range(20)]
    with pytest.raises(InputError, match="more than 16 different values"):
        room.prepare(room.jsonl(rows), slice="kind")


@pytest.mark.parametrize("path", ["./none.jsonl", "none.parquet", "/none/such"])
def test_a_source_that_is_not_there(room: Room, path: str) -> None:
    with pytest.raises(InputError, match=r"does not exist.*\.jsonl or \.parquet"):
        room.prepare(path)


def test_sources_of_another_kind(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    (room.folder / "data.yaml").write_text("text\n")
    with pytest.raises(InputError, match=r"neither \.jsonl nor \.parquet.*write it as JSONL"):
        room.prepare(room.folder / "data.yaml")
    (room.folder / "empty").mkdir()
    with pytest.raises(InputError, match="a folder without"):
        room.prepare(room.folder / "empty")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"'nobody/nothing'.*(hub|cannot be loaded)"):
        room.prepare("nobody/nothing")


def test_a_tokenizer_of_another_model(room: Room) -> None:
    room.tokenizer.add_tokens([f"<extra{number}>" for number in range(20)])
    with pytest.raises(InputError, match=r"gives token 27\d and its vocabulary ends at 263"):
        room.prepare(room.jsonl([{"text": "some <extra15> text"}]), slices=1)


def test_the_shipped_corpus_needs_no_options(room: Room) -> None:
    corpus = room.prepare("reference", split="heldout", samples=70)
    raw = pq.read_table(REFERENCE_CORPUS / "heldout.parquet", columns=["slice"])["slice"].to_pylist()
    assert set(corpus.slices) == set(raw)
    assert len(corpus) == 70
    for name, indices in everything(corpus).items():
        assert {raw[index] for index in indices} == {name}
    with pytest.raises(InputError, match=r"data\.split = 'test'.*heldout.*train"):
        room.prepare("reference", split="test")


def test_the_sample_that_slices_are_fitted_on_is_even() -> None:
    rows = [Row(number, text=str(number), fault="bad" if number % 2 else None) for number in range(400)]
    drawn = Counter(text for seed in range(300) for text in even_sample(rows, 20, seed))
    assert sum(drawn.values()) == 300 * 20
    assert set(drawn) == {str(number) for number in range(0, 400, 2)}
    assert max(drawn.values()) < 60  # 30 each on average
    first, last = (sum(drawn[str(n)] for n in part) for part in (range(0, 200, 2), range(200, 400, 2)))
    assert abs(first - last) < 400
    assert len(even_sample(rows, 500, 0)) == 200


def test_shares_are_even_and_use_up_the_total() -> None:
    generator = random.Random(0)
    for _ in range(300):
        sizes = [generator.randrange(40) for _ in range(generator.randrange(1, 9))]
        total = generator.randrange(200)
        shares = even_shares(sizes, total)
        assert sum(shares) == min(total, sum(sizes))
        assert all(share <= size for share, size in zip(shares, sizes, strict=True))
        free = [share for share, size in zip(shares, sizes, strict=True) if share < size]
        assert not free or max(shares) - min(free) <= 1
    assert even_shares([5, 7], None) == [5, 7]


def test_a_slices_order_does_not_depend_on_the_other_slices() -> None:
    alone = stored_order([9], ["b"], 4)[0]
    among = stored_order([3, 9], ["a", "b"], 4)[1]
    assert np.array_equal(alone, among)
    assert Counter(alone.tolist()) == Counter(range(9))
    assert not np.array_equal(alone, stored_order([9], ["b"], 5)[0])
