"""Chat templates of the kinds that models come with, and what the assistant says in each.

Each is written for these tests in the manner of its family: headers, end-of-turn tokens, stripping, what it refuses
and what it drops. `Kind.said` is the answer as it should be labelled, told without rendering anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]
Said = Callable[[list[Message], int], str]

SPECIAL = (
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[TOOL_CALLS]",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>",
    "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
)  # fmt: skip
WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
ALTERNATING = (
    "{% set first = 1 if messages[0].role == 'system' else 0 %}"
    "{% for m in messages[first:] %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
TURN = "<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Thinking stands in the answers after the last question alone, as Qwen3 has it.
QWEN3 = """\
{%- if tools -%}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- set last = namespace(question=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set content = m.content if m.content is string else '' -%}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' -%}
{%- if not thought and '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > last.question -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
{%- else -%}{{- content -}}{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{%- if content or not loop.first %}{{ '\\n' }}{% endif -%}
{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""
# The functions stand before the last question alone, as Mistral's have it.
MISTRAL_TOOLS = (
    "<s>{% set last = namespace(question=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "[TOOL_CALLS] {{ m.tool_calls | tojson }}</s>"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }} [/TOOL_RESULTS]"
    "{% else %}{% if tools and loop.index0 == last.question %}[AVAILABLE_TOOLS] {{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Kind:
    """A chat template and what is true of it.

    Attributes
    ----------
    template : str
    said : callable
        Messages as rendered and the place of an answer to the text that should be labelled.
    system, alternating : bool
        It takes a system message; it refuses successive turns of one role.
    tools : bool
        It renders functions, calls of them and what they gave.
    strips : bool
        It strips contents.
    """

    template: str
    said: Said
    system: bool = True
    alternating: bool = False
    tools: bool = False
    strips: bool = False


def ends_with(ending: str, beginning: str = "") -> Said:
    """Contents as they are, between two texts."""
    return lambda messages, turn: beginning + messages[turn]["content"] + ending


def stripped(ending: str, beginning: str = "") -> Said:
    """Contents without white space at both ends, between two texts."""
    return lambda messages, turn: beginning + messages[turn]["content"].strip() + ending


def calls(message: Message) -> list[str]:
    """The calls of a message, as `tojson` writes them."""
    return [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or []]


def qwen3(messages: list[Message], turn: int) -> str:
    """Thinking with the answers after the last question."""
    message = messages[turn]
    content = message.get("content") or ""
    thought = message.get("reasoning_content") or ""
    if not thought and "</think>" in content:
        thought = content.split("</think>")[0].split("<think>")[-1].strip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    said = "".join(
        ("\n" if content or number else "") + f"<tool_call>\n{call}\n</tool_call>"
        for number, call in enumerate(calls(message))
    )
    if all(later["role"] != "user" for later in messages[turn:]):
        content = "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
    return content + said + "<|im_end|>"


def mistral_tools(messages: list[Message], turn: int) -> str:
    """Calls instead of contents."""
    if found := messages[turn].get("tool_calls"):
        return f"[TOOL_CALLS] {json.dumps(found, ensure_ascii=False)}</s>"
    return f" {messages[turn]['content'].strip()}</s>"


def phi3(messages: list[Message], turn: int) -> str:
    """The text ends once more where no prompt follows."""
    last = turn == len(messages) - 1
    return str(messages[turn]["content"]) + "<|end|>" + ("\n<|endoftext|>" if last else "")


def unthought(messages: list[Message], turn: int) -> str:
    """DeepSeek's: what stands after the thinking."""
    return str(messages[turn]["content"]).split("</think>")[-1] + "<｜end▁of▁sentence｜>"


KINDS = {
    "chatml": Kind(
        "{% for m in messages %}" + TURN + "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT,
        ends_with("<|im_end|>"),
    ),
    "chatml, marked": Kind(
        "{%- for m in messages -%}\n{{- '<|im_start|>' + m.role + '\\n' -}}\n{%- if m.role == 'assistant' -%}\n"
        "{%- generation -%}\n{{- m.content + '<|im_end|>' -}}\n{%- endgeneration -%}\n{%- else -%}\n"
        "{{- m.content + '<|im_end|>' -}}\n{%- endif -%}{{- '\\n' -}}{%- endfor -%}\n" + PROMPT,
        ends_with("<|im_end|>"),
    ),
    "chatml, marked and stripped": Kind(
        "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}" + PROMPT,
        stripped("<|im_end|>"),
        strips=True,
    ),
    "marks without an end": Kind(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}<|user|>{{ m.content }}<|assistant|>"
        "{% endif %}{% endfor %}",
        ends_with(""),
    ),
    "chatml without a prompt": Kind(
        "{% for m in messages %}" + TURN + "{{ m.content }}<|im_end|>\n{% endfor %}", ends_with("<|im_end|>")
    ),
    "llama 2": Kind(
        ALTERNATING + "{% for m in messages[first:] %}{% if m.role == 'user' %}<s>[INST] "
        "{% if loop.first and first %}<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n{% endif %}"
        "{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}",
        stripped(" </s>", " "),
        alternating=True,
        strips=True,
    ),
    "llama 3": Kind(
        "{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}<|start_header_id|>{{ m.role }}"
        "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        stripped("<|eot_id|>"),
        strips=True,
    ),
    "mistral": Kind(
        WITHOUT_SYSTEM + ALTERNATING + "<s>{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        ends_with("</s>"),
        system=False,
        alternating=True,
    ),
    "mistral, tools": Kind(MISTRAL_TOOLS, mistral_tools, tools=True, strips=True),
    "gemma": Kind(
        "<bos>" + WITHOUT_SYSTEM + ALTERNATING + "{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        stripped("<end_of_turn>"),
        system=False,
        alternating=True,
        strips=True,
    ),
    "phi 3": Kind(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        phi3,
    ),
    "qwen3": Kind(QWEN3, qwen3, tools=True),
    "zephyr": Kind(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>{% endif %}\n{% endfor %}",
        lambda messages, turn: f"\n{messages[turn]['content']}<|endoftext|>"
    ),
    "vicuna": Kind(
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} "
        "{% elif m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        ends_with("</s>", " "),
    ),
    "deepseek": Kind(
        "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
        unthought,
    ),
    "command r": Kind(
        "{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ {'user': 'USER', 'assistant': 'CHATBOT', "
        "'system': 'SYSTEM'}[m.role] }}_TOKEN|>{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        stripped("<|END_OF_TURN_TOKEN|>"),
        strips=True,
    ),
    "plain": Kind(
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}",
        ends_with("\n\n"),
    ),
    "counts its messages": Kind(
        "{{ messages | length }}{% for m in messages %}" + TURN + "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT,
        ends_with("<|im_end|>"),
    ),
}  # fmt: skip


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the special tokens of all templates."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    made.chat_template = template
    return made
