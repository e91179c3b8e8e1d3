"""What cannot be a corpus is refused with a remedy."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from tests.corpus.sources import Room, texts
from tinyonn.errors import InputError


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
