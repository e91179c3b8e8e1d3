"""The corpus: tokenised once, in a stored order, into one memory-mapped Arrow file.

`prepare_corpus` reads the sources two or three times and holds a few bytes for a row, never the texts:

1. (derived slices only) fit the slices on an even share of the rows;
2. survey: give every row its slice, or the reason why it is set aside;
3. tokenise the rows that are wanted, and write them slice by slice in a shuffled order.

A position in a slice's stored order never changes, so that segments are plain half-open ranges of positions; what is
added to a corpus later comes after what is there (`tinyonn.corpus.growth`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn.config import Config, ModelConfig
from tinyonn.corpus.file import (
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
from tinyonn.corpus.growth import Earlier, as_digests, content_digest
from tinyonn.corpus.mixture import Group, Mixture, even_shares, find_groups, group_shares, stored_order
from tinyonn.corpus.rows import Row
from tinyonn.corpus.slices import BAD_SHARE, Survey, common_reasons
from tinyonn.corpus.tokens import REWRITES, Encoded, encode_rows
from tinyonn.dense.settings import context_length, vocabulary_size
from tinyonn.dense.source import model_folder
from tinyonn.errors import CapacityError, InputError, StoreDamagedError
from tinyonn.files import make_private
from tinyonn.show.progress import counted

__all__ = ["Corpus", "Sample", "SetAside", "even_shares", "max_tokens", "prepare_corpus", "stored_order"]

LOG = logging.getLogger(__name__)
LABELS = 3  # how turns are found; a corpus that was labelled otherwise is made anew


@dataclass
class Tokenised:
    """What the third reading finds; `places` are positions in the survey, in the temporary file's order."""

    places: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    truncated: bytearray = field(default_factory=bytearray)
    set_aside: list[SetAside] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)
    largest_id: int = 0
    notes: Counter[str] = field(default_factory=Counter)  # what was done to rows, by number of rows
    contents: bytearray = field(default_factory=bytearray)  # digest of each row, to find those that are there
    shares: dict[tuple[str, int], int] = field(default_factory=dict)  # rows to take by slice and source
    whole: bool = False  # whether all usable rows were tokenised


def prepare_corpus(config: Config, tokenizer: Any, path: Path, earlier: Earlier | None = None) -> Corpus:
    """Tokenise the corpus into a file, or open the file if it was made from the same source and options.

    Parameters
    ----------
    config : Config
    tokenizer : transformers.PreTrainedTokenizerBase
        Of ``config.model``.
    path : Path
        The Arrow file; its folder is made.
    earlier : Earlier, optional
        What the corpus was: its samples stay where they are if all of them are there still, else it is made anew.

    Raises
    ------
    InputError
        An unreadable source, a missing column, no usable row, over 5 % malformed rows, over 16 slices, a chat
        template that cannot be labelled, or ``data.max_tokens`` beyond the model's context.
    CapacityError
        The disk is full.
    """
    limit = max_tokens(config)
    mixture = Mixture(config.data)
    makings, key = _keys(mixture, tokenizer, limit)
    if path.exists():
        try:
            existing = Corpus(path)
            if existing.header.key == key and (earlier is None or existing.begins_with(earlier.fingerprint)):
                return existing.check()
        except InputError:
            pass  # of another version: made anew
        except StoreDamagedError as error:
            LOG.warning("%s; it is made anew now", str(error).partition("; ")[0])
    if earlier is not None and not _made_alike(earlier, *makings):
        earlier = None
    make_private(path.parent)
    survey = mixture.survey(None if earlier is None else earlier.slicer)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.unordered")
    try:
        found = _tokenise_enough(mixture, survey, tokenizer, limit, scratch, earlier)
        first = {} if earlier is None else _places_of(earlier, found, survey)
        if earlier is not None and _lost(first) and not found.whole:  # its rows may have other numbers now
            found = _tokenise_enough(mixture, survey, tokenizer, limit, scratch, earlier, whole=True)
            first = _places_of(earlier, found, survey)
        _check(found, survey, config)
        if earlier is not None and (lost := _lost(first)):
            _warn_of_lost(earlier, lost)
            return prepare_corpus(config, tokenizer, path)
        described = mixture.described(survey)
        for line in described:
            LOG.info("data: %s", line)
        for note, rows in sorted(found.notes.items()):
            LOG.info("data: %s row(s): %s", f"{rows:,}", note)
        return _Writing(path, config.model, mixture, survey, found, scratch).write(
            earlier, first, key=key, making=makings[0], described=described, max_tokens=limit
        )
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


