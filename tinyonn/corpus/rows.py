"""Read a corpus row by row: files and folders of data, `datasets` names, or the corpus that ships.

A row that cannot be used is not an error but a `Row` with a `fault`; a source that cannot be read is one.
Rows are numbered through all files in the order of their names: line of a JSONL file, place in any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyonn.config import SourceConfig
from tinyonn.corpus.files import (
    BATCH,
    KNOWN,
    content_of,
    file_columns,
    file_rows,
    find_files,
    remedy_of,
    table_records,
)
from tinyonn.corpus.forms import FORMS, Reading, known_forms, misfit, recognise
from tinyonn.corpus.messages import Fault, Message, read_tools
from tinyonn.dense.source import REFERENCE, sha256
from tinyonn.errors import InputError, first_line

__all__ = ["REFERENCE_CORPUS", "Columns", "Message", "Row", "Source"]

REFERENCE_CORPUS = REFERENCE / "corpus"
TOOLS = "tools"
NAMED = 3  # skipped files that are told by name


@dataclass(frozen=True)
class Row:
    """One row of the source: a text or messages, or the reason why it has neither.

    Attributes
    ----------
    index : int
        Row of the source, from 0.
    text, messages
        Exactly one is set unless there is a `fault`.
    slice : str or None
        Value of the slice column.
    fault : str or None
        Why the row is set aside.
    malformed : bool
        The fault lies in the file's bytes and not in the row's content.
    tools : tuple of dict or None
        Schemas of the tools that the conversation may call, for the chat template.
    """

    index: int
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    slice: str | None = None
    fault: str | None = None
    malformed: bool = False
    tools: tuple[dict[str, Any], ...] | None = None

    @property
    def words(self) -> str:
        """The row's text without markup, for features."""
        if self.text is not None:
            return self.text
        return "\n".join(str(message["content"]) for message in self.messages or ())


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; None where there is no such column."""

    text: str | None
    messages: str | None
    slice: str | None


class Source:
    """A corpus that can be read several times over, always in the same order.

    Parameters
    ----------
    config : SourceConfig

    Attributes
    ----------
    readings : dict
        The readings of each file, tried on a row in turn.
    skipped : list of str
        Hidden files and copies in the folder.

    Raises
    ------
    InputError
        No such file, folder or data set, an unreadable file, or a column that is not there.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.path = config.path
        self.files, self.skipped = _files(config)
        self.dataset: Any = None if self.files else _dataset(config)
        existing: dict[Path | None, list[str]] = {path: file_columns(path) for path in self.files}
        if self.dataset is not None:
            existing[None] = list(self.dataset.column_names)
        self.readings = _readings(config, existing)
        self.columns = _columns(config, self._all_readings(), existing)
        self.tools = any(TOOLS in names for names in existing.values()) and self.chats

    @property
    def chats(self) -> bool:
        """Whether some rows may be conversations."""
        return any(reading.form != "text" for reading in self._all_readings())

    @property
    def form(self) -> str:
        """The forms and their columns, such as ``alpaca: instruction, input, output``."""
        return "; ".join(map(str, self._all_readings())) + (" (with tools)" if self.tools else "")

    def described(self, rows: int, aside: int) -> str:
        """One line about what was read."""
        texts = any(reading.form == "text" for reading in self._all_readings())
        what = "rows" if texts and self.chats else "texts" if texts else "conversations"
        if any(content_of(path) == "text" for path in self.files):
            what += " (a line each)"
        line = f"{self.form}; {rows:,} {what}" + (f", {aside:,} set aside" if aside else "")
        if self.skipped:
            some = ", ".join(self.skipped[:NAMED]) + (", ..." if len(self.skipped) > NAMED else "")
            line += f"; {len(self.skipped)} files skipped (hidden, copies, archives): {some}"
        return line

    def fingerprint(self) -> str:
        """Hash of what is read: the columns, and the files' bytes in order or the data set's fingerprint."""
        digest = hashlib.sha256(repr(self.columns).encode())
        more = [r for r in self._all_readings() if r.form not in ("messages", "text") or len(r.columns) > 1]
        if more or self.tools:
            digest.update(self.form.encode())
        for path in self.files:
            digest.update(sha256(path).encode())
        if self.dataset is not None:
            digest.update(str(self.dataset._fingerprint).encode())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        first = 0
        for path in self.files:
            readings = self.readings[path]
            last = first - 1
            for number, record in file_rows(path, self._names(readings)):
                last = first + number
                yield self._row(last, record, readings)
            first = last + 1
        if self.dataset is not None:
            readings = self.readings[None]
            names = [name for name in self._names(readings) if name in self.dataset.column_names]
            tables = self.dataset.select_columns(names).with_format("arrow").iter(BATCH)
            records = (record for table in tables for record in table_records(table))
            for number, record in enumerate(records):
                yield self._row(number, record, readings)

    def _all_readings(self) -> list[Reading]:
        return list(dict.fromkeys(reading for readings in self.readings.values() for reading in readings))

    def _names(self, readings: list[Reading]) -> list[str]:
        """The columns to read, each once."""
        names = [name for reading in readings for name in reading.columns]
        label = [self.columns.slice] if self.columns.slice else []
        return list(dict.fromkeys([*names, *label, *([TOOLS] if self.tools else [])]))

    def _row(self, index: int, record: dict[str, Any] | str, readings: list[Reading]) -> Row:
        if isinstance(record, str):
            return Row(index, fault=record, malformed=True)
        name = record.get(self.columns.slice) if self.columns.slice else None
        label = None if name is None else str(name)
        try:
            for reading in readings:
                said = reading.read(record)
                if isinstance(said, str):
                    return Row(index, said, None, label)
                if said is not None:
                    tools = read_tools(record.get(TOOLS)) if self.tools else None
                    return Row(index, None, said, label, tools=tools)
        except Fault as fault:
            return Row(index, slice=label, fault=str(fault), malformed=fault.malformed)
        except RecursionError:
            return Row(index, slice=label, fault="nested too deeply")
        wanted = " or ".join(repr(reading.main) for reading in readings)
        return Row(index, slice=label, fault=f"{wanted} is empty")


