"""Find the assistant's turns in a rendered conversation, whatever its chat template does.

A turn's place follows from renderings that differ in nothing but the turn, compared as texts:

1. it begins where the rendering of all before it ends, generation prompt included (of a template that writes none,
   after the header that stands before any answer put there);
2. it ends where the rendering up to and through it ends;
3. where a template renders earlier turns differently (a reasoning model's, which keeps the thinking in the last
   turn only), 1 and 2 do not begin the whole rendering. A word that occurs nowhere else is then put in the answer's
   place: what stands around that word stands around the answer, and the end-of-turn token is what followed the word
   when it was the last turn.

Each step must agree with the whole rendering to the letter; a turn that none places is not labelled. Blanks and line
ends behind the special token that ends a turn are the template's. Templates with ``{% generation %}`` marks say
themselves what is the assistant's: the marks are rendered into the text and read there.

What a template leaves out without a word is found in the same way: a word in the place of a system message, of a
tool's name or of what a tool said does not come back in the rendering.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import count, islice, product
from typing import TYPE_CHECKING, Any

from tinyonn.corpus.turns import (
    fold_system,
    is_weightless,
    mapped,
    merge_turns,
    strings,
    write_calls,
    write_tools,
)

if TYPE_CHECKING:
    from tinyonn.corpus.rows import Message

Span = tuple[int, int]

FOLDED = "the chat template refuses system messages; they are folded into the user's turns"
MERGED = "the chat template wants roles to alternate; successive turns of one role are merged"
UNSHOWN = "the chat template leaves out system messages; they are folded into the user's turns"
CALLS_WRITTEN = "the chat template leaves out calls of tools; they are written into the turns as <tool_call>"
CALLS_REFUSED = "the chat template refuses calls of tools; they and the schemas are written into the turns"
TOOLS_WRITTEN = "the chat template leaves out the tools' schemas; they are written into the system message"
WEIGHTLESS = "answers of weight 0 are not labelled"
REWRITTEN = "the chat template renders earlier answers differently; they are labelled as the whole shows them"
MARKS = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class LeftOut(Exception):
    """What of a conversation its template does not show."""


class Chat:
    """A conversation as its template renders it.

    Parameters
    ----------
    messages : sequence of Message
    tokenizer : transformers.PreTrainedTokenizerBase
    tools : sequence, optional
        Schemas of functions, handed to the template.
    special : sequence of str, optional
        The tokenizer's special tokens.

    Attributes
    ----------
    text : str
        The whole rendering.
    messages : list of Message
        As rendered: system messages folded, turns merged and tools written out where the template insists.
    notes : list of str
        What was done to the conversation so that the template takes it.

    Raises
    ------
    LeftOut
        The template does not show a message, and there is no other way to tell it.
    Exception
        The template refuses the messages; whatever it raises, jinja2's TemplateError first of all.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        tokenizer: Any,
        tools: Sequence[Any] | None = None,
        special: Sequence[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._tools = list(tools) if tools else None
        self._special = tuple(special)
        self.messages, self.text, self.notes = self._accepted(list(messages))
        self._show_all()

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
        weightless = [is_weightless(message) for message in self.messages if message["role"] == "assistant"]
        if any(weightless):
            self.notes.append(WEIGHTLESS)
        marked = self._marked()
        if marked is None or (any(weightless) and len(marked) != len(weightless)):
            return self._turns(len(self.text) if reach is None else reach)
        if any(weightless):
            marked = [span for span, out in zip(marked, weightless, strict=True) if not out]
        return marked, 0

    @cached_property
    def inserted(self) -> set[int] | None:
        """First characters of special tokens in `text` that the messages spell out.

        None where they are there and cannot be told from the template's own.
        """
        told = list(strings([self.messages, self._tools]))
        if not any(word in text for text in told for word in self._special):
            return set()
        pattern = special_pattern(self._special)
        wedge = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in self.text)

        def split(match: re.Match[str]) -> str:
            return match[0][:1] + wedge + match[0][1:]

        messages, tools = mapped([self.messages, self._tools], lambda text: pattern.sub(split, text))
        try:
            text = self._render(messages, tools=tools)
        except Exception:  # whatever a template raises
            return None
        pieces = text.split(wedge)
        if "".join(pieces) != self.text:
            return None
        places: set[int] = set()
        end = 0
        for piece in pieces[:-1]:
            end += len(piece)
            places.add(end - 1)
        return places

    def _accepted(self, messages: list[Message]) -> tuple[list[Message], str, list[str]]:
        refusal: Exception | None = None
        calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        tools = self._tools
        for written, folded, merged in product(
            (False, True) if calls else (False,), (False, True), (False, True)
        ):
            changed, self._tools = messages, tools
            if written:
                changed, self._tools = write_calls(messages), None
                changed = write_tools(changed, tools) if tools else changed
            changed = fold_system(changed) if folded else changed
            changed = merge_turns(changed) if merged else changed
            notes = [CALLS_REFUSED] * written + [FOLDED] * folded + [MERGED] * merged
            try:
                return changed, self._render(changed), notes
            except Exception as error:  # whatever a template raises
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def _show_all(self) -> None:
        """Tell in another way what the template leaves out."""
        for _ in range(3):
            shown = self._unshown()
            if not shown:
                return
            systems, calls, tools, others = shown
            messages, notes = self.messages, list(self.notes)
            if calls:
                messages, others = write_calls(messages), {role for role in others if role != "tool"}
                notes.append(CALLS_WRITTEN)
            if tools and self._tools:
                messages, self._tools = write_tools(messages, self._tools), None
                notes.append(TOOLS_WRITTEN)
            elif systems:
                messages = fold_system(messages, systems)
                notes.append(UNSHOWN)
            if others:
                raise LeftOut(f"messages of role {min(others)!r}")
            self.messages, self.text, more = self._accepted(messages)
            self.notes = [*notes, *(note for note in more if note not in notes)]
        if self._unshown():
            raise LeftOut("system messages or tools")

    def _unshown(self) -> tuple[set[int], bool, bool, set[str]] | None:
        """Find what is not rendered: places of system messages, calls, tools, other roles; None if all is.

        One rendering tells, with words in the place of contents and of the names of tools.
        """
        words: dict[str, tuple[str, Any]] = {}
        fresh = (word for word in self._words())
        messages, tools = [], self._tools
        for place, message in enumerate(self.messages):
            changed = dict(message)
            if message["role"] not in ("user", "assistant") and str(message["content"]).strip():
                changed["content"] = next(fresh)
                words[changed["content"]] = (message["role"], place)
            if calls := message.get("tool_calls"):
                names = [next(fresh) for _ in calls]
                words |= dict.fromkeys(names, ("calls", place))
                changed["tool_calls"] = [_named(call, name) for call, name in zip(calls, names, strict=True)]
            messages.append(changed)
        if tools is not None and all(isinstance(tool.get("function"), dict) for tool in tools):
            names = [next(fresh) for _ in tools]
            words |= {name: ("tools", place) for place, name in enumerate(names)}
            tools = [_named(tool, name) for tool, name in zip(tools, names, strict=True)]
        if not words:
            return None
        try:
            text = self._render(messages, tools=tools)
        except Exception:  # a template may read what a tool said, or look a name up
            return None
        lost = {kind: {place for word, (what, place) in words.items() if what == kind and word not in text}
                for kind in {what for what, _ in words.values()}}  # fmt: skip
        for kind in ("calls", "tools"):
            count = len({word for word, (what, _) in words.items() if what == kind and word in text})
            if lost.get(kind) and count:
                raise LeftOut(f"some {'calls of tools' if kind == 'calls' else 'tools'}")
        if not any(lost.values()):
            return None
        others = {kind for kind, places in lost.items() if places} - {"system", "calls", "tools"}
        return lost.get("system", set()), bool(lost.get("calls")), bool(lost.get("tools")), others

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
            if message["role"] != "assistant" or is_weightless(message):
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
            spans.append((span[0], self._trimmed(span)))
            end = span[1]
        if rewritten:
            self.notes.append(REWRITTEN)
        return spans, lost

    def _trimmed(self, span: Span) -> int:
        """Where a turn ends without the blanks behind its end-of-turn token."""
        start, end = span
        for word in self._special:  # what an ending has in common with another may end within a token
            place = self.text.find(word, max(start, end - len(word) + 1), end + len(word) - 1)
            end = place if 0 <= place < end else end
        stop = start + len(self.text[start:end].rstrip())
        if stop == end or not self._special or not self.text.endswith(self._special, start, stop):
            return end
        token = max((word for word in self._special if self.text.endswith(word, start, stop)), key=len)
        return end if stop - len(token) in (self.inserted or ()) else stop

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
        return next(islice(self._words(), skip, None))

    def _words(self) -> Iterator[str]:
        """Make words that occur neither in the text nor in what the template leaves out of it."""
        known = [self.text, *strings([self.messages, self._tools])]
        words = (f"qz{number}zq" for number in count())
        return (word for word in words if not any(word in text for text in known))


def special_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Match any of the words, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))


def _named(tool: dict[str, Any], name: str) -> dict[str, Any]:
    """A tool's schema or a call of it with another name."""
    return {**tool, "function": {**tool["function"], "name": name}}


def _common(text: str, other: str) -> str:
    pairs = enumerate(zip(text, other, strict=False))
    return text[
        : next((place for place, (left, right) in pairs if left != right), min(len(text), len(other)))
    ]
