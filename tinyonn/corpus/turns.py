"""Conversations changed as a whole: system messages folded, turns merged, tools written out, every string replaced."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyonn.corpus.rows import Message


def fold_system(messages: list[Message], places: Container[int] | None = None) -> list[Message]:
    """Put system messages before the contents of the user's next turn, or make them a user's turn of their own.

    All of them, or those at `places`.
    """
    folded: list[Message] = []
    waiting: list[str] = []
    for place, message in enumerate(messages):
        if message["role"] == "system" and (places is None or place in places):
            waiting.append(str(message["content"]))
        elif message["role"] == "user" and waiting:
            folded.append({**message, "content": "\n\n".join([*waiting, str(message["content"])])})
            waiting = []
        else:
            folded.append(message)
    return [*folded, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else folded


def merge_turns(messages: list[Message]) -> list[Message]:
    """Join successive turns of one role that hold nothing but contents."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last is not None and _plain(last) and _plain(message) and last["role"] == message["role"]:
            merged[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged


def write_calls(messages: list[Message]) -> list[Message]:
    """Write calls of tools into contents, and what tools say into the user's turns, as Hermes and Qwen have them."""
    written = []
    for message in messages:
        if calls := message.get("tool_calls"):
            told = [f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in calls]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            written.append({**rest, "content": "\n".join([message["content"], *told]).lstrip("\n")})
        elif message["role"] == "tool":
            said = f"<tool_response>\n{message['content']}\n</tool_response>"
            written.append({"role": "user", "content": said})
        else:
            written.append(message)
    return written


def write_tools(messages: list[Message], tools: Sequence[Any]) -> list[Message]:
    """Write the schemas of tools into the system message, or into one that is put first, as Hermes has them."""
    told = "\n".join(["<tools>", *map(_json, tools), "</tools>"])
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def is_weightless(message: Message) -> bool:
    """Whether a message says that nothing is to be learned from it, as OpenAI's and Axolotl's do."""
    weights = [message.get(key) for key in ("weight", "loss_weight")]
    switches = [message.get(key) for key in ("train", "training")]
    return any(weight is not None and weight == 0 for weight in weights) or any(
        on is False for on in switches
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(message: Message) -> bool:
    told = {key for key, value in message.items() if value is not None}
    return told == {"role", "content"} and message["role"] != "tool" and isinstance(message["content"], str)


def strings(value: Any) -> Iterator[str]:
    """Yield every string in a tree of lists and dicts, keys with them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Copy a tree of lists and dicts with every string changed, keys with them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {mapped(key, change): mapped(item, change) for key, item in value.items()}
    return [mapped(item, change) for item in value] if isinstance(value, list | tuple) else value