def _files(config: SourceConfig) -> tuple[list[Path], list[str]]:
    if config.path == "reference":
        path = REFERENCE_CORPUS / f"{config.split}.parquet"
        if not path.is_file():
            splits = sorted(file.stem for file in REFERENCE_CORPUS.glob("*.parquet"))
            raise InputError(f"data.split = {config.split!r} is not in the shipped corpus; it has {splits}")
        return [path], []
    path = Path(config.path).expanduser()
    if path.is_dir():
        files, skipped = find_files(path, config.split)
        if not files:
            hidden = f" (hidden: {', '.join(skipped[:NAMED])})" if skipped else ""
            raise InputError(f"data.path = {config.path!r} is a folder without {KNOWN} files{hidden}")
        return files, skipped
    if content_of(path) is not None:
        if not path.is_file():
            raise InputError(
                f"data.path = {config.path!r} does not exist; give a .jsonl or .parquet file, or another of {KNOWN}"
            )
        return [path], []
    if path.exists():
        raise InputError(
            f"data.path = {config.path!r} is neither .jsonl nor .parquet nor another of {KNOWN}; {remedy_of(path)}"
        )
    return [], []


def _dataset(config: SourceConfig) -> Any:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    if config.path.startswith((".", "/", "~")):
        raise InputError(
            f"data.path = {config.path!r} does not exist; give a .jsonl or .parquet file or a folder"
        )
    try:
        return datasets.load_dataset(config.path, config.name, split=config.split)
    except DatasetNotFoundError:
        raise InputError(
            f"data.path = {config.path!r} is neither a file here nor a data set on the hub (or the hub "
            "cannot be reached); give a .jsonl or .parquet file, a folder of them, or 'reference'"
        ) from None
    except Exception as error:  # unknown split or configuration, scripts, no network: all told by the message
        raise InputError(
            f"data.path = {config.path!r}, name {config.name!r}, split {config.split!r}: the data set cannot "
            f"be loaded ({type(error).__name__}: {first_line(error)}); check data.name and data.split, or give a file"
        ) from None


def _readings(
    config: SourceConfig, existing: dict[Path | None, list[str]]
) -> dict[Path | None, list[Reading]]:
    """How to read each file: as the options say, else as its columns do, else as those of the other files do."""
    names = list(dict.fromkeys(name for columns in existing.values() for name in columns))
    if given := _given(config):
        return dict.fromkeys(existing, given)
    if config.format == "auto":
        found = {path: recognise(columns) for path, columns in existing.items()}
    else:
        form = FORMS[config.format]
        found = {
            path: [reading] if (reading := form.find(columns)) else [] for path, columns in existing.items()
        }
    known = list(dict.fromkeys(reading for readings in found.values() for reading in readings))
    if known:
        return {path: readings or known for path, readings in found.items()}
    if not names:
        raise InputError(
            f"{config.path}: no readable rows; expected one JSON object a line, an array of them, or a table"
        )
    if config.format != "auto":
        raise InputError(
            f"data.format = {config.format!r} needs columns that {config.path} has not; its columns are {names}; "
            f"the forms are {known_forms()}"
        )
    if why := next((told for columns in existing.values() if (told := misfit(columns))), None):
        raise InputError(f"{config.path}: {why}")
    raise InputError(
        f"{config.path} has neither a 'text' nor a 'messages' column but {names}, and they make none of the other "
        f"forms ({known_forms()}); name one in data.text or data.messages, or rename columns"
    )


def _given(config: SourceConfig) -> list[Reading]:
    """The readings that data.messages and data.text name."""
    form = "sharegpt" if config.format == "sharegpt" else "messages"
    if (config.text or config.messages) and config.format not in ("auto", "text", "messages", "sharegpt"):
        raise InputError(
            f"data.format = {config.format!r} has columns of its own; leave out data.text and data.messages"
        )
    if (config.text and config.format in ("messages", "sharegpt")) or (
        config.messages and config.format == "text"
    ):
        raise InputError(
            f"data.format = {config.format!r} leaves out one of data.text and data.messages; so do you"
        )
    readings = [Reading(form, (("messages", config.messages),))] if config.messages else []
    return readings + ([Reading("text", (("text", config.text),))] if config.text else [])


def _columns(
    config: SourceConfig, readings: list[Reading], existing: dict[Path | None, list[str]]
) -> Columns:
    named = {reading.form: reading.main for reading in readings}
    label = config.slice or ("slice" if config.path == "reference" else None)
    names = list(dict.fromkeys(name for columns in existing.values() for name in columns))
    if not names:
        raise InputError(f"{config.path}: no readable rows; expected one JSON object a line or a table")
    for option, name in (("text", config.text), ("messages", config.messages), ("slice", label)):
        if name is not None and name not in names:
            raise InputError(
                f"data.{option} = {name!r} is not a column of {config.path}; its columns are {names}"
            )
    return Columns(named.get("text"), named.get("messages"), label)
