"""Turn rows into token ids and labels.

A text is labelled whole. Of messages only the assistant's turns are: contents, calls of tools, the reasoning that the
template shows, and the end-of-turn token; `tinyonn.corpus.spans` finds them. A token is labelled that lies in a turn.

Special tokens that messages and texts spell out (``<|im_start|>`` typed by a user) stay text
(`tinyonn.corpus.specials`); where a tokenizer or a template allows no other way, a blank is put into them. Only of
texts that are said to be rendered conversations are they read as what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyonn.corpus.spans import Chat, LeftOut, Span
from tinyonn.corpus.specials import Specials
from tinyonn.corpus.turns import mapped
from tinyonn.errors import InputError

if TYPE_CHECKING:
    from tinyonn.corpus.rows import Message, Row

Int32 = np.ndarray[Any, np.dtype[np.int32]]
UNLABELLED = -100
BATCH = 64
CHARACTERS = 16  # of a token, to begin with: only so much of a text is encoded, and more if that falls short
MARGIN = 64  # tokens before a cut that may depend on what was cut off
TYPED = "special tokens that the text spells out are read as text"
PARTED = "special tokens that the row spells out have a blank put into them"
UNTOLD = "it spells out special tokens, which cannot be kept apart from the tokenizer's own"
REWRITES = "the chat template renders earlier turns differently"


@dataclass(frozen=True)
class Encoded:
    """A row as tokens.

    Attributes
    ----------
    index : int
        Row of the source.
    input_ids, labels : int32 [T]
        -100 where a token is not labelled.
    truncated : bool
        Cut to the allowed length.
    fault : str or None
        Why the row is set aside; the arrays are empty then.
    note : str or None
        What was done so that the row could be used.
    """

    index: int
    input_ids: Int32
    labels: Int32
    truncated: bool = False
    fault: str | None = None
    note: str | None = None


def encode_rows(
    rows: Iterable[Row], tokenizer: Any, max_tokens: int, rendered: bool = False
) -> Iterator[Encoded]:
    """Tokenise rows without a fault, in order; special tokens in texts count if these are `rendered`.

    Raises
    ------
    InputError
        There are messages, and the tokenizer has no chat template or cannot tell where its tokens lie.
    """
    stream, special = iter(rows), Specials(tokenizer)
    while group := list(islice(stream, BATCH)):
        told = [row for row in group if row.text is not None]
        said = [row for row in group if row.text is None]
        texts = iter(_encode_texts(told, tokenizer, special, max_tokens, rendered))
        chats = iter(_encode_chats(said, tokenizer, special, max_tokens))
        for row in group:
            yield _checked(row.index, next(texts if row.text is not None else chats), max_tokens)


@dataclass(frozen=True)
class _Labelled:
    """Tokens and labels of a row, at least one more than allowed if there are more."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    fault: str | None = None
    notes: tuple[str, ...] = ()


def _checked(index: int, found: _Labelled, max_tokens: int) -> Encoded:
    truncated = len(found.ids) > max_tokens
    ids, labels, fault = found.ids[:max_tokens], found.labels[:max_tokens], found.fault
    if fault is None and len(ids) < 2:
        fault = f"{len(ids)} token(s), at least 2 are needed"
    elif fault is None and all(label == UNLABELLED for label in labels[1:]):
        where = f" in its first {len(ids)} tokens" if truncated else ""
        fault = f"no labelled token{where}: the assistant says nothing"
    if fault is not None:
        ids, labels = [], []
    note = "; ".join(found.notes) or None if fault is None else None
    return Encoded(index, np.array(ids, np.int32), np.array(labels, np.int32), truncated, fault, note)


def _encode_texts(
    rows: list[Row], tokenizer: Any, special: Specials, max_tokens: int, rendered: bool
) -> Iterator[_Labelled]:
    if not rows:
        return
    limit = (max_tokens + MARGIN) * CHARACTERS
    texts = [str(row.text) for row in rows]
    encoded = tokenizer([text[:limit] for text in texts], verbose=False)["input_ids"]
    begin = tokenizer.bos_token
    for text, ids in zip(texts, encoded, strict=True):
        reading = _Reading(tokenizer, max_tokens)
        if begin and text.startswith(begin) and ids[:2] == [tokenizer.bos_token_id] * 2:
            text = text.removeprefix(begin)  # it brings its own
            ids = reading.ids(text)
        else:
            ids = reading.ids(text, ids)
        spelt = special.spelt(text, reading.size) or special.count(ids) > reading.around(special)
        yield _Labelled(ids, list(ids)) if rendered or not spelt else _spelt(text, special, reading)


