"""The corpus: tokenised once, in a stored order, into one memory-mapped Arrow file.

`prepare_corpus` reads the source two or three times and holds a few bytes for a row, never the texts:

1. (derived slices only) fit the slices on an even share of the rows;
2. survey: give every row its slice, or the reason why it is set aside;
3. tokenise the rows that are wanted, and write them slice by slice in an order shuffled by ``data.seed``.

A position in a slice's stored order never changes, so that segments are plain half-open ranges of positions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn.base.corpus_file import (
    VERSION,
    Corpus,
    Header,
    Int64,
    RowWriter,
    Sample,
    SetAside,
    read_rows,
    write_corpus,
)
from tinyonn.base.rows import Row, Source
from tinyonn.base.settings import context_length, vocabulary_size
from tinyonn.base.source import model_folder
from tinyonn.base.survey import BAD_SHARE, Survey, common_reasons, survey_rows
from tinyonn.base.tokens import REWRITES, Encoded, encode_rows
from tinyonn.config import Config, DataConfig
from tinyonn.errors import CapacityError, InputError

__all__ = ["Corpus", "Sample", "SetAside", "even_shares", "max_tokens", "prepare_corpus", "stored_order"]

LOG = logging.getLogger(__name__)
LABELS = 2  # how turns are found; a corpus that was labelled otherwise is made anew


@dataclass
class Tokenised:
    """What the third reading finds; `places` are positions in the survey, in the temporary file's order."""

    places: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)
    largest_id: int = 0
    notes: Counter[str] = field(default_factory=Counter)  # what was done to rows, by number of rows


def prepare_corpus(config: Config, tokenizer: Any, path: Path) -> Corpus:
    """Tokenise the corpus into a file, or open the file if it was made from the same source and options.

    Parameters
    ----------
    config : Config
    tokenizer : transformers.PreTrainedTokenizerBase
        Of ``config.model``.
    path : Path
        The Arrow file; its folder is made.

    Raises
    ------
    InputError
        An unreadable source, a missing column, no usable row, over 5 % malformed rows, over 16 slices, a chat
        template that cannot be labelled, or ``data.max_tokens`` beyond the model's context.
    CapacityError
        The disk is full.
    """
    limit = max_tokens(config)
    source = Source(config.data)
    key = _key(config.data, source, tokenizer, limit)
    if path.exists():
        try:
            existing = Corpus(path)
            if existing.header.key == key:
                return existing
        except InputError:
            pass  # unreadable or of another version: made anew
    path.parent.mkdir(parents=True, exist_ok=True)
    survey = survey_rows(source, config.data)
    LOG.info("data: %s", source.described(len(survey.indices), len(survey.set_aside)))
    scratch = path.with_name(f"{path.name}.{os.getpid()}.unordered")
    try:
        found = _tokenise_enough(source, survey, config.data, tokenizer, limit, scratch)
        _check(found, survey, config)
        for note, rows in sorted(found.notes.items()):
            LOG.info("data: %s conversation(s): %s", f"{rows:,}", note)
        return _write(path, key, limit, survey, found, config.data, scratch)
    except OSError as error:
        if error.errno == 28:
            raise CapacityError(
                f"{path}: no space left for the tokenised corpus; free some or move storage.root"
            ) from None
        raise
    finally:
        scratch.unlink(missing_ok=True)


def max_tokens(config: Config) -> int:
    """Longest sample in tokens: ``data.max_tokens``, or where that is left out at most the model's context.

    Raises
    ------
    InputError
        ``data.max_tokens`` is set beyond the model's context.
    """
    wanted = config.data.max_tokens
    context = context_length(model_folder(config.model, weights=False))
    if context is None or wanted <= context:
        return wanted
    if "max_tokens" in config.data.model_fields_set:
        raise InputError(
            f"data.max_tokens = {wanted} is beyond the context of {config.model.path}, {context} tokens; "
            f"set data.max_tokens to {context} or less"
        )
    return context


def stored_order(counts: Sequence[int], names: Sequence[str], seed: int) -> list[Int64]:
    """Shuffled positions 0..count-1 of each slice, by its name, its size and the seed alone."""
    return [
        np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(count).astype(np.int64)
        for count, name in zip(counts, names, strict=True)
    ]


