"""What a person sees: a title, a table and notes, laid out so that no number, name or path is cut at any width.

Words stay whole everywhere, and numbers stay on one line. A table that is too wide loses its frame first, is then
shown in several parts that repeat the first column, and in the end as a list. Where no one watches (a pipe, a batch
job's log, ``TERM=dumb``, ``NO_COLOR``) it is plain lines, a row each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tinyonn.show.escape import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Style = Literal["", "bold", "green", "yellow", "red"]
Kind = Literal["framed", "open", "list"]

HARD = "\ufdd0"  # in place of a blank at which no line may end; a code point that no text has
UNIT = re.compile(r"(?<=\d) (?=(?:[KMGTP]?i?B|s|min|h|d|billion|nats)\b)")
GAP = 2  # blanks between columns without a frame
LESS = 0.75  # of the lines, below which a table goes without its frame
FRAMES: tuple[tuple[Kind, Callable[[int], int]], ...] = (  # cells beside those of so many columns
    ("framed", lambda columns: 3 * columns + 1),
    ("open", lambda columns: GAP * (columns - 1)),
)


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether it holds numbers, which are set flush right and never wrapped."""

    heading: str
    number: bool


@dataclass(frozen=True)
class Row:
    """Cells, as many as there are columns; `last` ends a section."""

    cells: tuple[str, ...]
    styles: tuple[Style, ...]
    last: bool