class _Reading:
    """Encodes as much of a text as the allowed tokens take; `size` is how much that was."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self._tokenizer, self._enough = tokenizer, max_tokens + MARGIN
        self.size = self._enough * CHARACTERS

    def ids(self, text: str, ids: list[int] | None = None, **options: Any) -> list[int]:
        """Tokens of a text; `ids` are those of its first `size` characters."""
        while ids is None or (self.size < len(text) and len(ids) <= self._enough):
            self.size *= 1 if ids is None else 2
            ids = self._tokenizer(text[: self.size], verbose=False, **options)["input_ids"]
        return ids

    def around(self, special: Specials) -> int:
        """Special tokens that the tokenizer puts around any text."""
        return special.count(self._tokenizer("", verbose=False)["input_ids"])


def _spelt(text: str, special: Specials, reading: _Reading) -> _Labelled:
    """A text that spells out special tokens, which stay text."""
    around = reading.around(special)
    ids = reading.ids(text, split_special_tokens=True)
    if special.count(ids) <= around:
        return _Labelled(ids, list(ids), notes=(TYPED,))
    ids = reading.ids(special.parted(text))
    if special.count(ids) <= around:
        return _Labelled(ids, list(ids), notes=(PARTED,))
    return _Labelled(fault=UNTOLD)


def _encode_chats(rows: list[Row], tokenizer: Any, special: Specials, max_tokens: int) -> Iterator[_Labelled]:
    if not rows:
        return
    if not tokenizer.chat_template:
        raise InputError(
            "the corpus has messages and the model's tokenizer has no chat template; choose a chat model, "
            "add a chat_template.jinja beside its tokenizer, or name a column of plain text in data.text"
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not tell where its tokens lie in the text, so the assistant's "
            "turns cannot be labelled; save a fast tokenizer (tokenizer.json) beside the model"
        )
    for row in rows:
        messages, tools = list(row.messages or ()), row.tools
        found = _encode_chat(messages, tools, tokenizer, special, max_tokens)
        if found is None:  # what is spelt out cannot be told from the template's own
            messages, tools = mapped([messages, tools], special.parted)
            found = _encode_chat(messages, tools, tokenizer, special, max_tokens)
            found = None if found is None else replace(found, notes=(*found.notes, PARTED))
        yield found or _Labelled(fault=UNTOLD)


def _encode_chat(
    messages: Sequence[Message], tools: Any, tokenizer: Any, special: Specials, max_tokens: int
) -> _Labelled | None:
    """A conversation as tokens; None where special tokens that it spells out would be read as such."""
    try:
        chat = Chat(messages, tokenizer, tools, special.words)
    except LeftOut as left:
        return _Labelled(fault=f"the chat template leaves out {left}")
    except Exception as error:  # whatever a template raises, jinja2's TemplateError first of all
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return _Labelled(fault=f"the chat template refuses the messages ({reason})")
    return _labelled(chat, special, max_tokens)


def _labelled(chat: Chat, special: Specials, max_tokens: int) -> _Labelled | None:
    inserted = chat.inserted
    if inserted is None:
        return None
    size = (max_tokens + MARGIN) * CHARACTERS
    while True:
        text = chat.text[:size]
        tokens = special.tokens(text)
        if len(text) == len(chat.text) or len(tokens.ids) > max_tokens + MARGIN:
            break
        size *= 2
    if inserted or special.count(tokens.ids) > special.marks(text, inserted):
        plain = special.as_text(text, inserted, tokens)
        if plain is None:
            return None
        tokens = plain
    reach = max((last for _, last in tokens.places[:max_tokens]), default=0)
    spans, lost = chat.answers(reach)
    if lost and not spans:
        return _Labelled(fault=REWRITES)
    notes = list(chat.notes)
    if lost:
        notes.append(f"{REWRITES}; what cannot be placed is not labelled")
    ids = tokens.ids[: max_tokens + 1]
    return _Labelled(ids, _labels(chat.text, ids, tokens.places, spans), None, tuple(notes))


def _labels(text: str, ids: list[int], places: list[Span], spans: list[Span]) -> list[int]:
    labels = [UNLABELLED] * len(ids)
    span = 0
    for place, (first, last) in enumerate(places[: len(ids)]):
        while span < len(spans) and first >= spans[span][1]:
            span += 1
        if span == len(spans):
            break
        start, end = spans[span]
        # Some tokenizers trim white space off the offsets: a blank of the prompt then lies at (start, start).
        if first < start or first == last == start:
            continue
        if last <= end or text[end:last].isspace():  # a few special tokens take the blanks behind them along
            labels[place] = ids[place]
    return labels
