"""The tokens at which a chat model stops: those that end the assistant's turn in its tokenizer's chat template.

A base's ``generation_config.json`` often names the end of a text alone, and a chat model then talks on as the user. The
template says better: an answer that is a word found nowhere else is rendered, and what stands behind that word ends it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORD = "Zyxwvutsrqponm"
QUESTION = {"role": "user", "content": "a question"}
ANSWER = {"role": "assistant", "content": WORD}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "a1b2c3d4e", "function": {"name": "f", "arguments": {"x": WORD}}}
    ],
}
GENERATION = "generation_config.json"


def turn_ends(tokenizer: Any) -> list[int]:
    """The tokens that end an assistant's turn; none of a template that ends turns with text, or of no template.

    That is the special token right behind an answer, and the last one behind a call of a function, if none of those
    that end a text or an answer stands there too.
    """
    if not tokenizer.chat_template:
        return []
    ends: list[int] = []
    tail = _behind(tokenizer, ANSWER)
    for place, number in _special(tokenizer, tail):
        if not tail[:place].strip():
            ends.append(number)
        break
    calling = [number for _, number in _special(tokenizer, _behind(tokenizer, CALL))]
    if calling and not {*ends, tokenizer.eos_token_id}.intersection(calling):
        ends.append(calling[-1])
    return ends


def _behind(tokenizer: Any, answer: dict[str, Any]) -> str:
    """What stands behind the word in a conversation that ends with it; nothing if the template refuses it."""
    for messages in ([QUESTION, answer], [{"role": "system", "content": "a system"}, QUESTION, answer]):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # whatever a template raises
            continue
        if WORD in text:
            return str(text).rpartition(WORD)[2]
    return ""


def _special(tokenizer: Any, text: str) -> Iterator[tuple[int, int]]:
    """Places and numbers of the special tokens in a text, ascending."""
    known = {
        token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    known |= {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    place = 0
    while place < len(text):
        found = max((token for token in known if text.startswith(token, place)), key=len, default="")
        if found:
            yield place, known[found]
        place += max(1, len(found))


def with_turn_ends(eos: int | list[int] | None, tokenizer: Any) -> int | list[int] | None:
    """End tokens as ``generation_config.json`` has them, and those of the chat template; `eos` if none is missing."""
    known = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    missing = [number for number in turn_ends(tokenizer) if number not in known]
    if not missing:
        return eos
    joined = [*known, *missing]
    return joined[0] if len(joined) == 1 else joined


def stop_at_turns(folder: Path) -> None:
    """Write the end tokens of a folder's chat template into its ``generation_config.json``."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception:  # a folder without a tokenizer, or one of other code
        return
    path = folder / GENERATION
    tree = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    known = tree.get("eos_token_id", _configured(folder))
    eos = with_turn_ends(known, tokenizer)
    if eos != tree.get("eos_token_id"):
        path.write_text(json.dumps({**tree, "eos_token_id": eos}, indent=2) + "\n", "utf-8")


def _configured(folder: Path) -> int | list[int] | None:
    tree = json.loads((folder / "config.json").read_text("utf-8"))
    eos: int | list[int] | None = (tree.get("base_config") or tree).get("eos_token_id")
    return eos
