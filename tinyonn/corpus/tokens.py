"""Turn rows into token ids and labels.

A text is labelled whole. Of messages only the assistant's turns are: contents, calls of tools, the reasoning that the
template shows, and the end-of-turn token; `tinyonn.corpus.spans` finds them. A token is labelled that lies in a turn.

Special tokens that messages and texts spell out stay text (`Specials`): ``<|im_start|>assistant`` that a user typed
must neither begin a turn nor be labelled, and ``<|endoftext|>`` in a document on tokenizers ends nothing. Only what a
chat template itself writes is special. The rest is encoded between the template's own tokens with special tokens
switched off, where that gives the same tokens as one encoding of the whole (but for what is spelt out); some
tokenizers put a blank before a text, so that a few ways are tried, and where none is left, a blank is put into them.
Only of texts that are said to be rendered conversations are they read as what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyonn.corpus.spans import Chat, LeftOut, Span, special_pattern
from tinyonn.corpus.turns import mapped
from tinyonn.errors import InputError, first_line

if TYPE_CHECKING:
    from tinyonn.corpus.rows import Message, Row

Int32 = np.ndarray[Any, np.dtype[np.int32]]
UNLABELLED = -100
PROMPT_TOKENS = 64  # of a text from which experts are chosen
BATCH = 64
CHARACTERS = 16  # of a token, to begin with: only so much of a text is encoded, and more if that falls short
MARGIN = 64  # tokens before a cut that may depend on what was cut off
TYPED = "special tokens that the text spells out are read as text"
PARTED = "special tokens that the row spells out have a blank put into them"
UNTOLD = "it spells out special tokens, which cannot be kept apart from the tokenizer's own"
REWRITES = "the chat template renders earlier turns differently"
# Beside those that a tokenizer calls special: added ones in a chat template that look like the marks of turns.
MARK = re.compile(r"<[|｜].+[|｜]>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]", re.DOTALL)
BEGINNINGS = (
    "",
    "\n",
    ".",
    "\t",
)  # before a part that begins within the text: what keeps blanks from being added


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
        return _Labelled(fault=f"the chat template refuses the messages ({first_line(error, 200)})")
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


def prompt_length(labels_T: Int32, limit: int) -> int:
    """How many of a sample's first tokens are its prompt.

    Parameters
    ----------
    labels_T : int [T]
        -100 where a token is not labelled.
    limit : int
        Most tokens of the prompt of a text.

    Returns
    -------
    int
        Tokens before the first labelled one if the sample begins unlabelled (a chat), else ``min(limit, T // 2)``.
    """
    labelled = labels_T != UNLABELLED
    if labelled[0]:
        return min(limit, len(labels_T) // 2)
    return int(labelled.argmax()) if labelled.any() else len(labels_T)


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text and the characters [first, last) that each stands for."""

    ids: list[int]
    places: list[Span]


class Specials:
    """The special tokens of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        template = template if isinstance(template, str) else str(template or "")
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.content}
        marks = {
            number: token
            for number, token in added.items()
            if token.special or (MARK.fullmatch(token.content) and token.content in template)
        }
        self._tokens = {token.content: token for token in marks.values()}
        self._numbers = {token.content: number for number, token in marks.items()}
        self.words = tuple(self._tokens)
        unknown = tokenizer.unk_token
        ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
        harmless = {self._numbers.get(unknown)} if unknown not in ends else set()
        self._counted = (
            frozenset(self._numbers.values()) - harmless
        )  # what only the text's own marks may give

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Match any of them; nothing where there are none."""
        return special_pattern(self.words) if self.words else re.compile(r"(?!)")

    def spelt(self, text: str, end: int | None = None) -> bool:
        """Whether a text spells one out before a character."""
        return self.pattern.search(text, 0, len(text) if end is None else end) is not None

    def count(self, ids: Sequence[int]) -> int:
        """How many of the tokens are special."""
        return sum(map(self._counted.__contains__, ids))

    def parted(self, text: str) -> str:
        """A text with a blank in each special token that it spells out."""
        return self.pattern.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)

    def tokens(self, text: str, **options: Any) -> Tokens:
        """Encode a text as the tokenizer does."""
        found = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options
        )
        return Tokens(found["input_ids"], found["offset_mapping"])

    def as_text(self, text: str, inserted: set[int], whole: Tokens) -> Tokens | None:
        """Encode what is spelt out as text.

        Parameters
        ----------
        text : str
        inserted : set of int
            First characters of special tokens that are no marks of the text's own.
        whole : Tokens
            Of the text in one.

        Returns
        -------
        Tokens or None
            None where other tokens would change, or one of them would be special all the same.
        """
        parts, own = self._parts(text, inserted)
        for beginning in BEGINNINGS:
            again = self._joined(parts, beginning, split=False)
            if again is None or again.ids != whole.ids:
                continue
            found = self._joined(parts, beginning, split=True)
            return found if found is not None and self.count(found.ids) <= own else None
        return None

    def marks(self, text: str, inserted: set[int]) -> int:
        """How many special tokens are the text's own."""
        return sum(match.start() not in inserted for match in self.pattern.finditer(text))

    def _parts(self, text: str, inserted: set[int]) -> tuple[list[tuple[int, str, bool]], int]:
        """Where each part begins, the part, and whether it is text between marks; and how many marks there are."""
        parts: list[tuple[int, str, bool]] = []
        end = own = 0
        for match in self.pattern.finditer(text):
            if match.start() in inserted:
                continue
            start, stop, token = match.start(), match.end(), self._tokens[match[0]]
            if token.lstrip:  # such a token takes the blanks beside it along
                start = end + len(text[end:start].rstrip())
            if token.rstrip:
                stop += len(text[stop:]) - len(text[stop:].lstrip())
            parts += [(end, text[end:start], True), (start, text[start:stop], False)]
            end, own = stop, own + 1
        parts.append((end, text[end:], True))
        return [part for part in parts if part[1]], own

    def _joined(self, parts: Sequence[tuple[int, str, bool]], beginning: str, split: bool) -> Tokens | None:
        ids: list[int] = []
        places: list[Span] = []
        for start, part, between in parts:
            before = beginning if between and start else ""
            found = self.tokens(before + part, split_special_tokens=split and between)
            skipped = 0
            if before:
                while skipped < len(found.ids) and found.places[skipped][1] <= len(before):
                    skipped += 1
                if skipped < len(found.ids) and found.places[skipped][0] < len(before):
                    return None  # a token of both
            ids += found.ids[skipped:]
            shift = start - len(before)
            places += [(shift + first, shift + last) for first, last in found.places[skipped:]]
        return Tokens(ids, places)
