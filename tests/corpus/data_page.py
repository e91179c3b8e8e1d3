"""The tables of docs/data.md, made from the code: ``python -m tests.corpus.data_page`` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

from tests.corpus.templates import KINDS
from tinyonn.corpus.forms import CHATS, FORMS, LOOSE

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
MARK = "<!-- {name}: made by tests/corpus/data_page.py -->\n"


def forms() -> str:
    """The forms, the columns that they need and those that may be there."""
    lines = ["| `data.format` | needs | may have |", "|---|---|---|"]
    for name, form in FORMS.items():
        needed = [" or ".join(names + (LOOSE if names == CHATS else ())) for names in form.needed.values()]
        more = [" or ".join(names) for names in form.optional.values()]
        lines.append(f"| {name} | {'; '.join(needed)} | {'; '.join(more)} |")
    return "\n".join(lines) + "\n"


def templates() -> str:
    """The chat templates that labels are tested with."""
    lines = [
        "| chat template | system messages | turns of one role in a row | tools | contents |",
        "|---|---|---|---|---|",
    ]
    for name, kind in KINDS.items():
        system = "as they are" if kind.system else "folded into the user's"
        turns = "merged" if kind.alternating else "as they are"
        tools = "as it writes them" if kind.tools else "written into the turns"
        lines.append(f"| {name} | {system} | {turns} | {tools} | {'stripped' if kind.strips else 'whole'} |")
    return "\n".join(lines) + "\n"


TABLES = {"forms": forms, "templates": templates}


def made(text: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        mark = re.escape(MARK.format(name=name))
        new = (MARK.format(name=name) + "\n" + table()).replace("\\", r"\\")
        text = re.sub(mark + r"\n?(\|.*\n)*", new, text)
    return text


if __name__ == "__main__":
    PAGE.write_text(made(PAGE.read_text("utf-8")), "utf-8")
