"""The dialogue slice: questions and answers made from documentation, catalogues and generated problems."""

from __future__ import annotations

import ast
import inspect
import random
import re
from collections.abc import Iterator
from pathlib import Path

import corpus_generated as generated
import corpus_sources as sources
from corpus_sources import CPYTHON, GENERATED, POSTGRES, Document

MAX_ANSWER = 1600
ASK_FUNCTION = (
    "What does `{}` do?", "Explain `{}`.", "How do I use `{}`?", "Can you describe `{}` for me?",
    "What is `{}` for?", "Tell me about `{}` in Python.", "I came across `{}`. What is it?",
    "Please document `{}`.", "Give me the documentation of `{}`.",
)  # fmt: skip
ASK_TERM = (
    "What is {}?",
    "Define {}.",
    "What does the term {} mean in Python?",
    "Explain the term {}.",
    "{}?",
)
ASK_CODE = (
    "Write the Python function `{}`. It should do this: {}",
    "Implement `{}`: {}",
    "Show me an implementation of `{}`. {}",
)
ASK_FRENCH = (
    "Translate into French: {}",
    "How do you say this in French? {}",
    "French, please: {}",
    "Traduis en français : {}",
)
ASK_ENGLISH = ("Translate into English: {}", "What does this mean in English? {}", "Traduis en anglais : {}")
ASK_SQL = ("{}", "Write SQL for this: {}", "I need a query. {}", "In SQL: {}", "{} Use SQL.")
ANSWER_SQL = ("{}", "Here is the query:\n\n{}", "You can write:\n\n{}", "This statement does it:\n\n{}")
SYSTEM = (
    "You are a helpful assistant.",
    "Answer briefly and precisely.",
    "You know the Python documentation by heart.",
)

Turn = tuple[str, str]
Pair = tuple[str, str]


def docstrings(root: Path, rng: random.Random) -> Iterator[tuple[str, Pair]]:
    """(file, question and answer) from the docstrings and short functions of the standard library."""
    for key, text in sources.python_files(root):
        module = key.split("/Lib/")[1].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        try:
            tree, lines = ast.parse(text), text.splitlines()
        except SyntaxError:
            continue
        for owner in ast.walk(tree):
            if not isinstance(owner, (ast.Module, ast.ClassDef)):
                continue
            prefix = module if isinstance(owner, ast.Module) else f"{module}.{owner.name}"
            for node in owner.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    yield from ((key, pair) for pair in _ask(node, prefix, lines, rng))


def _ask(
    node: ast.FunctionDef | ast.ClassDef, prefix: str, lines: list[str], rng: random.Random
) -> Iterator[Pair]:
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    if not 40 <= len(doc) <= MAX_ANSWER:
        return
    yield rng.choice(ASK_FUNCTION).format(f"{prefix}.{node.name}"), doc
    code = inspect.cleandoc("\n" + "\n".join(lines[node.lineno - 1 : node.end_lineno]))
    if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and len(code) <= MAX_ANSWER:
        summary = " ".join(doc.split("\n\n")[0].split())
        yield rng.choice(ASK_CODE).format(node.name, summary), f"```python\n{code}\n```"


def entries(root: Path, rng: random.Random) -> Iterator[tuple[str, Pair]]:
    """(file, question and answer) from the described objects and the glossary of CPython's documentation."""
    described = re.compile(r"^( *)\.\. (?:c:)?(function|method|class|data|attribute|option|exception"
                           r"|macro|opcode)"
                           r":: *(.+)\n"
                           r"((?:\1 +\S.*\n|\s*\n)+)", re.MULTILINE)  # fmt: skip
    for key, text in sources.doc_files(root):
        if key.endswith("glossary.rst"):
            for term, body in re.findall(r"^   (\S.*)\n((?:      .*\n|\n)+)", text, re.MULTILINE):
                yield key, (rng.choice(ASK_TERM).format(term), inspect.cleandoc(body))
            continue
        for _, kind, name, body in described.findall(text):
            answer = re.sub(r"^(?:\.\. (?:versionchanged|versionadded|index|audit-event|availability)::.*\n?"
                            r"|:\w+:\s*\n)", "",
                            inspect.cleandoc("\n" + body), flags=re.MULTILINE).strip()  # fmt: skip
            if 60 <= len(answer) <= MAX_ANSWER:
                what = name.strip() if kind in ("function", "method", "class") else f"{kind} {name.strip()}"
                yield key, (rng.choice(ASK_FUNCTION).format(what), answer)


def translations(root: Path, rng: random.Random) -> Iterator[tuple[str, Pair]]:
    """(key, question and answer) from PostgreSQL's French catalogue."""
    for key, english, french in sources.catalogue(root, "fr"):
        if 20 <= len(english) <= 400:
            if rng.random() < 0.75:
                yield key, (rng.choice(ASK_FRENCH).format(english.strip()), french.strip())
            else:
                yield key, (rng.choice(ASK_ENGLISH).format(french.strip()), english.strip())


def generated_pairs(rng: random.Random, count: int) -> Iterator[tuple[str, Pair]]:
    """Worked problems and SQL requests; each conversation's worth of pairs shares a key."""
    for index in range(count):
        key = f"generated/{index // 3}"
        if rng.random() < 0.5:
            question, _, answer = rng.choice(generated.PROBLEMS)(rng).partition("\n")
            yield key, (question, answer)
            continue
        table = rng.choice(generated.TABLES)
        fields = rng.sample(generated.TEXT_FIELDS, 2) + rng.sample(generated.NUMBER_FIELDS, 2)
        request, answer = generated.query(
            rng, table, [{"id": rng.randint(1, 999), **generated.record(rng, fields)}]
        )
        yield key, (rng.choice(ASK_SQL).format(request), rng.choice(ANSWER_SQL).format(answer))


def conversations(source: str, pairs: Iterator[tuple[str, Pair]], rng: random.Random) -> Iterator[Document]:
    """Join neighbouring pairs of one key into conversations of one to five exchanges."""
    turns: list[Turn] = []
    current, wanted = "", 1
    for key, (question, answer) in pairs:
        size = sum(len(content) for _, content in turns) + len(question) + len(answer)
        if turns and (key != current or len(turns) >= 2 * wanted or size > sources.MAX_CHARS):
            yield _conversation(source, current, turns, rng)
            turns, wanted = [], rng.choice((1, 1, 2, 3, 5))
        current = key
        turns += [("user", question), ("assistant", answer)]
    if turns:
        yield _conversation(source, current, turns, rng)


def _conversation(source: str, key: str, turns: list[Turn], rng: random.Random) -> Document:
    system = [("system", rng.choice(SYSTEM))] if rng.random() < 0.15 else []
    return Document("dialogue", source, key, messages=(*system, *turns))


def dialogue_documents(cpython: Path, postgres: Path, seed: int) -> Iterator[Document]:
    """All conversations, source by source."""
    rng = random.Random(seed)
    yield from conversations(CPYTHON, docstrings(cpython, rng), rng)
    yield from conversations(CPYTHON, entries(cpython, rng), rng)
    yield from conversations(POSTGRES, translations(postgres, rng), rng)
    yield from conversations(GENERATED, generated_pairs(rng, 6000), rng)
