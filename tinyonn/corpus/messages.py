"""Messages as people write them, in the way in which chat templates take them.

A message has a `role` (system, user, assistant, tool or another that the template may know) and a string as
`content`; `tool_calls` (with arguments as dicts), `reasoning_content` and all other keys are kept.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

Message = dict[str, Any]

ROLES = {
    "user": "human user prompter",
    "assistant": "assistant gpt model bot chatbot chatgpt ai bing bard claude gemini",
    "system": "system developer",
    "tool": "tool function observation function_response tool_response tool_result ipython",
    "call": "function_call tool_call tool_calls",  # of the assistant
}
ROLE = {name: role for role, names in ROLES.items() for name in names.split()}
ROLE_KEYS = ("role", "from", "speaker", "sender")
CONTENT_KEYS = ("content", "value", "text", "parts")
PAIRS = {  # a turn and its answer in one object
    "user": "human user input question prompt query instruction",
    "assistant": "assistant gpt bot output answer response completion",
    "system": "system",
}
PAIR = {name: role for role, names in PAIRS.items() for name in names.split()}
THOUGHTS = ("reasoning", "thinking", "thought")  # other names of reasoning_content
# A conversation as one string, as in Anthropic's hh-rlhf and Glaive's function calling.
TURNS = re.compile(r"(?:^\s*|\n\n\s*)(Human|Assistant|SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE): ?")
END = re.compile(r"\s*<\|endoftext\|>\s*$")
# Where LLaVA and LLaMA-Factory put an image: first or last in what a user says. HTML has an end to its <audio>.
PLACES = re.compile("<(?:image|video|audio)>")
PLACEHOLDER = re.compile(r"\s*<(image|video|audio)>(?!.*</\1>)|.*\s<(image|video|audio)>\s*$", re.DOTALL)
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
THOUGHT_PARTS = ("thinking", "reasoning")


class Fault(Exception):
    """Why a row is set aside.

    Attributes
    ----------
    malformed : bool
        The fault lies in the file's bytes and not in the row's content.
    """

    def __init__(self, reason: str, malformed: bool = False) -> None:
        super().__init__(reason)
        self.malformed = malformed


def read_messages(value: Any) -> list[Message]:
    """Read a conversation.

    A list of messages, that list as a JSON string, one message, a dict of lists; a list of strings, which the user
    begins and the assistant answers in turn; or one string of turns that begin with the speaker (`told_turns`).

    Raises
    ------
    Fault
        Not messages, or messages with something else than text.
    """
    if isinstance(value, str) and (told := told_turns(value)):
        return told
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
        columns = len(lists) == len(value) > 1
        value = (
            [dict(zip(value, turn, strict=False)) for turn in zip(*lists, strict=False)]
            if columns
            else [value]
        )
    turns = as_list(value, "messages")
    if len(turns) > 1 and all(isinstance(turn, str) for turn in turns):
        turns = [
            {"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)
        ]
    return [read_message(message) for turn in turns for message in _paired(turn)]


def _paired(turn: Any) -> list[Any]:
    """The messages of a turn that holds a question and its answer, else the turn."""
    if not isinstance(turn, dict):
        return [turn]
    told = {key: said for key, said in turn.items() if said is not None}
    if told and (told.keys() <= ROLE.keys() or told.keys() <= PAIR.keys()):
        return [{"role": PAIR.get(key, key), "content": said} for key, said in told.items()]
    return [turn]


def told_turns(text: str) -> list[Message]:
    """Read a conversation that is one string: ``Human: ...`` and ``Assistant: ...`` after empty lines.

    A string is one where it begins with a speaker and has two turns or more; [] if it is none.
    """
    parts = TURNS.split(text)
    if len(parts) < 5 or parts[0].strip():
        return []
    roles = {"FUNCTION RESPONSE": "tool"}
    said = zip(parts[1::2], parts[2::2], strict=True)
    return [read_message({"role": roles.get(who, who), "content": END.sub("", what)}) for who, what in said]


def read_message(message: Any) -> Message:
    """Read one message; keys that are null are dropped.

    Raises
    ------
    Fault
        No role, or a content that is not text.
    """
    if not isinstance(message, dict):
        raise Fault("a message without a 'role'")
    if len(message) == 2 and (plain := _plain(message)) is not None:
        return plain
    given = {key: value for key, value in message.items() if value is not None}
    role_key = next((key for key in ROLE_KEYS if isinstance(given.get(key), str)), None)
    if role_key is None:
        raise Fault("a message without a 'role'")
    said = str(given.pop(role_key)).strip()
    role = ROLE.get(said.lower(), said)
    content_key = next((key for key in CONTENT_KEYS if key in given), None)
    content = given.pop(content_key) if content_key else None
    calls = _calls(given.pop("tool_calls", None) or given.pop("function_call", None))
    if role == "call":
        role, (content, more) = "assistant", _told_calls(content)
        calls = calls + more
    if content is None:
        if not calls and "reasoning_content" not in given:
            raise Fault(f"a {role} message without a text as 'content'")
        content = ""
    if isinstance(content, list):
        if (result := _result(content)) is not None:
            role, content = "tool", result
        else:
            content, used = _without_calls(content)
            calls = calls + _calls(used)
    text, thought = _content(content, role)
    if role == "user" and PLACES.search(text) and PLACEHOLDER.match(text):
        raise Fault("a user message with the place of an image, audio or video: only text is read")
    thought = thought or next((given[key] for key in THOUGHTS if isinstance(given.get(key), str)), "")
    found = {"role": role, "content": text, **given}
    if thought:
        found.setdefault("reasoning_content", thought)
    if calls:
        found["tool_calls"] = calls
    if fault := unicode_fault(text) or (_deep_fault(found) if len(found) > 2 else None):
        raise Fault(fault)
    return found


def _plain(message: Message) -> Message | None:
    """A message of a role and a string, which most are, in short."""
    said, content = message.get("role"), message.get("content")
    role = ROLE.get(said) if type(said) is str else None
    if role is None or role == "call" or type(content) is not str:
        return None
    if (role == "user" and PLACES.search(content)) or not (
        content.isascii() or unicode_fault(content) is None
    ):
        return None
    return {"role": role, "content": content}


def read_tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Read a column of tools: a list of schemas, or that as a JSON string; None if there are none.

    Raises
    ------
    Fault
        Not a list of schemas.
    """
    tools = []
    for tool in as_list([value] if isinstance(value, dict) else value, "tools"):
        schema = _parsed(tool) if isinstance(tool, str) else tool
        if not isinstance(schema, dict):
            raise Fault(f"a tool is {type(schema).__name__}, not a schema")
        bare = isinstance(schema.get("name"), str) and "function" not in schema
        schema = (
            {"type": "function", "function": schema} if bare and schema.get("type") != "function" else schema
        )
        if fault := _deep_fault(schema):
            raise Fault(fault)
        tools.append(schema)
    return tuple(tools) or None


