"""Forms of data: which columns make a text or a conversation."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpus.records import ANSWERED, ASKED, CALL, EARLIER, PAIR, SHAREGPT, SYSTEM, rows_of, source_of
from tinyonn.config import DataConfig, DataFormat
from tinyonn.corpus.forms import FORMS, recognise
from tinyonn.corpus.messages import Fault
from tinyonn.corpus.rows import Source
from tinyonn.errors import InputError


@pytest.mark.parametrize(
    ("form", "record", "wanted"),
    [
        ("messages: messages", {"messages": PAIR}, PAIR),
        ("messages: messages", {"messages": json.dumps(PAIR)}, PAIR),
        (
            "messages: messages",
            {"messages": {"role": ["user", "assistant"], "content": ["Why?", "So."]}},
            PAIR,
        ),
        ("messages: messages", {"messages": PAIR, "prompt": "x", "chosen": "y"}, PAIR),
        ("sharegpt: conversations", {"conversations": SHAREGPT}, PAIR),
        (
            "sharegpt: conversations, system",
            {"conversations": SHAREGPT, "system": "Be brief."},
            [SYSTEM, *PAIR],
        ),
        ("sharegpt: conversation", {"conversation": [{"human": "Why?", "assistant": "So."}]}, PAIR),
        ("alpaca: instruction, output", {"instruction": "Why?", "output": "So."}, PAIR),
        (
            "alpaca: instruction, input, output, history, system",
            {
                "instruction": "Why?",
                "input": "",
                "output": "So.",
                "history": [["a", "b"]],
                "system": "Be brief.",
            },
            [SYSTEM, *EARLIER, *PAIR],
        ),
        (
            "alpaca: instruction, input, output",
            {"instruction": "Add.", "input": "1 2", "output": 3},
            [{"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        (
            "alpaca: instruction, context, response",
            {"instruction": "Why?", "context": "", "response": "So."},
            PAIR,
        ),
        ("prompt-completion: prompt, completion", {"prompt": "Why?", "completion": "So."}, PAIR),
        ("prompt-completion: prompt, completion", {"prompt": [ASKED], "completion": [ANSWERED]}, PAIR),
        ("prompt-completion: input, output", {"input": "Why?", "output": "So."}, PAIR),
        ("question-answer: question, answer", {"question": "Why?", "answer": "So.", "id": 3}, PAIR),
        ("query-response: query, response", {"query": "Why?", "response": "So."}, PAIR),
        (
            "query-response: query, response, history",
            {"query": "Why?", "response": "So.", "history": [["a", "b"]]},
            [*EARLIER, *PAIR],
        ),
        (
            "query-response: query, response, history",
            {"query": "Why?", "response": "So.", "history": None},
            PAIR,
        ),
        (
            "query-response: query, response, history",
            {"query": "Why?", "response": "So.", "history": EARLIER},
            [*EARLIER, *PAIR],
        ),
        ("alpaca: Instruction, Input, Output", {"Instruction": "Why?", "Input": "", "Output": "So."}, PAIR),
        ("prompt-completion: Human, Assistant", {"Human": "Why?", "Assistant": "So."}, PAIR),
        ("prompt-completion: user, assistant", {"user": "Why?", "assistant": "So."}, PAIR),
        ("prompt-completion: inputs, targets", {"inputs": "Why?", "targets": "So.", "task": "x"}, PAIR),
        ("prompt-completion: input, target", {"kind": "x", "input": "Why?", "target": "So."}, PAIR),
        (
            "question-answer: question, passage, answer",
            {"question": "Is it?", "passage": "It is.", "answer": True},
            [{"role": "user", "content": "Is it?\nIt is."}, {"role": "assistant", "content": "true"}],
        ),
        (
            "question-answer: question, answer, reasoning",
            {"question": "Why?", "reasoning": "Hm.", "answer": "So."},
            [ASKED, {**ANSWERED, "reasoning_content": "Hm."}],
        ),
        (
            "question-answer: question, response, system_prompt",
            {"system_prompt": "Be brief.", "question": "Why?", "response": "So."},
            [SYSTEM, *PAIR],
        ),
        (
            "query-response: query, answers",
            {"query": "Why?", "answers": '[{"name": "sky", "arguments": {"city": "Lima"}}]'},
            [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
        ("messages: messages, system", {"messages": PAIR, "system": "Be brief."}, [SYSTEM, *PAIR]),
        ("messages: messages", {"messages": str(PAIR)}, PAIR),
        ("messages: Messages", {"Messages": {"messages": PAIR}}, PAIR),
        ("sharegpt: conversations", {"conversations": ["Why?", "So."]}, PAIR),
        ("sharegpt: conversation", {"conversation": [{"input": "Why?", "output": "So."}]}, PAIR),
        ("sharegpt: dialog", {"dialog": ["a", "b", "Why?", "So."], "act": [1, 2, 1, 1]}, [*EARLIER, *PAIR]),
        ("sharegpt: data", {"id": "0", "data": ["Why?", "So."]}, PAIR),
        (
            "sharegpt: chat, system",
            {"system": "Be brief.", "chat": "USER: Why?\n\n\nASSISTANT: So. <|endoftext|>\n\n\n"},
            [SYSTEM, *PAIR],
        ),
        (
            "sharegpt: contents, systemInstruction",
            {
                "systemInstruction": {"parts": [{"text": "Be brief."}]},
                "contents": [
                    {"role": "user", "parts": [{"text": "Why?"}]},
                    {"role": "model", "parts": [{"text": "So."}]},
                ],
            },
            [SYSTEM, *PAIR],
        ),
        ("preference: prompt, accepted", {"prompt": "Why?", "accepted": "So.", "rejected": "No."}, PAIR),
        (
            "preference: input, preferred_output",
            {"input": {"messages": [ASKED]}, "preferred_output": [ANSWERED], "non_preferred_output": PAIR},
            PAIR,
        ),
        ("preference: prompt, chosen", {"prompt": "Why?", "chosen": "So.", "rejected": "No."}, PAIR),
        ("preference: prompt, chosen", {"prompt": "Why?", "chosen": PAIR, "rejected": PAIR}, PAIR),
        ("preference: prompt, chosen", {"prompt": [ASKED], "chosen": [ANSWERED]}, PAIR),
        ("preference: conversations, chosen", {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1]}, PAIR),
        ("preference: chosen", {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "x"}, PAIR),
        ("preference: chosen", {"chosen": PAIR, "rejected": PAIR}, PAIR),
    ],
)
def test_forms_are_recognised_and_read(tmp_path: Path, form: str, record: Any, wanted: Any) -> None:
    source = source_of(tmp_path, record)
    assert source.form == form
    (row,) = source
    assert (row.fault, list(row.messages or ())) == (None, wanted)
    assert source.described(1000, 0) == f"{form}; 1,000 conversations"
    forced = source_of(tmp_path, record, format=form.split(":")[0])
    assert list(forced) == [row]


def test_the_options_names_are_the_forms() -> None:
    assert set(get_args(DataFormat)) == {"auto", *FORMS}


def test_text_comes_before_forms_of_several_columns_unless_forced(tmp_path: Path) -> None:
    record = {"instruction": "Why?", "output": "So.", "text": "### Why? So."}
    assert rows_of(tmp_path, record)[0].text == "### Why? So."
    assert rows_of(tmp_path, record, format="alpaca")[0].messages == tuple(PAIR)
    source = source_of(tmp_path, {"messages": PAIR, "text": "x"}, format="text")
    assert source.described(1, 2) == "text: text; 1 texts, 2 set aside"
    assert [row.text for row in source] == ["x"]


def test_files_of_a_folder_may_have_other_forms(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Why?", "output": "So."}]))
    (tmp_path / "b.jsonl").write_text(json.dumps({"conversations": SHAREGPT}) + "\n" + json.dumps({"x": 1}))
    (tmp_path / "c.jsonl").write_text(json.dumps({"unknown": 1}))
    source = Source(DataConfig(path=str(tmp_path)))
    assert source.form == "alpaca: instruction, output; sharegpt: conversations"
    rows = list(source)
    assert [row.messages for row in rows] == [tuple(PAIR), tuple(PAIR), None, None]
    assert [row.fault for row in rows[2:]] == ["'conversations' is empty", "'instruction' is empty"]


def test_usual_names_come_before_loose_ones(tmp_path: Path) -> None:
    both = {"data": "x", "turns": 2, "conversations": SHAREGPT, "prompt": "Why?", "response": "So."}
    assert source_of(tmp_path, both).form == "sharegpt: conversations"
    del both["conversations"]
    assert source_of(tmp_path, both).form == "prompt-completion: prompt, response"


def test_bad_examples_are_set_aside(tmp_path: Path) -> None:
    pair = {"prompt": "Why?", "completion": "So."}
    for more in ({"label": False}, {"kto_tag": False}):
        rows = rows_of(tmp_path, *({**pair, **dict.fromkeys(more, value)} for value in (False, True, 0)))
        assert [row.messages for row in rows] == [None, tuple(PAIR), tuple(PAIR)]
        assert rows[0].fault == f"{next(iter(more))!r} is false: an answer that is a bad example"
    assert rows_of(tmp_path, {"messages": PAIR, "label": False})[0].messages is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": PAIR, "images": ["a.png"]}, "'images' is not empty: only text is read"),
        ({"conversations": SHAREGPT, "image": "a.png"}, "'image' is not empty: only text is read"),
        (
            {"prompt": "Why?", "completion": "So.", "Audio": {"path": "a"}},
            "'Audio' is not empty: only text is read",
        ),
        *(
            (
                {"messages": [{"role": "user", "content": content}, ANSWERED]},
                "a user message with the place of an image",
            )
            for content in ("<image>\nWhy?", "Why?\n<image>", " <video>Why?", "<image>", "<image><image>")
        ),
    ],
)
def test_images_and_audio_are_no_texts(tmp_path: Path, record: Any, reason: str) -> None:
    (row,) = rows_of(tmp_path, record)
    assert str(row.fault).startswith(reason)
    assert row.messages is None


def test_what_only_looks_like_an_image(tmp_path: Path) -> None:
    said = ("Does <image> exist in SVG?", "<audio src=x>", "<video></video> plays nothing", "a<image>")
    chats = [[{"role": "user", "content": text}, ANSWERED] for text in said]
    rows = rows_of(tmp_path, *({"messages": chat, "images": [], "audio": None} for chat in chats))
    assert [list(row.messages or ()) for row in rows] == chats


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"role": "user", "content": "a"},
            r"rows are single messages; put those of a conversation into a list",
        ),
        ({"message_id": 1, "role": "prompter", "text": "a"}, r"rows are single messages"),
        ({"question": "a", "choices": ["a", "b"], "answer": 1}, r"rows are questions with choices"),
        ({"Question": "a", "Options": ["a", "b"], "answer": 1}, r"rows are questions with choices"),
    ],
)
def test_columns_that_are_no_whole_conversation(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        source_of(tmp_path, record)
    if "text" in record:
        assert rows_of(tmp_path, record, text="text")[0].text == "a"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "alpaca"},
            r"data\.format = 'alpaca' needs columns.*\['question', 'answer', 'text'\].*alpaca: ins",
        ),
        ({"format": "alpaca", "text": "text"}, r"'alpaca' has columns of its own; leave out data\.text"),
        ({"format": "text", "messages": "text"}, r"'text' leaves out"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        source_of(tmp_path, {"question": "a", "answer": "b", "text": "c"}, **options)


def test_a_column_may_be_named_for_messages_of_either_kind(tmp_path: Path) -> None:
    for options in ({}, {"format": "sharegpt"}, {"format": "messages"}):
        assert rows_of(tmp_path, {"turns": SHAREGPT}, messages="turns", **options)[0].messages == tuple(PAIR)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "Why?", "output": ""}, "'output' is empty"),
        ({"instruction": "Why?", "output": None}, "'output' is empty"),
        ({"instruction": "", "output": "So."}, "'instruction' is empty"),
        ({"instruction": "Why?", "output": ["a", "b"]}, "'output' is a list, not a string"),
        (
            {"question": "Why?", "answer": {"value": "So.", "aliases": []}},
            "'answer' is an object, not a string",
        ),
        ({"prompt": "Why?", "accepted": None}, "'accepted' is empty"),
        ({"question": "Why?", "answer": "b", "history": [["a"]]}, "'history' is not a list of pairs"),
        ({"chosen": "So.", "rejected": "No."}, "'chosen' is a string without a prompt beside it"),
        ({"conversations": []}, "'conversations' is empty"),
        ({"prompt": "Why?", "chosen": None}, "'chosen' is empty"),
    ],
)
def test_rows_that_lack_something(tmp_path: Path, record: Any, reason: str) -> None:
    assert [row.fault for row in rows_of(tmp_path, record)] == [reason]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from("role from content value type text tool_calls function name arguments".split()),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
NAMES = sorted(
    {name for form in FORMS.values() for names in (form.needed | form.optional).values() for name in names}
)


@settings(deadline=None, max_examples=400)
@given(record=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5))
def test_whatever_a_row_holds_it_is_read_or_has_a_fault(record: dict[str, Any]) -> None:
    for reading in recognise(list(record)):
        with contextlib.suppress(Fault):
            said = reading.read(record)
            for message in said if isinstance(said, tuple) else ():
                assert isinstance(message["role"], str)
                message["content"].encode()
