"""What a template refuses or leaves out is said to it in another way, and told."""

from __future__ import annotations

from typing import Any

import pytest

from tests.corpus.conversations import (
    TOKENIZERS,
    TOOLS,
    answer,
    call,
    encode,
    runs,
    text_of,
    user,
)
from tests.corpus.templates import KINDS, PROMPT, TURN, tokenizer_of
from tinyonn.corpus.spans import (
    CALLS_REFUSED,
    CALLS_WRITTEN,
    FOLDED,
    MERGED,
    REWRITTEN,
    TOOLS_WRITTEN,
    UNSHOWN,
    WEIGHTLESS,
)


def test_system_messages_that_a_template_refuses_are_folded_and_told() -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("Where?"), answer("Peru.")]
    encoded = encode(messages, TOKENIZERS["gemma"])
    labelled, unlabelled = runs(TOKENIZERS["gemma"], encoded)
    assert labelled == ["Peru.<end_of_turn>"]
    assert "<start_of_turn>user\nBe brief.\n\nWhere?<end_of_turn>" in unlabelled[0]
    assert encoded.note == FOLDED
    taken = encode(messages, TOKENIZERS["chatml"])
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text_of(TOKENIZERS["chatml"], taken.input_ids)
    assert taken.note is None


def test_turns_are_merged_only_where_roles_must_alternate() -> None:
    messages = [user("Where?"), user("In Peru?"), answer("Yes."), answer("There.")]
    encoded = encode(messages, TOKENIZERS["mistral"])
    whole = text_of(TOKENIZERS["mistral"], encoded.input_ids)
    assert whole == "<s>[INST] Where?\n\nIn Peru? [/INST]Yes.\n\nThere.</s>"
    assert encoded.note == MERGED
    both = encode([{"role": "system", "content": "Be brief."}, *messages], TOKENIZERS["mistral"])
    assert both.note == f"{FOLDED}; {MERGED}"
    taken = encode(messages, TOKENIZERS["vicuna"])
    assert runs(TOKENIZERS["vicuna"], taken)[0] == [" Yes.</s>", " There.</s>"]
    assert taken.note is None


SYSTEMLESS = (  # shows what users and assistants say, and nothing else
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}" + TURN + "{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}" + PROMPT
)
FIRST_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}" + TURN + "{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}" + PROMPT
)


@pytest.mark.parametrize("word", ["Be brief.", "Where", "user"])
def test_system_messages_that_a_template_leaves_out_are_folded_and_told(word: str) -> None:
    tokenizer = tokenizer_of(SYSTEMLESS)
    messages = [{"role": "system", "content": word}, user("Where?"), answer("Peru.")]
    encoded = encode(messages, tokenizer)
    labelled, unlabelled = runs(tokenizer, encoded)
    assert unlabelled[0] == f"<|im_start|>user\n{word}\n\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    assert labelled == ["Peru.<|im_end|>"]
    assert encoded.note == UNSHOWN
    assert encode(messages[1:], tokenizer).note is None
    assert encode([{"role": "system", "content": " "}, *messages[1:]], tokenizer).note is None


def test_only_the_system_messages_that_are_left_out_are_folded() -> None:
    tokenizer = tokenizer_of(FIRST_SYSTEM)
    system = {"role": "system", "content": "Be brief."}
    messages = [
        system,
        user("Where?"),
        answer("Peru."),
        {**system, "content": "Be long."},
        user("Why?"),
        answer("So."),
    ]
    encoded = encode(messages, tokenizer)
    whole = text_of(tokenizer, encoded.input_ids)
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n")
    assert "<|im_start|>user\nBe long.\n\nWhy?<|im_end|>\n" in whole
    assert encoded.note == UNSHOWN
    assert runs(tokenizer, encoded)[0] == ["Peru.<|im_end|>", "So.<|im_end|>"]


