"""Turn rows into token ids and labels.

A text is labelled whole. Of messages only the assistant's turns are: by the template's ``{% generation %}``
marks where it has them, else by rendering the conversation up to and through each assistant's turn; what the
second rendering adds to the first is the turn. That works only where a rendering begins with the rendering of
its beginning, which is checked for every row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyonn.errors import InputError

if TYPE_CHECKING:
    from tinyonn.base.rows import Message, Row

Int32 = np.ndarray[Any, np.dtype[np.int32]]
UNLABELLED = -100
BATCH = 64
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
    """

    index: int
    input_ids: Int32
    labels: Int32
    truncated: bool = False
    fault: str | None = None


def encode_rows(rows: Iterable[Row], tokenizer: Any, max_tokens: int) -> Iterator[Encoded]:
    """Tokenise rows without a fault, in order.

    Raises
    ------
    InputError
        There are messages, and the tokenizer has no chat template or cannot tell where its tokens lie.
    """
    stream = iter(rows)
    while group := list(islice(stream, BATCH)):
        texts = iter(_encode_texts([row for row in group if row.text is not None], tokenizer))
        chats = iter(_encode_chats([row for row in group if row.text is None], tokenizer))
        for row in group:
            ids, labels, fault = next(texts if row.text is not None else chats)
            yield _checked(row.index, ids[:max_tokens], labels[:max_tokens], len(ids) > max_tokens, fault)


def _checked(index: int, ids: list[int], labels: list[int], truncated: bool, fault: str | None) -> Encoded:
    if fault is None and len(ids) < 2:
        fault = f"{len(ids)} token(s), at least 2 are needed"
    elif fault is None and all(label == UNLABELLED for label in labels[1:]):
        where = f" in its first {len(ids)} tokens" if truncated else ""
        fault = f"no labelled token{where}: the assistant says nothing"
    if fault is not None:
        ids, labels = [], []
    return Encoded(index, np.array(ids, np.int32), np.array(labels, np.int32), truncated, fault)


_Labelled = tuple[list[int], list[int], str | None]


def _encode_texts(rows: list[Row], tokenizer: Any) -> Iterator[_Labelled]:
    if not rows:
        return
    for ids in tokenizer([row.text for row in rows], verbose=False)["input_ids"]:
        yield ids, list(ids), None


def _encode_chats(rows: list[Row], tokenizer: Any) -> Iterator[_Labelled]:
    if not rows:
        return
    template = tokenizer.chat_template
    if not template:
        raise InputError(
            "the corpus has messages and the model's tokenizer has no chat template; choose a chat model, "
            "add a chat_template.jinja beside its tokenizer, or name a column of plain text in data.text"
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not tell where its tokens lie in the text, so the assistant's "
            "turns cannot be labelled; save a fast tokenizer (tokenizer.json) beside the model"
        )
    marked = isinstance(template, str) and "{% generation" in template.replace("{%-", "{%")
    for row in rows:
        messages = list(row.messages or ())
        try:
            yield _marked(messages, tokenizer) if marked else _rendered(messages, tokenizer)
        except InputError:
            raise
        except Exception as error:  # whatever a template raises, jinja2's TemplateError first of all
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            yield [], [], f"the chat template refuses the messages ({reason})"


def _marked(messages: list[Message], tokenizer: Any) -> _Labelled:
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token if said else UNLABELLED for token, said in zip(ids, mask, strict=True)], None


def _rendered(messages: list[Message], tokenizer: Any) -> _Labelled:
    whole = _render(messages, tokenizer)
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:turn], tokenizer, prompt=True) if turn else ""
        through = _render(messages[: turn + 1], tokenizer)
        if not (whole.startswith(before) and whole.startswith(through) and len(through) > len(before)):
            return [], [], REWRITES
        spans.append((len(before), len(through)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    labels = [UNLABELLED] * len(ids)
    span = 0
    for place, (first, last) in enumerate(encoded["offset_mapping"]):
        while span < len(spans) and first >= spans[span][1]:
            span += 1
        # Some tokenizers trim white space off the offsets: a blank of the prompt then lies at (start, start).
        if span < len(spans) and first >= spans[span][0] and (last > first or first > spans[span][0]):
            labels[place] = ids[place]
    return ids, labels, None


def _render(messages: list[Message], tokenizer: Any, prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