def _wanted(groups: list[Group], shares: list[int], spare: int, survey: Survey, seed: int) -> Any:
    """Mark the rows to tokenise: `shares` of each group and an eighth more, `spare` times over."""
    wanted = np.zeros(len(survey.numbers), bool)
    for rows, share, order in zip(groups, shares, _orders(groups, survey.names, seed), strict=True):
        wanted[rows.rows[order[: share + spare * (share // 8 + 8)]]] = True
    return wanted


def _orders(groups: list[Group], names: list[str], seed: int) -> list[Int64]:
    return stored_order([len(group.rows) for group in groups], [names[group.slice] for group in groups], seed)


def _tokenise_enough(
    mixture: Mixture,
    survey: Survey,
    tokenizer: Any,
    limit: int,
    scratch: Path,
    first: Earlier | None,
    whole: bool = False,
) -> Tokenised:
    """Tokenise all rows, or as many as it takes where not all are wanted: some turn out to be of no use."""
    config = mixture.config
    groups = find_groups(survey.numbers, survey.parts)
    shares = group_shares(groups, [len(group.rows) for group in groups], config)
    spare = 1
    while True:
        wanted = _wanted(groups, shares, spare, survey, config.seed)
        if whole:
            wanted[:] = True
        elif first is not None:
            wanted |= np.isin(np.array(survey.indices, np.int64), first.indices())
        found = _tokenise(mixture, survey, wanted, tokenizer, limit, scratch)
        good = np.zeros(len(wanted), bool)
        good[found.places] = True
        usable = [int(good[group.rows].sum()) for group in groups]
        hoped = [
            count if wanted[group.rows].all() else len(group.rows)
            for group, count in zip(groups, usable, strict=True)
        ]
        shares = group_shares(groups, hoped, config)
        if wanted.all() or all(count >= share for count, share in zip(usable, shares, strict=True)):
            keys = [(survey.names[group.slice], group.source) for group in groups]
            found.shares, found.whole = dict(zip(keys, shares, strict=True)), bool(wanted.all())
            return found
        spare *= 4


def _tokenise(
    mixture: Mixture, survey: Survey, wanted: Any, tokenizer: Any, limit: int, scratch: Path
) -> Tokenised:
    found = Tokenised()
    places: list[int] = []

    def chosen() -> Iterator[Row]:
        usable = (row for _, row in mixture.rows() if row.fault is None)
        for place, row in enumerate(usable):
            if wanted[place]:
                places.append(place)
                yield row

    with scratch.open("wb") as stream:
        writer = RowWriter(stream, {})
        rows = counted(chosen(), "tokenising", int(wanted.sum()), "rows")
        for number, encoded in enumerate(encode_rows(rows, tokenizer, limit, mixture.config.rendered)):
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
    found.contents += content_digest(encoded.input_ids, encoded.labels)
    writer.append(encoded.index, encoded.input_ids, encoded.labels)


def _places_of(earlier: Earlier, found: Tokenised, survey: Survey) -> dict[str, Int64]:
    """Where the earlier samples of each slice lie among the tokenised rows; -1 for one that is not there."""
    places = np.array(found.places, np.int64)
    numbers = np.array(survey.numbers, np.int64)[places]
    members = {name: np.flatnonzero(numbers == number) for number, name in enumerate(survey.names)}
    return earlier.find(members, np.array(survey.indices, np.int64)[places], as_digests(found.contents))


def _lost(places: dict[str, Int64]) -> dict[str, int]:
    """Samples of each slice that are not there, where there are any."""
    return {name: count for name, rows in places.items() if (count := int((rows < 0).sum()))}


def _warn_of_lost(earlier: Earlier, lost: dict[str, int]) -> None:
    LOG.warning(
        "%d of the %d samples that the run was begun with are not in the data now, first some of slice %s: rows were "
        "changed or removed, or they spell out special tokens of the model, which are text now (they were read as "
        "tokens by versions before; data.rendered: true still does so)",
        sum(lost.values()),
        sum(earlier.slices.values()),
        min(lost),
    )


def _check(found: Tokenised, survey: Survey, config: Config) -> None:
    garbled = [item for item in found.set_aside if item.reason == REWRITES]
    if len(garbled) > max(1, BAD_SHARE * (len(found.places) + len(found.set_aside))):
        raise InputError(
            f"{config.data.told}: in {len(garbled)} rows, {garbled[0].index} first, {REWRITES}, so the "
            "assistant's turns cannot be found; give the model a chat template with {% generation %} marks"
        )
    if not found.places:
        raise InputError(
            f"{config.data.told}: no usable row left{common_reasons(survey.set_aside + found.set_aside)}"
        )
    vocabulary = vocabulary_size(model_folder(config.model, weights=False))
    if vocabulary is not None and found.largest_id >= vocabulary:
        raise InputError(
            f"{config.model.path}: its tokenizer gives token {found.largest_id} and its vocabulary ends at "
            f"{vocabulary - 1}; put the model's own tokenizer beside it"
        )


@dataclass(frozen=True)
class _Writing:
    """The last step: the tokenised rows that are taken, in their stored order."""

    path: Path
    model: ModelConfig
    mixture: Mixture
    survey: Survey
    found: Tokenised
    scratch: Path

    def write(self, earlier: Earlier | None, first: dict[str, Int64], **known: Any) -> Corpus:
        """Write the file; `first` are the rows that each slice begins with, `known` is of its header."""
        found, survey = self.found, self.survey
        taken = self._taken(first)
        rows = np.concatenate(list(taken.values()))
        slices = {name: len(part) for name, part in taken.items()}
        header = Header(
            **known,
            fingerprint=self._fingerprint(earlier, taken, slices),
            slices=slices,
            set_aside=sorted(survey.set_aside + found.set_aside, key=lambda item: item.index),
            vocabulary=vocabulary_size(model_folder(self.model, weights=False)) or 0,
            truncated=int(np.array(found.truncated)[rows].sum()),
            tokens=int(np.array(found.lengths, np.int64)[rows].sum()),
            grown_from=[] if earlier is None else earlier.line[: -1 if slices == earlier.slices else None],
        )
        slicer = survey.slicer.to_bytes() if survey.slicer is not None else None
        content = read_rows(self.scratch, rows)
        if earlier is not None and slices == earlier.slices:
            # The same corpus: what is known of its rows by their numbers stays true.
            content = ((int(index), *row[1:]) for index, row in zip(earlier.indices(), content, strict=True))
        return write_corpus(self.path, header, slicer, content)

    def _taken(self, first: dict[str, Int64]) -> dict[str, Int64]:
        """Rows of each slice, in their stored order."""
        survey, seed = self.survey, self.mixture.config.seed
        names = sorted(survey.names)
        numbers = [names.index(name) for name in survey.names]
        groups = find_groups(
            [numbers[survey.numbers[place]] for place in self.found.places],
            [survey.parts[place] for place in self.found.places],
        )
        # Shuffled anew: rows set aside while tokenising left holes in the order that drew the wanted ones.
        shares = [self.found.shares[names[group.slice], group.source] for group in groups]
        rest: list[Group] = []
        for place, group in enumerate(groups):
            mine = np.isin(group.rows, first.get(names[group.slice], ()))
            shares[place] = max(0, shares[place] - int(mine.sum()))
            rest.append(Group(group.slice, group.source, group.rows[~mine]))
        parts: dict[str, list[Int64]] = {name: [rows] for name, rows in first.items()}
        for group, share, order in zip(rest, shares, _orders(rest, names, seed), strict=True):
            parts.setdefault(names[group.slice], []).append(group.rows[order[:share]])
        whole = {name: np.concatenate(rows) for name, rows in parts.items()}
        return {name: rows for name, rows in whole.items() if len(rows)}

    def _fingerprint(self, earlier: Earlier | None, taken: dict[str, Int64], slices: dict[str, int]) -> str:
        if earlier is None:
            digest = self.found.digest.copy()
            digest.update(json.dumps(slices).encode())
            digest.update(np.concatenate(list(taken.values())).tobytes())
            return str(digest.hexdigest())
        if slices == earlier.slices:
            return earlier.fingerprint
        digest = hashlib.sha256(earlier.fingerprint.encode())
        digest.update(json.dumps(slices).encode())
        for name, rows in taken.items():
            digest.update(as_digests(self.found.contents)[rows[earlier.slices.get(name, 0) :]].tobytes())
        return digest.hexdigest()


def is_corpus_of(config: Config, tokenizer: Any, path: Path) -> bool:
    """Whether a file holds what `prepare_corpus` would make of these options and of the sources as they are now."""
    return Corpus(path).header.key == _keys(Mixture(config.data), tokenizer, max_tokens(config))[1]


def _made_alike(earlier: Earlier, making: str, underived: str) -> bool:
    """Whether the earlier rows were made as they would be now; it may have had no derived slices yet."""
    made = earlier.corpus.header.making
    return made in ("", making) or (earlier.corpus.slicer is None and made == underived)


def _keys(mixture: Mixture, tokenizer: Any, limit: int) -> tuple[tuple[str, str], str]:
    """Hashes of how rows are made, with derived slices and without; and of that, the sources and what is taken."""
    config = mixture.config
    making: dict[str, Any] = {
        "version": VERSION,
        "labels": LABELS,
        "tokenizer": _tokenizer_print(tokenizer),
        "max_tokens": limit,
        "slices": config.slices if mixture.derived else None,
        "seed": config.seed,
    }
    if config.rendered:
        making["rendered"] = True
    source = {"source": mixture.fingerprint(), "samples": config.samples}
    return (_hash(making), _hash({**making, "slices": None})), _hash({**making, **source})


def _hash(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _tokenizer_print(tokenizer: Any) -> str:
    if tokenizer.is_fast:
        tree = json.loads(tokenizer.backend_tokenizer.to_str())
        tree.pop("truncation", None)  # these two are left over from the last call and not the tokenizer's own
        tree.pop("padding", None)
    else:
        tree = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content = json.dumps([tree, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