def as_list(value: Any, what: str) -> list[Any]:
    """A list, also one that is told as a JSON string; empty for None and ''.

    Raises
    ------
    Fault
        Something else.
    """
    if isinstance(value, str):
        parsed = _parsed(value) if value.strip() else []
        parsed = _literal(value) if parsed is None else parsed
        value = [parsed] if isinstance(parsed, dict) else parsed if isinstance(parsed, list) else value
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise Fault(f"{what} are {type(value).__name__}, not a list")
    return list(value)


def as_text(value: Any) -> str:
    """A string as it is; numbers, and what else JSON can say, as JSON."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        raise Fault(f"a {type(value).__name__} in the place of a text") from None


def unicode_fault(text: str) -> str | None:
    """What is wrong with a string that cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not valid Unicode ({error.reason})"
    return None


def _deep_fault(value: Any) -> str | None:
    return unicode_fault(json.dumps(value, ensure_ascii=False, default=str))


def _content(content: Any, role: str) -> tuple[str, str]:
    """A message's text, and what it thinks: a string, a number, or parts."""
    if isinstance(content, str | int | float):
        return as_text(content), ""
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list | tuple):
        raise Fault(f"a {role} message without a text as 'content'")
    if role == "tool" and not any(isinstance(part, dict) and "type" in part for part in parts):
        return as_text(content), ""  # a result that is not told as a string
    text, thought = [], []
    for part in parts:
        kind, said = ("text", part) if isinstance(part, str) else _part(part)
        if kind in THOUGHT_PARTS and isinstance(said, str):
            thought.append(said)
        elif kind in TEXT_PARTS and isinstance(said, str | int | float):
            text.append(as_text(said))
        else:
            raise Fault(f"a {role} message with a part of type {kind!r}: only text is read")
    return "".join(text), "".join(thought)