@dataclass
class Sheet:
    """A titled table with notes under it.

    Attributes
    ----------
    title : str
        May be empty.
    notes : list of str
        Under the table, a line or more each.
    headed : bool
        Show the headings.
    """

    title: str = ""
    notes: list[str] = field(default_factory=list)
    headed: bool = True
    columns: list[Column] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def text(self, *headings: str) -> Sheet:
        """Add columns of words, which may go on in further lines."""
        self.columns += [Column(heading, False) for heading in headings]
        return self

    def number(self, *headings: str) -> Sheet:
        """Add columns of numbers."""
        self.columns += [Column(heading, True) for heading in headings]
        return self

    def add(self, *cells: str, style: Style | Sequence[Style] = "", last: bool = False) -> None:
        """Add a row; a style is of the whole row or of each cell."""
        assert len(cells) == len(self.columns)
        styles = (style,) * len(cells) if isinstance(style, str) else tuple(style)
        self.rows.append(Row(tuple(str(cell) for cell in cells), styles, last))

    def section(self) -> None:
        """End a section after the last row."""
        if self.rows:
            last = self.rows[-1]
            self.rows[-1] = Row(last.cells, last.styles, True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """In a frame, as wide as the console."""
        from rich.text import Text

        shown = self.visible()
        for line in wrap(shown.title, options.max_width):
            yield Text(line, style="italic", no_wrap=True, overflow="ignore")
        parts = list(_parts(shown, options.max_width))
        for part in parts:
            yield from _drawn(part, options.max_width, frames=len(parts) == 1)
        for note in shown.notes:
            for line in wrap(note, options.max_width):
                yield Text(line, style="dim italic", no_wrap=True, overflow="ignore")

    def plain(self, width: int | None = None) -> str:
        """As plain lines; None: however wide."""
        shown = self.visible()
        lines = list(wrap(shown.title, width))
        for number, part in enumerate(_parts(shown, width)):
            lines += [""] * (number > 0)
            lines += _plain(part, width)
        for note in shown.notes:
            lines += wrap(note, width)
        return "\n".join(lines)

    def visible(self) -> Sheet:
        """The same without what would do something to a terminal; line feeds end lines as before."""

        def shown(text: str) -> str:
            return visible(text, lines=True)

        rows = [Row(tuple(map(shown, row.cells)), row.styles, row.last) for row in self.rows]
        columns = [Column(shown(column.heading), column.number) for column in self.columns]
        return Sheet(shown(self.title), list(map(shown, self.notes)), self.headed, columns, rows)


def pairs(title: str, rows: dict[str, str], notes: Iterable[str] = ()) -> Sheet:
    """A sheet of named values."""
    sheet = Sheet(title, list(notes), headed=False).text("", "")
    for name, value in rows.items():
        sheet.add(name, value)
    return sheet


def whole(text: object) -> str:
    """A text that stays on one line where it fits on one, such as a path with blanks."""
    return visible(text).replace(" ", HARD)


def wrap(text: str, width: int | None) -> list[str]:
    """Break a text at blanks, never within a word or between a number and its unit.

    A word that is longer than the width has a line of its own.

    Parameters
    ----------
    text : str
        With a line feed where a line must end.
    width : int or None
        Cells of a terminal; None breaks nowhere.
    """
    if not text:
        return []
    lines = []
    for line in text.split("\n"):
        if width is None or cells(line) <= width:
            lines.append(line)
        else:
            lines += _filled(UNIT.sub(HARD, line), width)
    return [line.replace(HARD, " ") for line in lines]


def _filled(line: str, width: int) -> Iterator[str]:
    """Lines of as many words as fit."""
    words = line.split(" ")
    held = words[0]
    for word in words[1:]:
        if cells(held) + 1 + cells(word) > width:
            yield held
            held = word
        else:
            held += " " + word
    yield held


def cells(text: str) -> int:
    """Columns of a terminal that a text takes: two for wide characters."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text.replace(HARD, " "))


def _word(text: str) -> int:
    """Cells of the longest word."""
    return max((cells(word) for word in UNIT.sub(HARD, text).split()), default=0)


def _line(text: str) -> int:
    return max(cells(line) for line in text.split("\n"))


@dataclass(frozen=True)
class _Frame:
    """How a table is drawn, with a frame, open or as a list of its cells, and the width of each column."""

    kind: Kind
    widths: tuple[int, ...]


def _parts(sheet: Sheet, width: int | None) -> Iterator[Sheet]:
    """The sheet, or parts of it that fit, each with the first column."""
    if not sheet.columns:
        return
    if width is None or _least(sheet) <= width:
        yield sheet
        return
    taken = [0]
    for number in range(1, len(sheet.columns)):
        if len(taken) > 1 and _least(_some(sheet, [*taken, number])) > width:
            yield _some(sheet, taken)
            taken = [0]
        taken.append(number)
    yield _some(sheet, taken)


def _some(sheet: Sheet, numbers: Sequence[int]) -> Sheet:
    """Some columns of a sheet."""
    rows = [
        Row(tuple(row.cells[n] for n in numbers), tuple(row.styles[n] for n in numbers), row.last)
        for row in sheet.rows
    ]
    return Sheet("", [], sheet.headed, [sheet.columns[n] for n in numbers], rows)


def _bounds(sheet: Sheet) -> tuple[list[int], list[int]]:
    """Least and most cells that each column takes."""
    least, most = [], []
    for number, column in enumerate(sheet.columns):
        cells = [row.cells[number] for row in sheet.rows]
        heading = column.heading if sheet.headed else ""
        wide = max((_line(cell) for cell in cells), default=0)
        words = wide if column.number else max((_word(cell) for cell in cells), default=0)
        least.append(max(words, _word(heading)))
        most.append(max(wide, _line(heading), least[-1]))
    return least, most


def _least(sheet: Sheet) -> int:
    """Cells that a sheet takes at least, without its frame."""
    return sum(_bounds(sheet)[0]) + GAP * (len(sheet.columns) - 1)


def _frame(sheet: Sheet, width: int | None) -> _Frame:
    least, most = _bounds(sheet)
    count = len(least)
    if width is None:
        return _Frame("open", tuple(most))
    rooms = [(kind, width - beside(count)) for kind, beside in FRAMES]
    fitting = [_Frame(kind, tuple(_spread(least, most, room))) for kind, room in rooms if sum(least) <= room]
    if not fitting:
        return _Frame("list", ())
    framed, bare = fitting[0], fitting[-1]
    return bare if _lines(sheet, bare) < LESS * _lines(sheet, framed) else framed


def _lines(sheet: Sheet, frame: _Frame) -> int:
    """How many the rows take."""
    return sum(
        max(len(wrap(cell, width)) for cell, width in zip(row.cells, frame.widths, strict=True))
        for row in sheet.rows
    )


def _spread(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Widths between least and most: a cell at a time to the narrowest of those that want more."""
    widths = list(least)
    rest = room - sum(widths)
    while rest > 0:
        wanting = [n for n in range(len(widths)) if widths[n] < most[n]]
        if not wanting:
            break
        widths[min(wanting, key=lambda n: widths[n])] += 1
        rest -= 1
    return widths


def _drawn(sheet: Sheet, width: int, frames: bool) -> RenderResult:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    frame = _frame(sheet, width)
    if frame.kind != "framed" or not frames:
        for number, line in enumerate(_plain(sheet, width)):
            headings = number == 0 and sheet.headed and frame.kind != "list"
            yield Text(line, style="bold" if headings else "", no_wrap=True, overflow="ignore")
        yield Text("")
        return
    table = Table(box=box.HEAVY_HEAD if sheet.headed else box.SQUARE, show_header=sheet.headed)
    for column, cells in zip(sheet.columns, frame.widths, strict=True):
        heading = "\n".join(_padded(column, column.heading, cells))
        table.add_column(Text(heading), width=cells, no_wrap=True, overflow="ignore")
    for row in sheet.rows:
        texts = [
            Text("\n".join(_padded(column, cell, cells)), style)
            for column, cell, style, cells in zip(
                sheet.columns, row.cells, row.styles, frame.widths, strict=True
            )
        ]
        table.add_row(*texts, end_section=row.last)
    yield table


def _padded(column: Column, text: str, width: int) -> list[str]:
    """Lines of a cell, as wide as its column."""
    blanks = [(line, " " * (width - cells(line))) for line in wrap(text, width) or [""]]
    return [space + line if column.number else line + space for line, space in blanks]


def _plain(sheet: Sheet, width: int | None) -> Iterator[str]:
    frame = _frame(sheet, width)
    if frame.kind == "list":
        yield from _listed(sheet, width)
        return
    if sheet.headed:
        yield from _aligned(sheet, [column.heading for column in sheet.columns], frame.widths)
    for row in sheet.rows:
        yield from _aligned(sheet, row.cells, frame.widths)
        if row.last and row is not sheet.rows[-1]:
            yield ""


def _aligned(sheet: Sheet, cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """A row in one line or more."""
    padded = [
        _padded(column, cell, width) for column, cell, width in zip(sheet.columns, cells, widths, strict=True)
    ]
    for number in range(max(map(len, padded), default=0)):
        line = [
            lines[number] if number < len(lines) else " " * width
            for lines, width in zip(padded, widths, strict=True)
        ]
        yield (" " * GAP).join(line).rstrip()


def _listed(sheet: Sheet, width: int | None) -> Iterator[str]:
    """Each cell in a line of its own, the first column's before those of its row."""
    for row in sheet.rows:
        yield from wrap(row.cells[0], width)
        for column, cell in zip(sheet.columns[1:], row.cells[1:], strict=True):
            if cell:
                text = f"{column.heading}: {cell}" if sheet.headed and column.heading else cell
                yield from (f"  {line}" for line in wrap(text, None if width is None else width - GAP))
