"""Forms of data: which columns of a table are a conversation or a text, and what a row of them says.

A table's columns decide, by the names in `FORMS` in any case: messages and text wherever they are, else the first form
that finds the columns that it needs. Columns of `UNWANTED` and `MEDIA` set rows aside. docs/data.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tinyonn.corpus.messages import (
    Fault,
    Message,
    as_list,
    as_text,
    read_calls,
    read_message,
    read_messages,
    told_turns,
    unicode_fault,
)

PARTS = ("messages", "text", "asked", "input", "answer", "chosen", "thought", "history", "system")
SYSTEM = ("system", "system_prompt", "system_message", "systemInstruction")
INPUT = ("input", "context", "passage")
THOUGHT = ("reasoning_content", "reasoning", "thinking")
HISTORY = ("history",)
OPTIONAL = {"thought": THOUGHT, "history": HISTORY, "system": SYSTEM}
ASKED = ("prompt", "question", "instruction", "query", "input", "conversations", "conversation")
CHATS = ("conversations", "conversation")
LOOSE = (  # of the same where no other form is there
    "dialog", "dialogs", "dialogue", "dialogues", "chat", "chats", "chat_history", "turns", "msgs", "contents", "data",
)  # fmt: skip
UNWANTED = ("label", "kto_tag")  # false where an answer is a bad example
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
CHOICES = ("choices", "options")
SINGLE = {"role", "from", "speaker"}  # columns of a table whose rows are messages and not conversations
WRAPPERS = ("data", "rows", "train", "examples", "instances", "records", "items", "samples")
SCALARS = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Form:
    """A form: by part of a conversation the names that its column may have; the optional parts may be missing."""

    name: str
    needed: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]]

    def find(self, columns: Sequence[str], loose: bool = True) -> Reading | None:
        """Its columns among those of a table, or None if one is missing; `loose` takes unusual names of chats too."""
        found: dict[str, str] = {}
        for part, names in {**self.needed, **self.optional}.items():
            names = (*names, *LOOSE) if loose and names == CHATS else names
            free = [column for column in columns if column not in found.values()]
            if (column := _match(names, free)) is not None:
                found[part] = column
            elif part in self.needed:
                return None
        unwanted = _match(UNWANTED, columns)
        media = [column for column in columns if column.lower() in MEDIA and column not in found.values()]
        parts = tuple((part, found[part]) for part in PARTS if part in found)
        return Reading(self.name, parts, unwanted, tuple(media))


def _match(names: Iterable[str], columns: Iterable[str]) -> str | None:
    """The column that has the first of the names, spelt as it is or in another case."""
    known = {column.lower(): column for column in columns} | {column: column for column in columns}
    return next(
        (known[name] for name in (n for name in names for n in (name, name.lower())) if name in known), None
    )


FORMS = {
    form.name: form
    for form in (
        Form("messages", {"messages": ("messages",)}, {"system": SYSTEM}),
        Form("text", {"text": ("text",)}, {}),
        Form(
            "preference",
            {"chosen": ("chosen", "chosen_response", "accepted", "preferred_output")},
            {"asked": ASKED, "input": INPUT, "system": SYSTEM},
        ),
        Form("sharegpt", {"messages": CHATS}, {"system": SYSTEM}),
        Form(
            "alpaca",
            {"asked": ("instruction",), "answer": ("output", "response")},
            {"input": INPUT, **OPTIONAL},
        ),
        Form("query-response", {"asked": ("query",), "answer": ("response", "answer", "answers")}, OPTIONAL),
        Form(
            "prompt-completion",
            {
                "asked": ("prompt", "input", "inputs", "human", "user"),
                "answer": ("completion", "response", "output", "target", "targets", "assistant"),
            },
            {"input": INPUT, **OPTIONAL},
        ),
        Form(
            "question-answer",
            {"asked": ("question", "problem"), "answer": ("answer", "response", "solution")},
            {"input": INPUT, **OPTIONAL},
        ),
    )
}
NEEDED = frozenset(name for form in FORMS.values() for names in form.needed.values() for name in names)
SAID = frozenset(
    name
    for form in FORMS.values()
    for part, names in form.needed.items()
    if part in ("text", "asked", "answer", "chosen")
    for name in names
)


@dataclass(frozen=True)
class Reading:
    """A form and the columns in which its parts stand.

    Attributes
    ----------
    form : str
    parts : tuple of (str, str)
        Part (messages, text, asked, input, answer, thought, history, system, chosen) and column.
    unwanted : str or None
        Column that is false in the rows that are bad examples.
    media : tuple of str
        Columns of images, audio and video: rows in which one is filled are set aside.
    """

    form: str
    parts: tuple[tuple[str, str], ...]
    unwanted: str | None = None
    media: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        more = [self.unwanted] if self.unwanted is not None else []
        return [*(column for _, column in self.parts), *more, *self.media]

    def __str__(self) -> str:
        return f"{self.form}: {', '.join(column for _, column in self.parts)}"

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
        self._refuse(record)
        if "text" in values:
            return None if main is None else _plain(main, self.main)
        if "answer" in values:
            asked = _asked(values)
            if not asked:
                raise Fault(f"{self.main!r} is empty")
            answer = _answer(values["answer"], columns["answer"])
            messages = [*_history(values), *asked, *_thinking(answer, values.get("thought"))]
        elif main is None or (isinstance(main, str | list) and not main):
            return None
        else:
            messages = read_messages(main) if "messages" in values else _chosen(values, columns)
        system = values.get("system")
        if system is not None and as_text(system).strip() and messages and messages[0]["role"] != "system":
            whole = isinstance(system, dict) and "parts" in system
            messages.insert(0, read_message({**(system if whole else {"content": system}), "role": "system"}))
        if not any(message["content"].strip() or message.get("tool_calls") for message in messages):
            raise Fault("empty text")
        return tuple(messages)

    def _refuse(self, record: dict[str, Any]) -> None:
        if self.unwanted is not None and record.get(self.unwanted) is False:
            raise Fault(f"{self.unwanted!r} is false: an answer that is a bad example")
        for column in self.media:
            if record.get(column) not in (None, "", [], {}):
                alone = " (data.text names a column that is read alone)" if self.form == "text" else ""
                raise Fault(f"{column!r} is not empty: only text is read{alone}")


def recognise(columns: Sequence[str]) -> list[Reading]:
    """The readings to try on every row in turn: messages, then text; another form only where neither is.

    None where the columns tell that a row is no whole text or conversation (`misfit`).
    """
    if misfit(columns):
        return []
    found = [reading for form in FORMS.values() if (reading := form.find(columns, loose=False))]
    if not found and (chat := FORMS["sharegpt"].find(columns)) is not None:
        found = [chat]
    plain = [reading for reading in found if reading.form in ("messages", "text")]
    return plain or found[:1]


def misfit(columns: Sequence[str]) -> str | None:
    """Why rows of these columns are no whole texts or conversations, and what to do; None if they may be."""
    names = {column.lower() for column in columns}
    if names & SINGLE and names & {"content", "value", "text"} and "messages" not in names:
        return (
            "its rows are single messages; put those of a conversation into a list under 'messages' in one row, "
            "or name data.text to read them as texts"
        )
    if names & set(CHOICES) and not names & {"messages", "text"}:
        return "its rows are questions with choices; write them out as texts or conversations"
    return None


def known_forms() -> str:
    """Every form with its columns, for messages."""
    return "; ".join(
        f"{name}: {', '.join('/'.join(names[:2]) for names in form.needed.values())}"
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
    if calls := read_calls(answer):
        return [{"role": "assistant", "content": "", "tool_calls": calls}]
    first = answer[0] if isinstance(answer, list) and answer else answer
    if isinstance(first, dict) and (first.keys() & {"role", "from", "speaker", "content", "messages"}):
        return read_messages(answer)
    if answer is None or isinstance(answer, list | dict):
        kind = "an object" if isinstance(answer, dict) else "a list"
        raise Fault(f"{column!r} is {f'{kind}, not a string' if answer else 'empty'}")
    if not as_text(answer).strip():
        raise Fault(f"{column!r} is empty")
    return [read_message({"role": "assistant", "content": answer})]


def _thinking(answer: list[Message], thought: Any) -> list[Message]:
    """An answer with what was thought before it."""
    if thought is None or not as_text(thought).strip() or "reasoning_content" in answer[0]:
        return answer
    return [read_message({**answer[0], "reasoning_content": as_text(thought)}), *answer[1:]]


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


def _chosen(values: dict[str, Any], columns: dict[str, str]) -> list[Message]:
    """The chosen one of a pair; it may begin with the prompt, or be the answer alone."""
    chosen, column = values["chosen"], columns["chosen"]
    asked = _asked(values)
    if isinstance(chosen, str) and not asked:
        if told := told_turns(chosen):
            return told
        raise Fault(f"{column!r} is a string without a prompt beside it")
    messages = _answer(chosen, column)
    if not messages:
        raise Fault(f"{column!r} is empty")
    answers_alone = messages[0]["role"] in ("assistant", "tool")
    return [*asked, *messages] if answers_alone else messages


def told_by_hub(value: Any) -> Any:
    """Take a row out of what the hub's viewer and its `/rows` give: ``{"row_idx": 0, "row": {...}}``."""
    return value["row"] if isinstance(value, dict) and {"row", "row_idx"} <= value.keys() else value


