"""Build the reference corpus: ``python jobs/build_corpus.py SOURCES [--out FOLDER]``.

`SOURCES` holds the unpacked source packages, which Debian and npm hand out::

    apt-get source --download-only python3.11 sqlite3 postgresql-15 && npm pack electron-i18n
    for archive in *.orig.tar.*; do tar xf $archive; done
    mkdir electron && tar xf electron-i18n-1.3136.0.tgz -C electron

The result is a function of those sources and of `SEED`.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import corpus_dialogue
import corpus_generated as generated
import corpus_sources as sources
import pyarrow as pa
import pyarrow.parquet as pq
from corpus_sources import CPYTHON, ELECTRON, GENERATED, POSTGRES, SQLITE, Document

SEED = 20240
# Digits are single tokens, so equal shares in tokens take fewer bytes where there are many of them.
SLICE_BYTES = {"arithmetic": 3_500_000, "data": 4_700_000}
DEFAULT_BYTES = 6_600_000
SHEET_CHARS = {"arithmetic": 1300, "data": 1600}
HELDOUT_SHARE = {CPYTHON: 0.045, POSTGRES: 0.07, ELECTRON: 0.07}
DEFAULT_SHARE = 0.05
SCHEMA = pa.schema([
    ("slice", pa.string()),
    ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ("text", pa.string()),
    ("source", pa.string()),
])  # fmt: skip


def sheets(name: str, count: int) -> Iterator[Document]:
    """Generated documents of the slice `name`."""
    rng = random.Random(f"{SEED}/{name}")
    make = {"arithmetic": generated.arithmetic, "data": generated.data}[name]
    for index in range(count):
        text = make(rng)
        if len(text) <= SHEET_CHARS[name]:
            yield Document(name, GENERATED, f"{name}/{index}", text=text)


def documents(folder: Path) -> Iterator[Document]:
    """Every candidate document, slice by slice."""
    cpython, sqlite = folder / "Python-3.11.2", folder / "sqlite3-3.40.1"
    postgres, electron = folder / "postgresql-15.18", folder / "electron" / "package"
    for key, text in sources.python_files(cpython):
        yield from sources.cut("python", CPYTHON, key, text)
    for source, key, text in sources.c_files(cpython, sqlite):
        yield from sources.cut("c", source, key, text)
    for key, text in sources.doc_files(cpython):
        yield from sources.cut("prose", CPYTHON, key, text)
    yield from sources.romance_documents(postgres, electron)
    yield from sheets("arithmetic", 7000)
    for key, text in sources.sql_files(postgres):
        yield from sources.cut("data", POSTGRES, key, text)
    yield from sheets("data", 6000)
    yield from corpus_dialogue.dialogue_documents(cpython, postgres, SEED)


def deduplicated(candidates: Iterator[Document]) -> Iterator[Document]:
    """Drop documents whose text, white space aside, was seen before."""
    seen: set[bytes] = set()
    for document in candidates:
        digest = hashlib.sha256(" ".join(document.content().split()).encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield document


def is_heldout(document: Document) -> bool:
    """Whether the document's file is held out; the share is the source's, so all slices agree on a file."""
    return sources.position(document.key) < HELDOUT_SHARE.get(document.source, DEFAULT_SHARE)


def split(candidates: Iterator[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held-out), each slice capped in bytes in an order drawn from their names."""
    slices: dict[str, list[Document]] = defaultdict(list)
    for document in candidates:
        slices[document.slice].append(document)
    train: list[Document] = []
    heldout: list[Document] = []
    for slice_name, members in slices.items():
        room = SLICE_BYTES.get(slice_name, DEFAULT_BYTES)
        for document in sorted(members, key=lambda member: sources.position("order/" + member.key)):
            room -= len(document.content().encode())
            if room < 0:
                break
            (heldout if is_heldout(document) else train).append(document)
    return train, heldout


def write(path: Path, chosen: list[Document]) -> None:
    """Write documents, grouped by slice in order of first appearance, as one zstd-compressed Parquet file."""
    rows = [
        {
            "slice": document.slice,
            "messages": document.messages and [{"role": r, "content": c} for r, c in document.messages],
            "text": document.text,
            "source": document.source,
        }
        for document in chosen
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, compression="zstd", compression_level=19)


def summary(name: str, chosen: list[Document]) -> str:
    """A line per slice: documents, bytes and sources."""
    lines = []
    for slice_name in dict.fromkeys(document.slice for document in chosen):
        members = [document for document in chosen if document.slice == slice_name]
        size = sum(len(document.content().encode()) for document in members)
        origin = {
            s: sum(m.source == s for m in members) for s in (CPYTHON, SQLITE, POSTGRES, ELECTRON, GENERATED)
        }
        counts = ", ".join(f"{source}: {count}" for source, count in origin.items() if count)
        lines.append(f"{name:8} {slice_name:10} {len(members):6} documents {size:9} bytes  {counts}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path)
    parser.add_argument("--out", type=Path, default=Path("tinyonn/reference/corpus"))
    options = parser.parse_args()
    train, heldout = split(deduplicated(documents(options.sources)))
    for name, chosen in (("train", train), ("heldout", heldout)):
        write(options.out / f"{name}.parquet", chosen)
        print(summary(name, chosen))


if __name__ == "__main__":
    main()
