"""Find the assistant's turns in a rendered conversation, whatever its chat template does.

A turn's place follows from renderings that differ in nothing but the turn, compared as texts:

1. it begins where the rendering of all before it ends, generation prompt included (of a template that writes none,
   after the header that stands before any answer put there);
2. it ends where the rendering up to and through it ends;
3. where a template renders earlier turns differently (a reasoning model's, which keeps the thinking in the last
   turn only), 1 and 2 do not begin the whole rendering. A word that occurs nowhere else is then put in the answer's
   place: what stands around that word stands around the answer, and the end-of-turn token is what followed the word
   when it was the last turn.

Each step must agree with the whole rendering to the letter; a turn that none places is not labelled. Templates with
``{% generation %}`` marks say themselves what is the assistant's: the marks are rendered into the text and read there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from tinyonn.base.turns import fold_system, mapped, merge_turns, strings

if TYPE_CHECKING:
    from tinyonn.base.rows import Message

Span = tuple[int, int]

FOLDED = "the chat template refuses system messages; they are folded into the user's turns"
MERGED = "the chat template wants roles to alternate; successive turns of one role are merged"
REWRITTEN = "the chat template renders earlier answers differently; they are labelled as the whole shows them"
MARKS = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class Chat:
    """A conversation as its template renders it.

    Parameters
    ----------
    messages : sequence of Message
    tokenizer : transformers.PreTrainedTokenizerBase
    tools : sequence, optional
        Schemas of functions, handed to the template.
    special : re.Pattern, optional
        Matches the tokenizer's special tokens.

    Attributes
    ----------
    text : str
        The whole rendering.
    messages : list of Message
        As rendered: system messages folded and turns merged where the template insists.
    notes : list of str
        What was done to the conversation so that the template takes it.

    Raises
    ------
    Exception
        The template refuses the messages; whatever it raises, jinja2's TemplateError first of all.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        tokenizer: Any,
        tools: Sequence[Any] | None = None,
        special: re.Pattern[str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._tools = list(tools) if tools else None
        self._special = special
        self.messages, self.text, self.notes = self._accepted(list(messages))

    def answers(self, reach: int | None = None) -> tuple[list[Span], int]:
        """Find the assistant's turns.

        Parameters
        ----------
        reach : int, optional
            Turns that begin at this character or later are not looked for.

        Returns
        -------
        list of (int, int)
            Ranges of `text`, ascending.
        int
            How many turns could not be placed.
        """
        marked = self._marked()
        return (marked, 0) if marked is not None else self._turns(len(self.text) if reach is None else reach)

    def inserted(self) -> set[int]:
        """Find the first characters of special tokens in `text` that the messages spell out.

        Empty also where they cannot be told from the template's own.
        """
        pattern = self._special
        if pattern is None or not any(pattern.search(text) for text in strings([self.messages, self._tools])):
            return set()
        wedge = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in self.text)

        def split(match: re.Match[str]) -> str:
            return match[0][:1] + wedge + match[0][1:]

        messages, tools = mapped([self.messages, self._tools], lambda text: pattern.sub(split, text))
        try:
            text = self._render(messages, tools=tools)
        except Exception:  # whatever a template raises
            return set()
        pieces = text.split(wedge)
        if "".join(pieces) != self.text:
            return set()
        places: set[int] = set()
        end = 0
        for piece in pieces[:-1]:
            end += len(piece)
            places.add(end - 1)
        return places

    def _accepted(self, messages: list[Message]) -> tuple[list[Message], str, list[str]]:
        refusal: Exception | None = None
        for folded in (False, True):
            for merged in (False, True):
                changed = fold_system(messages) if folded else messages
                changed = merge_turns(changed) if merged else changed
                notes = [FOLDED] * folded + [MERGED] * merged
                try:
                    return changed, self._render(changed), notes
                except Exception as error:  # whatever a template raises
                    refusal = refusal or error
        assert refusal is not None
        raise refusal

    def _render(self, messages: list[Message], prompt: bool = False, **options: Any) -> str:
        options = {"tools": self._tools, **options}
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, **options
        )
        return str(rendered)

    def _try(self, messages: list[Message], prompt: bool = False) -> str | None:
        if not messages:
            return ""
        try:
            return self._render(messages, prompt)
        except Exception:  # a template may refuse a part of what it takes as a whole
            return None

    def _marked(self) -> list[Span] | None:
        """Read the template's own marks; None where it has none, or they change what is rendered."""
        template = self._tokenizer.get_chat_template(None, self._tools)
        if not MARKS.search(template):
            return None
        first, last = self._absent(), self._absent(1)

        def visible(match: re.Match[str]) -> str:
            # Blocks stay blocks at both ends, so that white space around them is trimmed as before.
            left, end, right = match.groups()
            if end:
                return "{%" + left + " endif %}{{ '" + last + "' }}{% endif " + right + "%}"
            return "{%" + left + " if true %}{{ '" + first + "' }}{% if true " + right + "%}"

        try:
            text = self._render(self.messages, chat_template=MARKS.sub(visible, template))
        except Exception:  # marks in a place where no other block may stand
            return None
        pieces = re.split(f"({first}|{last})", text)
        if "".join(pieces[::2]) != self.text or pieces[1::2] != [first, last] * (len(pieces) // 4):
            return None
        spans: list[Span] = []
        place = 0
        for number, piece in enumerate(pieces[::2]):
            if number % 2:
                spans.append((place, place + len(piece)))
            place += len(piece)
        return spans

    def _turns(self, reach: int) -> tuple[list[Span], int]:
        spans: list[Span] = []
        lost = end = 0
        rewritten = False
        for turn, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            start = self._start(turn)
            if start is not None and start >= reach:
                break
            through = self._try(self.messages[: turn + 1])
            if start is not None and through is not None and self.text.startswith(through):
                span: Span | None = (start, len(through))
            else:
                span = self._around(turn, start)
                rewritten = rewritten or span is not None
            if span is None or not end <= span[0] <= span[1]:
                lost += 1
                continue
            spans.append(span)
            end = span[1]
        if rewritten:
            self.notes.append(REWRITTEN)
        return spans, lost

    def _start(self, turn: int) -> int | None:
        before = self.messages[:turn]
        bare = self._try(before)
        prompted = self._try(before, prompt=True) if turn else None
        if prompted is not None and prompted != bare and self.text.startswith(prompted):
            return len(prompted.rstrip(" "))  # a blank there goes with the answer's first word
        if bare is None or not self.text.startswith(bare):
            return None
        word = self._absent()
        answered = self._try([*before, {"role": "assistant", "content": word}])
        if answered is None or answered.count(word) != 1 or not answered.startswith(bare):
            return None
        header = answered[: answered.index(word)].rstrip(" ")
        header = header if len(header) > len(bare) else bare
        return len(header) if self.text.startswith(header) else None

    def _around(self, turn: int, start: int | None) -> Span | None:
        """Place a turn by what stands around a word in its place: a plain answer, or its contents alone."""
        message, word = self.messages[turn], self._absent()
        plain = {"role": "assistant", "content": word}
        # Thinking before a word in the contents' place is part of the turn, whose start must then be known.
        for answer in [plain] if start is None else [plain, {**message, "content": word}]:
            through = self._try([*self.messages[:turn], answer])
            whole = self._try([*self.messages[:turn], answer, *self.messages[turn + 1 :]])
            if through is None or whole is None or not through.count(word) == whole.count(word) == 1:
                continue
            before, _, after = whole.partition(word)
            ending = through.partition(word)[2]
            if not after.startswith(ending):  # some templates end the text once more where nothing follows
                question = {"role": "user", "content": self._absent(1)}
                followed = self._try([*self.messages[:turn], answer, question]) or ""
                ending = _common(ending, followed.partition(word)[2])
            stop = len(self.text) - len(after)
            first = len(before.rstrip(" ")) if start is None else start
            agrees = self.text.startswith(before) or (
                start is None and self.text.startswith(before.rstrip(" "))
            )
            if agrees and self.text.endswith(after) and after.startswith(ending) and first <= stop:
                return first, stop + len(ending)
        return None

    def _absent(self, skip: int = 0) -> str:
        """Make a word that occurs neither in the text nor in what the template leaves out of it."""
        known = [self.text, *strings([self.messages, self._tools])]
        words = (f"qz{number}zq" for number in count())
        free = (word for word in words if not any(word in text for text in known))
        return next(islice(free, skip, None))


def _common(text: str, other: str) -> str:
    pairs = enumerate(zip(text, other, strict=False))
    return text[
        : next((place for place, (left, right) in pairs if left != right), min(len(text), len(other)))
    ]