CALLING = [
    user("Sky?"),
    answer("I look.", tool_calls=[call("Lima"), call("Quito")]),
    {"role": "tool", "content": "mist"},
    answer("Misty."),
]
WRITTEN = "\n".join(
    f'<tool_call>\n{{"name": "sky", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    for city in ("Lima", "Quito")
)


@pytest.mark.parametrize("template", [KINDS["chatml"].template, SYSTEMLESS])
def test_calls_that_a_template_leaves_out_are_written_and_told(template: str) -> None:
    tokenizer = tokenizer_of(template)
    encoded = encode(CALLING, tokenizer, TOOLS)
    labelled, unlabelled = runs(tokenizer, encoded)
    assert labelled == [f"I look.\n{WRITTEN}<|im_end|>", "Misty.<|im_end|>"]
    assert '<tools>\n{"type": "function", "function": {"name": "sky"' in unlabelled[0]
    assert "<|im_start|>user\n<tool_response>\nmist\n</tool_response><|im_end|>" in unlabelled[1]
    notes = [CALLS_WRITTEN, TOOLS_WRITTEN] + [UNSHOWN] * (template == SYSTEMLESS)
    assert encoded.note == "; ".join(notes)
    alone = encode([*CALLING[:1], CALLING[3]], tokenizer, TOOLS)
    assert alone.note == "; ".join(notes[1:])


def test_calls_that_a_template_refuses_are_written_and_told() -> None:
    tokenizer = TOKENIZERS["gemma"]
    encoded = encode(CALLING, tokenizer, TOOLS)
    labelled, unlabelled = runs(tokenizer, encoded)
    assert labelled == [f"I look.\n{WRITTEN}<end_of_turn>", "Misty.<end_of_turn>"]
    assert unlabelled[0].startswith("<bos><start_of_turn>user\n<tools>\n{")
    assert "<start_of_turn>user\n<tool_response>\nmist\n</tool_response><end_of_turn>" in unlabelled[1]
    assert encoded.note == f"{CALLS_REFUSED}; {FOLDED}"


def test_calls_that_a_template_shows_are_left_as_they_are() -> None:
    for name in ("qwen3", "mistral, tools"):
        encoded = encode(CALLING, TOKENIZERS[name], TOOLS)
        assert "<tools>" not in text_of(TOKENIZERS[name], encoded.input_ids)
        assert encoded.note in (None, REWRITTEN)


def test_what_cannot_be_told_in_another_way_sets_the_row_aside() -> None:
    tokenizer = tokenizer_of(SYSTEMLESS)
    critic = {"role": "critic", "content": "Bad."}
    fault = encode([user("a"), answer("b"), critic, user("c"), answer("d")], tokenizer).fault
    assert fault == "the chat template leaves out messages of role 'critic'"
    fault = encode([user("a"), {"role": "tool", "content": "x"}, answer("b")], tokenizer).fault
    assert fault == "the chat template leaves out messages of role 'tool'"
    first = tokenizer_of(
        "{% for m in messages %}" + TURN + "{{ m.content }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0] | tojson }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
    )
    assert encode(CALLING, first).fault == "the chat template leaves out some calls of tools"
    assert encode([CALLING[0], answer("", tool_calls=[call("Lima")])], first).fault is None


@pytest.mark.parametrize("name", ["chatml", "chatml, marked", "qwen3", "llama 3"])
@pytest.mark.parametrize("out", [{"weight": 0}, {"loss_weight": 0.0}, {"train": False}, {"training": False}])
def test_answers_of_weight_0_are_not_labelled(name: str, out: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS[name]
    messages = [
        user("a"),
        answer("No.", **out),
        user("b"),
        answer("Yes.", weight=1),
        user("c"),
        answer("Bad.", **out),
    ]
    encoded = encode(messages, tokenizer)
    labelled, _ = runs(tokenizer, encoded)
    assert [text.split("<|")[0] for text in labelled] == ["Yes."]
    assert WEIGHTLESS in str(encoded.note)
    assert encode(messages[:2], tokenizer).fault == "no labelled token: the assistant says nothing"
