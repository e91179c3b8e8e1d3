"""A chat model stops where its template ends the assistant's turn."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from tests.corpus.templates import KINDS, tokenizer_of
from tinyonn.experts.ending import turn_ends, with_turn_ends
from tinyonn.reference import model_path

CHATML = ["<|im_end|>"]
WANTED = {
    "chatml": CHATML,
    "chatml, marked": CHATML,
    "chatml, marked and stripped": CHATML,
    "marks without an end": [],
    "chatml without a prompt": CHATML,
    "llama 2": ["</s>"],
    "llama 3": ["<|eot_id|>"],
    "mistral": ["</s>"],
    "mistral, tools": ["</s>"],
    "gemma": ["<end_of_turn>"],
    "phi 3": ["<|end|>"],
    "qwen3": CHATML,
    "zephyr": ["<|endoftext|>"],
    "vicuna": ["</s>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "command r": ["<|END_OF_TURN_TOKEN|>"],
    "plain": [],
    "counts its messages": CHATML,
}
CALLS = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{% if m.tool_calls %}"
    "<s>{{ m.tool_calls[0].function | tojson }}</s><|end|>{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_behind_an_answer(kind: str) -> None:
    tokenizer = tokenizer_of(KINDS[kind].template)
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == WANTED[kind]
    eos = tokenizer.eos_token_id
    joined = with_turn_ends(eos, tokenizer)
    others = [one for one in turn_ends(tokenizer) if one != eos]
    assert joined == ([eos, *others] if others else eos)
    assert with_turn_ends(joined, tokenizer) == joined


def test_calls_may_end_otherwise() -> None:
    tokenizer = tokenizer_of(CALLS)
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == ["<|eot_id|>", "<|end|>"]
    tokenizer.chat_template = None
    assert turn_ends(tokenizer) == []


def test_the_shipped_model_stops_there_already() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    assert turn_ends(tokenizer) == [2]
    assert with_turn_ends([0, 2], tokenizer) == [0, 2]
