"""Turn rows into token ids and labels.

A text is labelled whole. Of messages only the assistant's turns are: contents, calls of tools, the reasoning that the
template shows, and the end-of-turn token; `tinyonn.base.spans` finds them. A token is labelled that lies in a turn.

Special tokens that the messages spell out (``<|im_start|>`` typed by a user) are encoded as plain text wherever the
tokenizer gives the same tokens for the parts between the template's own special tokens as for the whole; elsewhere,
and in plain texts, whose author may have written the markup that a template would, they are special, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyonn.base.spans import Chat, LeftOut, Span, special_pattern
from tinyonn.errors import InputError

if TYPE_CHECKING:
    from tinyonn.base.rows import Row

Int32 = np.ndarray[Any, np.dtype[np.int32]]
UNLABELLED = -100
BATCH = 64
CHARACTERS = 16  # of a token, to begin with: only so much of a text is encoded, and more if that falls short
MARGIN = 64  # tokens before a cut that may depend on what was cut off
TYPED = "special tokens that the text spells out are read as such"
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


def encode_rows(rows: Iterable[Row], tokenizer: Any, max_tokens: int) -> Iterator[Encoded]:
    """Tokenise rows without a fault, in order.

    Raises
    ------
    InputError
        There are messages, and the tokenizer has no chat template or cannot tell where its tokens lie.
    """
    stream = iter(rows)
    while group := list(islice(stream, BATCH)):
        texts = iter(_encode_texts([row for row in group if row.text is not None], tokenizer, max_tokens))
        chats = iter(_encode_chats([row for row in group if row.text is None], tokenizer, max_tokens))
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


def _encode_texts(rows: list[Row], tokenizer: Any, max_tokens: int) -> Iterator[_Labelled]:
    if not rows:
        return
    limit = (max_tokens + MARGIN) * CHARACTERS
    texts = [str(row.text) for row in rows]
    encoded = tokenizer([text[:limit] for text in texts], verbose=False)["input_ids"]
    special = _special(tokenizer)
    pattern = special_pattern(special) if special else None
    for text, ids in zip(texts, encoded, strict=True):
        size = limit
        while size < len(text) and len(ids) <= max_tokens + MARGIN:
            size *= 2
            ids = tokenizer(text[:size], verbose=False)["input_ids"]
        begin = tokenizer.bos_token
        if begin and text.startswith(begin) and ids[:2] == [tokenizer.bos_token_id] * 2:
            ids = ids[1:]  # the text brings its own
        typed = pattern is not None and pattern.search(text, 0, size) is not None
        yield _Labelled(ids, list(ids), notes=(TYPED,) * typed)


def _encode_chats(rows: list[Row], tokenizer: Any, max_tokens: int) -> Iterator[_Labelled]:
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
    special = _special(tokenizer)
    for row in rows:
        try:
            chat = Chat(row.messages or (), tokenizer, row.tools, special)
        except LeftOut as left:
            yield _Labelled(fault=f"the chat template leaves out {left}")
        except Exception as error:  # whatever a template raises, jinja2's TemplateError first of all
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            yield _Labelled(fault=f"the chat template refuses the messages ({reason})")
        else:
            yield _labelled(chat, tokenizer, special, max_tokens)


@dataclass(frozen=True)
class _Tokens:
    """Tokens of a text and the characters [first, last) that each stands for."""

    ids: list[int]
    places: list[Span]


def _labelled(chat: Chat, tokenizer: Any, special: list[str], max_tokens: int) -> _Labelled:
    inserted = chat.inserted
    size = (max_tokens + MARGIN) * CHARACTERS
    while True:
        text = chat.text[:size]
        tokens = _tokens(text, tokenizer)
        if len(text) == len(chat.text) or len(tokens.ids) > max_tokens + MARGIN:
            break
        size *= 2
    typed = inserted is None
    if inserted:
        plain = _as_text(text, tokenizer, special_pattern(special), inserted, tokens)
        typed, tokens = plain is None, plain or tokens
    reach = max((last for _, last in tokens.places[:max_tokens]), default=0)
    spans, lost = chat.answers(reach)
    if lost and not spans:
        return _Labelled(fault=REWRITES)
    notes = [*chat.notes, *[TYPED] * typed]
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


def _tokens(text: str, tokenizer: Any, **options: Any) -> _Tokens:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options)
    return _Tokens(found["input_ids"], found["offset_mapping"])


def _special(tokenizer: Any) -> list[str]:
    return [
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content
    ]


def _as_text(
    text: str, tokenizer: Any, special: re.Pattern[str], inserted: set[int], whole: _Tokens
) -> _Tokens | None:
    """Encode the special tokens that messages spell out as text; None where that changes other tokens."""
    parts: list[tuple[int, str, bool]] = []
    end = 0
    for match in special.finditer(text):
        if match.start() not in inserted:
            parts += [(end, text[end : match.start()], True), (match.start(), match[0], False)]
            end = match.end()
    parts.append((end, text[end:], True))

    def joined(split: bool) -> _Tokens:
        ids: list[int] = []
        places: list[Span] = []
        for start, part, ours in parts:
            found = _tokens(part, tokenizer, split_special_tokens=split and ours)
            ids += found.ids
            places += [(start + first, start + last) for first, last in found.places]
        return _Tokens(ids, places)

    plain = joined(True)
    return plain if joined(False).ids == whole.ids else None