def _part(part: Any) -> tuple[str, Any]:
    if not isinstance(part, dict):
        return type(part).__name__, None
    given = {key: value for key, value in part.items() if value is not None}
    kind = str(
        given.pop("type", next(iter(given), "nothing") if not given.keys() & set(CONTENT_KEYS) else "text")
    )
    return kind, next(
        (given[key] for key in (*CONTENT_KEYS, kind) if key in given), "" if kind == "text" else None
    )


def _kinds(content: list[Any]) -> list[Any]:
    return [part.get("type") if isinstance(part, dict) else None for part in content]


def _result(content: list[Any]) -> str | None:
    """What tools gave, where a message holds nothing but Anthropic's parts of that."""
    if set(map(str, _kinds(content))) != {"tool_result"}:
        return None
    return "\n".join(_content(part.get("content") or "", "tool")[0] for part in content)


def _without_calls(content: list[Any]) -> tuple[Any, list[Any]]:
    """Contents without Anthropic's parts that call tools, and these calls."""
    kinds = _kinds(content)
    if "tool_use" not in kinds:
        return content, []
    pairs = list(zip(content, kinds, strict=True))
    used = [part for part, kind in pairs if kind == "tool_use"]
    calls = [{"name": part.get("name"), "arguments": part.get("input") or {}} for part in used]
    return [part for part, kind in pairs if kind != "tool_use"], calls


def read_calls(value: Any) -> list[Message]:
    """Calls of tools that stand in the place of an answer, as objects or as JSON; [] if it is something else."""
    parsed = _parsed(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    told = [parsed] if isinstance(parsed, dict) else parsed
    if not isinstance(told, list) or not told:
        return []
    whole = all(isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in told)
    return _calls(told) if whole else []


def _told_calls(content: Any) -> tuple[Any, list[Message]]:
    """The calls that a function_call's content tells; the content itself if it tells none."""
    value = _parsed(content) if isinstance(content, str) else content
    told = [value] if isinstance(value, dict) else value
    if (
        not isinstance(told, list)
        or not told
        or not all(isinstance(call, dict) and "name" in call for call in told)
    ):
        return content, []
    return None, _calls(told)


def _calls(value: Any) -> list[Message]:
    """Tool calls as templates take them: a type, and a function with a name and a dict of arguments."""
    calls = []
    for call in as_list([value] if isinstance(value, dict) else value, "tool calls"):
        if not isinstance(call, dict):
            raise Fault(f"a tool call is {type(call).__name__}, not an object")
        inner = call.get("function")
        if isinstance(inner, dict):
            call = {key: part for key, part in call.items() if part is not None}
        else:
            inner, call = call, {}
        name = inner.get("name")
        if not isinstance(name, str):
            raise Fault("a tool call without a name")
        arguments = inner.get("arguments", inner.get("parameters"))
        if isinstance(arguments, str):
            parsed = _parsed(arguments) if arguments.strip() else {}
            arguments = parsed if isinstance(parsed, dict) else arguments
        function = {"name": name, "arguments": {} if arguments is None else arguments}
        calls.append({"type": "function", **call, "function": function})
    return calls


def _literal(text: str) -> Any:
    """What a string says as Python writes it, which is how lists get into CSV files; None if it is nothing."""
    if not text.lstrip().startswith("[{'"):
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _parsed(text: str) -> Any:
    """What a string says as JSON; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
