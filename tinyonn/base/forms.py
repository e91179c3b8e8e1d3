"""Forms of data: which columns of a table are a conversation or a text, and what a row of them says.

A table's columns decide, by the names in `FORMS`: messages and text wherever they are, else the first form that finds
the columns that it needs. README.md has the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinyonn.base.messages import Fault, Message, as_list, as_text, read_message, read_messages, unicode_fault

PARTS = ("messages", "text", "asked", "input", "answer", "chosen", "history", "system")
SYSTEM = ("system", "system_prompt")
OPTIONAL = {"history": ("history",), "system": SYSTEM}
ASKED = ("prompt", "question", "instruction", "query", "conversations", "conversation")
TURNS = re.compile(r"\n\n(Human|Assistant): ?")  # of Anthropic's hh-rlhf, where a conversation is one string


@dataclass(frozen=True)
class Form:
    """A form: by part of a conversation the names that its column may have; the optional parts may be missing."""

    name: str
    needed: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]]

    def find(self, columns: Sequence[str]) -> Reading | None:
        """Its columns among those of a table, or None if one is missing."""
        found: dict[str, str] = {}
        for part, names in {**self.needed, **self.optional}.items():
            column = next((name for name in names if name in columns and name not in found.values()), None)
            if column is not None:
                found[part] = column
            elif part in self.needed:
                return None
        return Reading(self.name, tuple((part, found[part]) for part in PARTS if part in found))


FORMS = {
    form.name: form
    for form in (
        Form("messages", {"messages": ("messages",)}, {}),
        Form("text", {"text": ("text",)}, {}),
        Form("preference", {"chosen": ("chosen",)}, {"asked": ASKED, "input": ("input",), "system": SYSTEM}),
        Form("sharegpt", {"messages": ("conversations", "conversation")}, {"system": SYSTEM}),
        Form(
            "alpaca",
            {"asked": ("instruction",), "answer": ("output", "response")},
            {"input": ("input", "context"), **OPTIONAL},
        ),
        Form("query-response", {"asked": ("query",), "answer": ("response", "answer")}, OPTIONAL),
        Form(
            "prompt-completion",
            {"asked": ("prompt", "input"), "answer": ("completion", "response", "output")},
            OPTIONAL,
        ),
        Form(
            "question-answer",
            {"asked": ("question", "problem"), "answer": ("answer", "response", "solution")},
            OPTIONAL,
        ),
    )
}
NEEDED = frozenset(name for form in FORMS.values() for names in form.needed.values() for name in names)


@dataclass(frozen=True)
class Reading:
    """A form and the columns in which its parts stand.

    Attributes
    ----------
    form : str
    parts : tuple of (str, str)
        Part (messages, text, asked, input, answer, history, system, chosen) and column.
    """

    form: str
    parts: tuple[tuple[str, str], ...]

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [column for _, column in self.parts]

    def __str__(self) -> str:
        return f"{self.form}: {', '.join(self.columns)}"

    @property
    def main(self) -> str:
        """The column without which a row says nothing."""
        parts = dict(self.parts)
        return parts["chosen"] if "chosen" in parts else self.columns[0]

    def read(self, record: dict[str, Any]) -> str | tuple[Message, ...] | None:
        """A row's text or messages; None if its main column is empty.

        Raises
        ------
        Fault
            Why the row is set aside.
        """
        columns = dict(self.parts)
        values = {part: record.get(column) for part, column in self.parts}
        main = record.get(self.main)
        if "text" in values:
            return None if main is None else _plain(main, self.main)
        if "answer" in values:
            asked = _asked(values)
            if not asked:
                raise Fault(f"{self.main!r} is empty")
            messages = [*_history(values), *asked, *_answer(values["answer"], columns["answer"])]
        elif main is None or (isinstance(main, str | list) and not main):
            return None
        else:
            messages = read_messages(main) if "messages" in values else _chosen(values)
        system = values.get("system")
        if system is not None and as_text(system).strip() and messages and messages[0]["role"] != "system":
            messages.insert(0, read_message({"role": "system", "content": system}))
        if not any(message["content"].strip() or message.get("tool_calls") for message in messages):
            raise Fault("empty text")
        return tuple(messages)


def recognise(columns: Sequence[str]) -> list[Reading]:
    """The readings to try on every row in turn: messages, then text; another form only where neither is."""
    found = [reading for form in FORMS.values() if (reading := form.find(columns))]
    plain = [reading for reading in found if reading.form in ("messages", "text")]
    return plain or found[:1]


def known_forms() -> str:
    """Every form with its columns, for messages."""
    return "; ".join(
        f"{name}: {', '.join('/'.join(names) for names in form.needed.values())}"
        for name, form in FORMS.items()
    )


def _plain(text: Any, column: str) -> str:
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise Fault(f"not UTF-8 ({error.reason})", malformed=True) from None
    if not isinstance(text, str):
        raise Fault(f"{column!r} is {type(text).__name__}, not a string")
    if not text.strip():
        raise Fault("empty text")
    if fault := unicode_fault(text):
        raise Fault(fault)
    return text


def _asked(values: dict[str, Any]) -> list[Message]:
    """What is asked, a string or messages, with the input below it."""
    asked = values.get("asked")
    if isinstance(asked, list | dict):
        return read_messages(asked)
    lines = [as_text(value) for value in (asked, values.get("input")) if value is not None]
    content = "\n".join(line for line in lines if line.strip())
    return [read_message({"role": "user", "content": content})] if content else []


def _answer(answer: Any, column: str) -> list[Message]:
    if isinstance(answer, dict) or (isinstance(answer, list) and answer and isinstance(answer[0], dict)):
        return read_messages(answer)
    if answer is None or isinstance(answer, list):
        raise Fault(f"{column!r} is {'empty' if not answer else 'a list, not a string'}")
    if not as_text(answer).strip():
        raise Fault(f"{column!r} is empty")
    return [read_message({"role": "assistant", "content": answer})]


def _history(values: dict[str, Any]) -> list[Message]:
    """Earlier turns: pairs of a question and an answer, or messages."""
    turns = as_list(values.get("history"), "'history'")
    if turns and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns):
        return read_messages(turns)
    messages = []
    for turn in turns:
        pair = list(turn.values()) if isinstance(turn, dict) else turn
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Fault("'history' is not a list of pairs")
        for role, content in zip(("user", "assistant"), pair, strict=True):
            if content is not None and as_text(content).strip():
                messages.append(read_message({"role": role, "content": content}))
    return messages


def _chosen(values: dict[str, Any]) -> list[Message]:
    """The chosen one of a pair; it may begin with the prompt, or be the answer alone."""
    chosen = values["chosen"]
    asked = _asked(values)
    if isinstance(chosen, str) and not asked:
        turns = TURNS.split(chosen)
        if len(turns) < 3:
            raise Fault("'chosen' is a string without a prompt beside it")
        said = zip(turns[1::2], turns[2::2], strict=True)
        return [read_message({"role": role, "content": content}) for role, content in said]
    messages = _answer(chosen, "chosen")
    if not messages:
        raise Fault("'chosen' is empty")
    answers_alone = messages[0]["role"] in ("assistant", "tool")
    return [*asked, *messages] if answers_alone else messages