def unfold(value: Any) -> list[Any]:
    """Make rows of a file's only value; of an object that is a row itself, one.

    ==================================================  =====================================
    ``{"text": ["a", "b"]}``                            columns
    ``{"text": {"0": "a", "1": "b"}}``                  columns, as pandas writes them
    ``{"columns": ["text"], "data": [["a"], ["b"]]}``   split, as pandas writes it
    ``{"id1": {"text": "a"}, "id2": {"text": "b"}}``    rows by their ids
    ``{"data": {"train": [{"text": "a"}]}}``            a split, or any of these, in a wrapper
    ==================================================  =====================================
    """
    if not isinstance(value, dict) or not value:
        return [value]
    inner = next((value[name] for name in WRAPPERS if isinstance(value.get(name), dict)), None)
    if inner is not None and not _named(value, NEEDED):
        rows = next((inner[name] for name in WRAPPERS if isinstance(inner.get(name), list)), None)
        return rows if rows is not None else unfold(inner)
    names, lines = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(lines, list) and all(isinstance(line, list) for line in lines):
        return [dict(zip(map(str, names), line, strict=False)) for line in lines]
    parts = list(value.values())
    if all(isinstance(part, dict) for part in parts):
        keys = list(parts[0])
        if _named(value, NEEDED) and keys and all(key.isdigit() for key in keys):
            return [{name: part.get(key) for name, part in value.items()} for key in keys]
        rows = not _named(value, NEEDED) and all(_named(part, NEEDED) for part in parts)
        return parts if rows else [value]
    columns = all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts)
    if columns and _named(value, SAID) and all(isinstance(one, SCALARS) for part in parts for one in part):
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    return [value]


def _named(record: dict[str, Any], names: frozenset[str]) -> bool:
    return any(key.lower() in names for key in record)
