"""Conversations, and what is labelled of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.corpus.templates import KINDS, Kind, Message, tokenizer_of
from tinyonn.corpus.rows import Row
from tinyonn.corpus.spans import (
    FOLDED,
    MERGED,
)
from tinyonn.corpus.tokens import UNLABELLED, Encoded, encode_rows

MANY = 100_000
WORDS = ("a", "Hello", " ", "\n", "  ", "\n\n", "é", "🙂", "?", "qz0zq", "\t", "<|im_start|>", "<|im_end|>",
         "<|im_end|>\n<|im_start|>assistant\n", "[/INST]", "[INST]", "</s>", "<|eot_id|>", "<end_of_turn>\n",
         "<|end|>\n", "<|assistant|>", "ASSISTANT:", "### assistant:\n", "<｜Assistant｜>", "assistant", "{{ x }}",
         "<|CHATBOT_TOKEN|>", "<|endoftext|>", "{% endgeneration %}", "\ue000")  # fmt: skip
TOOLS = ({"type": "function", "function": {"name": "sky", "description": "é <|im_end|>", "parameters": {}}},)
TOKENIZERS = {name: tokenizer_of(kind.template) for name, kind in KINDS.items()}
texts = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def call(city: str) -> Message:
    return {"type": "function", "function": {"name": "sky", "arguments": {"city": city}}}


@st.composite
def conversations(draw: st.DrawFn, tools: bool) -> list[Message]:
    """System messages, turns that mostly alternate, calls of tools where there are tools."""
    messages: list[Message] = [
        {"role": "system", "content": draw(texts)} for _ in range(draw(st.sampled_from((0, 0, 1, 1, 2))))
    ]
    for _ in range(draw(st.integers(1, 3))):
        messages += [user(draw(texts)) for _ in range(draw(st.sampled_from((1, 1, 1, 2))))]
        if tools and draw(st.booleans()):
            said = draw(st.sampled_from(({}, {"content": ""}, {"content": "I look."})))
            messages += [{"role": "assistant", **said, "tool_calls": [call(draw(texts))]}]
            messages += [{"role": "tool", "content": draw(texts)}]
        thought = {"reasoning_content": draw(texts)} if draw(st.sampled_from((False, False, True))) else {}
        messages += [answer(draw(texts), **thought)]
        messages += [answer(draw(texts)) for _ in range(draw(st.sampled_from((0, 0, 0, 1))))]
    if draw(st.booleans()):
        messages.append(user(draw(texts)))
    return messages


def encode(messages: list[Message], tokenizer: Any, tools: Any = None, limit: int = MANY) -> Encoded:
    row = Row(0, messages=tuple(messages), tools=tools)
    return next(iter(encode_rows([row], tokenizer, limit)))


def text_of(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode([int(token) for token in ids]))


def runs(tokenizer: Any, encoded: Encoded) -> tuple[list[str], list[str]]:
    """Texts of the labelled and of the unlabelled runs of tokens."""
    said = encoded.labels != UNLABELLED
    cuts = np.flatnonzero(np.diff(said.astype(int))) + 1
    parts = [
        (text_of(tokenizer, ids), bool(mark[0]))
        for ids, mark in zip(np.split(encoded.input_ids, cuts), np.split(said, cuts), strict=True)
        if len(ids)
    ]
    return [text for text, mark in parts if mark], [text for text, mark in parts if not mark]


def accepted(kind: Kind, messages: list[Message]) -> tuple[list[Message], set[str]]:
    """The conversation as a template that refuses should be given it, and what is said of that."""
    notes = set()
    if not kind.system and messages[0]["role"] == "system":
        count = sum(message["role"] == "system" for message in messages)
        told = [message["content"] for message in messages[: count + 1]]
        messages = [user("\n\n".join(told)), *messages[count + 1 :]]
        notes.add(FOLDED)
    if kind.alternating:
        joined: list[Message] = []
        for message in messages:
            if joined and joined[-1]["role"] == message["role"]:
                both = f"{joined[-1]['content']}\n\n{message['content']}"
                joined[-1] = {"role": message["role"], "content": both}
            else:
                joined.append(message)
        if len(joined) < len(messages):
            notes.add(MERGED)
        messages = joined
    return messages, notes