def even_shares(sizes: Sequence[int], total: int | None) -> list[int]:
    """Split `total` over slices as evenly as their sizes allow; None takes all."""
    if total is None:
        return list(sizes)
    shares = [0] * len(sizes)
    left = min(total, sum(sizes))
    while left:
        open_places = [place for place, size in enumerate(sizes) if shares[place] < size]
        step = max(1, left // len(open_places))
        for place in open_places:
            given = min(step, sizes[place] - shares[place], left)
            shares[place] += given
            left -= given
    return shares


def _members(survey: Survey) -> list[Any]:
    numbers = np.array(survey.numbers, np.int64)
    return [np.flatnonzero(numbers == number) for number in range(len(survey.names))]


def _wanted(survey: Survey, shares: list[int], spare: int, seed: int) -> Any:
    """Mark the rows to tokenise: `shares` of each slice and an eighth more, `spare` times over."""
    members = _members(survey)
    wanted = np.zeros(len(survey.numbers), bool)
    orders = stored_order([len(rows) for rows in members], survey.names, seed)
    for rows, share, order in zip(members, shares, orders, strict=True):
        wanted[rows[order[: share + spare * (share // 8 + 8)]]] = True
    return wanted


def _tokenise_enough(
    source: Source, survey: Survey, config: DataConfig, tokenizer: Any, limit: int, scratch: Path
) -> Tokenised:
    """Tokenise all rows, or with ``data.samples`` as many as it takes: some turn out to be of no use."""
    members = _members(survey)
    shares = even_shares([len(rows) for rows in members], config.samples)
    spare = 1
    while True:
        wanted = _wanted(survey, shares, spare, config.seed)
        found = _tokenise(source, survey, wanted, tokenizer, limit, scratch)
        good = np.zeros(len(wanted), bool)
        good[found.places] = True
        usable = [int(good[rows].sum()) for rows in members]
        hoped = [
            count if wanted[rows].all() else len(rows) for rows, count in zip(members, usable, strict=True)
        ]
        shares = even_shares(hoped, config.samples)
        if wanted.all() or all(count >= share for count, share in zip(usable, shares, strict=True)):
            return found
        spare *= 4


def _tokenise(
    source: Source, survey: Survey, wanted: Any, tokenizer: Any, limit: int, scratch: Path
) -> Tokenised:
    found = Tokenised()
    places: list[int] = []

    def chosen() -> Iterator[Row]:
        usable = (row for row in source if row.fault is None)
        for place, row in enumerate(usable):
            if wanted[place]:
                places.append(place)
                yield row

    with scratch.open("wb") as stream:
        writer = RowWriter(stream, {})
        for number, encoded in enumerate(encode_rows(chosen(), tokenizer, limit)):
            _keep(found, encoded, places[number], survey, writer)
        writer.close()
    return found


def _keep(found: Tokenised, encoded: Encoded, place: int, survey: Survey, writer: RowWriter) -> None:
    if encoded.fault is not None:
        name = survey.names[survey.numbers[place]]
        found.set_aside.append(SetAside(encoded.index, encoded.fault, name))
        return
    if encoded.note is not None:
        found.notes[encoded.note] += 1
    found.places.append(place)
    found.lengths.append(len(encoded.input_ids))
    found.truncated.append(encoded.truncated)
    found.largest_id = max(found.largest_id, int(encoded.input_ids.max()))
    found.digest.update(np.array([encoded.index, len(encoded.input_ids)], np.int64).tobytes())
    found.digest.update(encoded.input_ids.tobytes())
    found.digest.update(encoded.labels.tobytes())
    writer.append(encoded.index, encoded.input_ids, encoded.labels)


def _check(found: Tokenised, survey: Survey, config: Config) -> None:
    garbled = [item for item in found.set_aside if item.reason == REWRITES]
    if len(garbled) > max(1, BAD_SHARE * (len(found.places) + len(found.set_aside))):
        raise InputError(
            f"{config.data.path}: in {len(garbled)} rows, {garbled[0].index} first, {REWRITES}, so the "
            "assistant's turns cannot be found; give the model a chat template with {% generation %} marks"
        )
    if not found.places:
        raise InputError(
            f"{config.data.path}: no usable row left{common_reasons(survey.set_aside + found.set_aside)}"
        )
    vocabulary = vocabulary_size(model_folder(config.model, weights=False))
    if vocabulary is not None and found.largest_id >= vocabulary:
        raise InputError(
            f"{config.model.path}: its tokenizer gives token {found.largest_id} and its vocabulary ends at "
            f"{vocabulary - 1}; put the model's own tokenizer beside it"
        )


def _write(
    path: Path, key: str, limit: int, survey: Survey, found: Tokenised, config: DataConfig, scratch: Path
) -> Corpus:
    numbers = np.array([survey.numbers[place] for place in found.places], np.int64)
    by_name = sorted(range(len(survey.names)), key=lambda number: survey.names[number])
    members = [np.flatnonzero(numbers == number) for number in by_name]
    names = [survey.names[number] for number in by_name]
    # Shuffled anew: rows set aside while tokenising left holes in the order that drew the wanted ones.
    sizes = [len(rows) for rows in members]
    shares = even_shares(sizes, config.samples)
    orders = stored_order(sizes, names, config.seed)
    taken = [rows[order[:share]] for rows, order, share in zip(members, orders, shares, strict=True)]
    rows = np.concatenate(taken)
    slices = {name: len(part) for name, part in zip(names, taken, strict=True) if len(part)}
    found.digest.update(json.dumps(slices).encode())
    found.digest.update(rows.tobytes())
    header = Header(
        key=key,
        fingerprint=found.digest.hexdigest(),
        slices=slices,
        set_aside=sorted(survey.set_aside + found.set_aside, key=lambda item: item.index),
        truncated=sum(found.truncated[row] for row in rows.tolist()),
        tokens=sum(found.lengths[row] for row in rows.tolist()),
        max_tokens=limit,
    )
    slicer = survey.slicer.to_bytes() if survey.slicer is not None else None
    return write_corpus(path, header, slicer, read_rows(scratch, rows))


def _key(config: DataConfig, source: Source, tokenizer: Any, limit: int) -> str:
    parts = {
        "version": VERSION,
        "labels": LABELS,
        "source": source.fingerprint(),
        "tokenizer": _tokenizer_print(tokenizer),
        "max_tokens": limit,
        "samples": config.samples,
        "slices": None if source.columns.slice else config.slices,
        "seed": config.seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_print(tokenizer: Any) -> str:
    if tokenizer.is_fast:
        tree = json.loads(tokenizer.backend_tokenizer.to_str())
        tree.pop("truncation", None)  # these two are left over from the last call and not the tokenizer's own
        tree.pop("padding", None)
    else:
        tree = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content = json.dumps([tree, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
