r"""Text from data, paths and models, made harmless for where it is shown: terminal, log, Markdown, HTML, picture.

A character that moves a cursor, colours, renames a window, turns the direction of writing, cannot be seen or cannot
be encoded is shown as its escape (``\x1b``, ``\u202e``, ``\udcff``); all others stay as they are. What is shown for
people goes through `visible`, at the outlet and not where it comes from; nothing is ever parsed as markup.
"""

from __future__ import annotations

import re
import reprlib
from typing import Final

LINE_END: Final = "\n"
SHOWN = 100  # characters of a value that a message shows
# Controls (C0, delete, C1), directions of writing, separators of lines, the invisible, tags, halves of characters.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e0fff\ud800-\udfff]"
)
MARKDOWN = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)")
BACKTICKS = re.compile("`+")


def visible(text: object, lines: bool = False) -> str:
    """Show what cannot be seen, or would do something, as its escape.

    Parameters
    ----------
    text : object
        Its ``str``.
    lines : bool
        Leave line feeds as they are.
    """
    text = str(text)
    if text.isprintable():  # neither controls nor directions nor halves are
        return text
    return UNSEEN.sub(lambda match: _escape(match[0], lines), text)


def _escape(character: str, lines: bool) -> str:
    if character == LINE_END and lines:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def markdown(text: object) -> str:
    """Text that Markdown shows as it is, in a line or in a cell of a table."""
    return MARKDOWN.sub(lambda match: "\\" + match[0], visible(text))


def code(text: object) -> str:
    """Text as a span of Markdown's code, whatever backticks it has."""
    shown = visible(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, BACKTICKS.findall(shown)), default=0))
    pad = " " if shown[:1] in ("", "`") or shown[-1:] == "`" else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def html(text: object) -> str:
    """Text that HTML, and what Plotly reads of it, shows as it is."""
    from html import escape

    return escape(visible(text))


def picture(text: object) -> str:
    """Text that Matplotlib draws as it is, and not as a formula."""
    return visible(text).replace("$", r"\$")


class _Short(reprlib.Repr):
    """Values as Python writes them, cut, and integers that Python refuses to write told by their size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = SHOWN
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        """An integer."""
        return (
            super().repr_int(x, level) if x.bit_length() < 10_000 else f"a number of {x.bit_length():,} bits"
        )


def shortened(value: object) -> str:
    """A value for a message, never longer than a line or two."""
    return _Short().repr(value)
