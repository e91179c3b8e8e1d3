"""Read a corpus row by row: JSONL, Parquet, folders of either, `datasets` names, or the corpus that ships.

A row that cannot be used is not an error but a `Row` with a `fault`; a source that cannot be read is one.
Rows are numbered through all files in the order of their names: line of a JSONL file, row of a Parquet file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinyonn.base.source import BASE, sha256
from tinyonn.config import DataConfig
from tinyonn.errors import InputError

REFERENCE_CORPUS = BASE / "reference" / "corpus"
BATCH = 256
PEEK = 1000  # lines of a JSONL file that are searched for its columns

Message = dict[str, Any]


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
    """

    index: int
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    slice: str | None = None
    fault: str | None = None
    malformed: bool = False

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

    @property
    def names(self) -> list[str]:
        """The columns to read, each once."""
        return list(dict.fromkeys(name for name in (self.text, self.messages, self.slice) if name))


class Source:
    """A corpus that can be read several times over, always in the same order.

    Parameters
    ----------
    config : DataConfig

    Raises
    ------
    InputError
        No such file, folder or data set, an unreadable Parquet file, or a column that is not there.
    """

    def __init__(self, config: DataConfig) -> None:
        self.path = config.path
        self.files = _files(config)
        self.dataset: Any = None if self.files else _dataset(config)
        self.columns = _columns(config, self._existing())

    def fingerprint(self) -> str:
        """Hash of what is read: the columns, and the files' bytes in order or the data set's fingerprint."""
        digest = hashlib.sha256(repr(self.columns).encode())
        for path in self.files:
            digest.update(sha256(path).encode())
        if self.dataset is not None:
            digest.update(str(self.dataset._fingerprint).encode())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        first = 0
        for path in self.files:
            records = _parquet(path, self.columns.names) if path.suffix == ".parquet" else _jsonl(path)
            last = first - 1
            for number, record in records:
                last = first + number
                yield self._row(last, record)
            first = last + 1
        if self.dataset is not None:
            for number, record in enumerate(self.dataset.select_columns(self.columns.names)):
                yield self._row(number, record)

    def _row(self, index: int, record: dict[str, Any] | str) -> Row:
        if isinstance(record, str):
            return Row(index, fault=record, malformed=True)
        columns = self.columns
        messages = record.get(columns.messages) if columns.messages else None
        text = record.get(columns.text) if columns.text else None
        name = record.get(columns.slice) if columns.slice else None
        label = None if name is None else str(name)
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                return Row(index, slice=label, fault=f"not UTF-8 ({error.reason})", malformed=True)
        if messages:
            fault = _messages_fault(messages)
            return Row(index, None, None if fault else tuple(messages), label, fault)
        if text is None:
            wanted = " or ".join(repr(name) for name in (columns.messages, columns.text) if name)
            return Row(index, slice=label, fault=f"{wanted} is empty")
        if not isinstance(text, str):
            return Row(index, slice=label, fault=f"{columns.text!r} is {type(text).__name__}, not a string")
        fault = "empty text" if not text.strip() else _unicode_fault(text)
        return Row(index, None if fault else text, None, label, fault)

    def _existing(self) -> list[str]:
        if self.dataset is not None:
            return list(self.dataset.column_names)
        names: dict[str, None] = {}
        for path in self.files:
            if path.suffix == ".parquet":
                found = _open_parquet(path).schema_arrow.names
                if names and not set(names) <= set(found):
                    raise InputError(
                        f"{path}: its columns {found} are not those of the files before, {list(names)}"
                    )
                names.update(dict.fromkeys(found))
            else:
                for _, record in islice(_jsonl(path), PEEK):
                    names.update(dict.fromkeys(record if isinstance(record, dict) else ()))
        return list(names)


def _files(config: DataConfig) -> list[Path]:
    if config.path == "reference":
        path = REFERENCE_CORPUS / f"{config.split}.parquet"
        if not path.is_file():
            splits = sorted(file.stem for file in REFERENCE_CORPUS.glob("*.parquet"))
            raise InputError(f"data.split = {config.split!r} is not in the shipped corpus; it has {splits}")
        return [path]
    path = Path(config.path).expanduser()
    if path.is_dir():
        files = sorted(file for kind in ("*.parquet", "*.jsonl") for file in path.rglob(kind))
        if not files:
            raise InputError(f"data.path = {config.path!r} is a folder without .parquet or .jsonl files")
        return files
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise InputError(f"data.path = {config.path!r} does not exist; give a .jsonl or .parquet file")
        return [path]
    if path.exists():
        raise InputError(
            f"data.path = {config.path!r} is neither .jsonl nor .parquet; convert it to one of them"
        )
    return []


def _dataset(config: DataConfig) -> Any:
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
        reason = (str(error).strip().splitlines() or ["no message"])[0][:300]
        raise InputError(
            f"data.path = {config.path!r}, name {config.name!r}, split {config.split!r}: the data set cannot "
            f"be loaded ({type(error).__name__}: {reason}); check data.name and data.split, or give a file"
        ) from None


def _columns(config: DataConfig, existing: list[str]) -> Columns:
    text, messages, label = config.text, config.messages, config.slice
    if text is None and messages is None:
        messages = "messages" if "messages" in existing else None
        text = "text" if "text" in existing else None
        if not existing:
            raise InputError(
                f"{config.path}: no readable rows; expected one JSON object a line or a Parquet table"
            )
        if text is None and messages is None:
            raise InputError(
                f"{config.path} has neither a 'text' nor a 'messages' column but {existing}; name one in "
                "data.text or data.messages"
            )
    if config.path == "reference":
        label = label or "slice"
    for option, name in (("text", text), ("messages", messages), ("slice", label)):
        if name is not None and name not in existing:
            raise InputError(
                f"data.{option} = {name!r} is not a column of {config.path}; its columns are {existing}"
            )
    return Columns(text, messages, label)


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield number, f"not UTF-8 at byte {error.start} of the line"
            except (json.JSONDecodeError, RecursionError) as error:
                yield number, f"malformed JSON ({error})"
            else:
                yield number, record if isinstance(record, dict) else "malformed JSON (not an object)"


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a readable Parquet file, perhaps truncated ({str(error).splitlines()[0]}); "
            "fetch it again"
        ) from None


def _parquet(path: Path, names: list[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    number = 0
    with _open_parquet(path) as table:
        try:
            for batch in table.iter_batches(BATCH, columns=names):
                for record in _records(batch):
                    yield number, record
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{path}: unreadable from row {number} on ({str(error).splitlines()[0]}); fetch it again"
            ) from None


def _records(batch: Any) -> Iterator[dict[str, Any] | str]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):  # Arrow does not check its strings: find out which one it is
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"not UTF-8 ({error.reason})"


def _messages_fault(messages: Any) -> str | None:
    if not isinstance(messages, list):
        return f"messages are {type(messages).__name__}, not a list"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "a message without a 'role'"
        if not isinstance(message.get("content"), str):
            return f"a {message['role']} message without a text as 'content'"
        if fault := _unicode_fault(message["content"]):
            return fault
    if not any(message["content"].strip() for message in messages):
        return "empty text"
    return None


def _unicode_fault(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not valid Unicode ({error.reason})"
    return None
