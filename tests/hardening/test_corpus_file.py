"""The tokenised corpus: whatever bit turns, the same samples or an error that names the file."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.hardening.flips import flipped, outcome
from tinyonn.corpus.file import Corpus, Header, Sample, write_corpus
from tinyonn.corpus.token_rows import RowWriter
from tinyonn.errors import StoreDamagedError

SLICES = {"code": 700, "prose": 500}
VOCABULARY = 300


def rows(seed: int = 0) -> list[tuple[int, Any, Any]]:
    chance = np.random.default_rng(seed)
    found = []
    for index in range(sum(SLICES.values())):
        tokens = chance.integers(0, VOCABULARY, chance.integers(2, 12)).astype(np.int32)
        labels = np.where(chance.random(tokens.size) < 0.3, -100, tokens).astype(np.int32)
        found.append((index, tokens, labels))
    return found


def header() -> Header:
    return Header("key", "fingerprint", SLICES, [], 0, 1, 12, vocabulary=VOCABULARY)


def written(path: Path) -> Corpus:
    return write_corpus(path, header(), b"how slices were derived", iter(rows()))


def everything(path: Path) -> Any:
    corpus = Corpus(path)
    samples = [plain(corpus.sample(name, at)) for name, count in SLICES.items() for at in range(count)]
    return asdict(corpus.header), corpus.slicer, samples


def plain(sample: Sample) -> tuple[Any, ...]:
    return sample.index, sample.slice, sample.input_ids.tolist(), sample.labels.tolist()


def flips(path: Path, count: int, seed: int) -> int:
    """Turn bits; how many gave an error. None may give other samples."""
    before, whole, chance, errors = everything(path), path.read_bytes(), random.Random(seed), 0
    for _ in range(count):
        bit = chance.randrange(8 * len(whole))
        other = path.with_name(f"flipped-{bit}.arrow")
        other.write_bytes(flipped(whole, bit))
        found = outcome(everything, other)
        if isinstance(found, StoreDamagedError):
            errors += 1
            assert str(other) in str(found) and "delete it" in str(found)
        else:
            assert found == before
        other.unlink()
    return errors


def test_no_turned_bit_gives_other_samples(tmp_path: Path) -> None:
    written(tmp_path / "corpus.arrow")
    assert flips(tmp_path / "corpus.arrow", 60, 1) > 30


@pytest.mark.slow
def test_no_turned_bit_of_many_gives_other_samples(tmp_path: Path) -> None:
    written(tmp_path / "corpus.arrow")
    assert flips(tmp_path / "corpus.arrow", 1500, 2) > 1000


def older(path: Path, content: list[tuple[int, Any, Any]]) -> Path:
    """A file as earlier versions wrote it: no digests, no vocabulary."""
    tree = {name: value for name, value in asdict(header()).items() if name not in ("vocabulary", "slicer")}
    side = path.with_suffix(".sealed")
    with side.open("wb") as stream:
        writer = RowWriter(stream, {b"tinyonn": json.dumps(tree).encode()})
        for row in content:
            writer.append(*row)
        writer.close()
    table = pa.ipc.open_file(pa.memory_map(str(side))).read_all()  # without what batches say of themselves
    with pa.ipc.new_file(str(path), table.schema) as plain_writer:
        plain_writer.write_table(table)
    return path


def test_an_older_file_is_read_and_must_be_possible(tmp_path: Path) -> None:
    path = older(tmp_path / "older.arrow", rows())
    corpus = Corpus(path).check()
    assert corpus.longest == max(len(tokens) for _, tokens, _ in rows())
    assert plain(corpus.sample("prose", 3)) == plain(written(tmp_path / "new.arrow").sample("prose", 3))
    for name, token, label in (("token", -1, -100), ("label", 5, -7)):
        wrong = rows()
        wrong[3] = (3, np.array([1, token], np.int32), np.array([1, label], np.int32))
        with pytest.raises(StoreDamagedError, match=name):
            Corpus(older(tmp_path / f"{name}.arrow", wrong)).sample("code", 3)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    wrong = rows()
    wrong[600] = (600, np.array([1, VOCABULARY], np.int32), np.array([-100, -100], np.int32))
    corpus = write_corpus(tmp_path / "corpus.arrow", header(), None, iter(wrong))
    assert corpus.sample("code", 0).index == 0
    with pytest.raises(StoreDamagedError, match=f"token outside the vocabulary of {VOCABULARY}"):
        corpus.sample("code", 600)


def test_rows_that_are_missing_are_missed(tmp_path: Path) -> None:
    write_corpus_of = rows()[:-1]
    with pytest.raises(StoreDamagedError, match="it has 1199 rows and says 1200"):
        write_corpus(tmp_path / "corpus.arrow", header(), None, iter(write_corpus_of))
