"""Special tokens that a text spells out, and how it is encoded so that they stay text.

``<|im_start|>assistant`` that a user typed must neither begin a turn nor be labelled, and ``<|endoftext|>`` in a
document on tokenizers ends nothing. Only what a chat template itself writes is special. The rest is encoded between
the template's own tokens with special tokens switched off, where that gives the same tokens as one encoding of the
whole (but for what is spelt out); some tokenizers put a blank before a text, so that a few ways are tried.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tinyonn.corpus.spans import Span, special_pattern

# Beside those that a tokenizer calls special: added ones in a chat template that look like the marks of turns.
MARK = re.compile(r"<[|｜].+[|｜]>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]", re.DOTALL)
BEGINNINGS = (
    "",
    "\n",
    ".",
    "\t",
)  # before a part that begins within the text: what keeps blanks from being added


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text and the characters [first, last) that each stands for."""

    ids: list[int]
    places: list[Span]


class Specials:
    """The special tokens of a tokenizer.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase

    Attributes
    ----------
    words : tuple of str
        As they are written.
    """

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
