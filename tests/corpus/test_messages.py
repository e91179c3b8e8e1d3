"""Messages of a row: roles, contents, calls of tools, and what is set aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.corpus.records import ANSWERED, CALL, PAIR, SHAREGPT, rows_of, source_of
from tinyonn.corpus.messages import Fault, read_messages, read_tools


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "assistant") for name in ("gpt", "Model", "bot", " assistant", "Bing", "bard")),
        *((name, "user") for name in ("human", "USER", "prompter")),
        *((name, "tool") for name in ("tool", "function", "observation", "ipython")),
        ("developer", "system"),
        ("critic", "critic"),
    ],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_roles(name: str, role: str, keys: tuple[str, str]) -> None:
    assert read_messages([dict(zip(keys, (name, "x"), strict=True))]) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "The "}, {"type": "text", "text": "end"}], "The end"),
        ([{"type": "text", "value": "hi"}], "hi"),
        ([{"type": "text", "text": "a", "image_url": None}, "b", {"text": "c"}], "abc"),
        ([{"type": "input_text", "text": "a"}, {"type": "text", "text": 1}], "a1"),
        ({"type": "text", "text": "hi"}, "hi"),
        (7, "7"),
        (2.5, "2.5"),
        (True, "true"),
        ([], ""),
    ],
)  # fmt: skip
def test_contents(content: Any, text: str) -> None:
    assert read_messages([{"role": "user", "content": content}]) == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "part of type 'image_url': only text",
        ),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "image", "text": None}]},
            "part of type 'image'",
        ),
        ({"content": [{"image": "x.png"}]}, "part of type 'image'"),
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, "part of type 'input_audio'"),
        ({"content": [["nested"]]}, "part of type 'list'"),
        ({"content": None}, "a user message without a text as 'content'"),
        ({"content": "a \ud800"}, "not valid Unicode"),
        ({"content": "", "tool_calls": [{"function": {}}]}, "a tool call without a name"),
        (
            {"content": "", "tool_calls": [{"function": {"name": "a", "arguments": "\ud800"}}]},
            "not valid Unicode",
        ),
        ({"content": "", "tool_calls": 3}, "tool calls are int, not a list"),
    ],
)
def test_messages_that_are_set_aside(tmp_path: Path, message: dict[str, Any], reason: str) -> None:
    rows = rows_of(tmp_path, {"messages": [{"role": "user", **message}]}, {"messages": PAIR})
    assert [row.index for row in rows] == [0, 1]
    assert reason in str(rows[0].fault)
    assert (rows[0].messages, rows[0].malformed, rows[1].fault) == (None, False, None)


TOLD = {"name": "sky", "arguments": {"city": "Lima"}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": "", "tool_calls": [TOLD]},
        {
            "role": "assistant",
            "tool_calls": [{"function": {**TOLD, "arguments": json.dumps(TOLD["arguments"])}}],
        },
        {"role": "assistant", "content": None, "function_call": TOLD},
        {"from": "function_call", "value": json.dumps(TOLD)},
        {"from": "function_call", "value": json.dumps([TOLD])},
        {"role": "tool_call", "content": TOLD},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "a", "name": "sky", "input": TOLD["arguments"]}],
        },
    ],
)
def test_calls_of_tools(message: dict[str, Any]) -> None:
    assert read_messages([message]) == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


def test_what_a_message_says_besides_is_kept() -> None:
    message = {"role": "assistant", "content": "So.", "reasoning_content": "Hm.", "weight": 0, "name": None}
    assert read_messages([message]) == [{key: value for key, value in message.items() if key != "name"}]
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "So."}]
    assert read_messages([{"role": "assistant", "content": parts}]) == [
        {**ANSWERED, "reasoning_content": "Hm."}
    ]
    call = {"from": "function_call", "value": "weather of Lima"}
    assert read_messages([call]) == [{"role": "assistant", "content": "weather of Lima"}]
    told = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "mist"}]}
    assert read_messages([told]) == [{"role": "tool", "content": "mist"}]
    thinking = {"role": "assistant", "content": "So.", "thinking": "Hm."}
    assert read_messages([thinking]) == [{**thinking, "reasoning_content": "Hm."}]
    result = {"role": "tool", "content": {"sky": "mist"}, "tool_call_id": "a"}
    assert read_messages([result]) == [{**result, "content": '{"sky": "mist"}'}]


SCHEMA = {"name": "sky", "description": "Of a city", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}


@pytest.mark.parametrize(
    ("tools", "wanted"),
    [
        ([TOOL], (TOOL,)),
        (json.dumps([TOOL]), (TOOL,)),
        ([json.dumps(SCHEMA)], (TOOL,)),
        (SCHEMA, (TOOL,)),
        (None, None),
        ("", None),
        ("[]", None),
        (" [] ", None),
        ([], None),
    ],
)
def test_tools_travel_with_the_row(tmp_path: Path, tools: Any, wanted: Any) -> None:
    source = source_of(tmp_path, {"conversations": SHAREGPT, "tools": tools})
    assert [row.tools for row in source] == [wanted]
    assert source.form == "sharegpt: conversations (with tools)"


@pytest.mark.parametrize("tools", ["not JSON", ["not JSON"], [3], 3])
def test_bad_tools_set_the_row_aside(tmp_path: Path, tools: Any) -> None:
    (row,) = rows_of(tmp_path, {"messages": PAIR, "tools": tools})
    assert "tool" in str(row.fault)
    with pytest.raises(Fault):
        read_tools(tools)
