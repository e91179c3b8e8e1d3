"""Conversations changed as a whole: system messages folded, turns merged, every string replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyonn.base.rows import Message


def fold_system(messages: list[Message]) -> list[Message]:
    """Put system messages before the contents of the user's next turn, or make them a user's turn of their own."""
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
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


def _plain(message: Message) -> bool:
    told = {key for key, value in message.items() if value is not None}
    return told == {"role", "content"} and message["role"] != "tool" and isinstance(message["content"], str)


def strings(value: Any) -> Iterator[str]:
    """Yield every string in a tree of lists and dicts, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Copy a tree of lists and dicts with every string changed, keys left out."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return [mapped(item, change) for item in value] if isinstance(value, list | tuple) else value
