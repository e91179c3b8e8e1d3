"""Files of data as nobody should have them: a corpus or a message, within seconds and within memory, never a traceback.

Each goes through all that ``tinyonn record`` does with data before a model is loaded: the columns, the survey, the
slices, the tokens and the corpus file.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from tests.hardening.data_files import files
from tests.hardening.fuzz import COMMON, bounded
from tinyonn.config import ModelConfig, parse_config
from tinyonn.corpus.corpus import prepare_corpus
from tinyonn.corpus.tokens import UNLABELLED
from tinyonn.dense.load import load_tokenizer
from tinyonn.errors import TinyONNError

seen: Counter[str] = Counter()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ModelConfig())


def tried(ending: str, content: bytes, folder: Path, tokenizer: Any, **data: Any) -> str:
    """What becomes of a file: the kind of its error, or a corpus that is right; anything else is raised."""
    path, corpus_path = folder / f"rows{ending}", folder / "corpus.arrow"
    path.write_bytes(content)
    corpus_path.unlink(missing_ok=True)
    config = parse_config({"data": {"path": str(path), "max_tokens": 64, **data}})
    kind, message = "corpus", ""
    with bounded():
        try:
            corpus = prepare_corpus(config, tokenizer, corpus_path)
            for name, count in corpus.slices.items():
                for position in range(min(count, 20)):
                    sample = corpus.sample(name, position)
                    assert 2 <= len(sample.input_ids) == len(sample.labels) <= 64
                    assert (sample.labels != UNLABELLED).any()
                    assert np.isin(sample.labels, [UNLABELLED, *sample.input_ids.tolist()]).all()
        except TinyONNError as error:
            kind, message = type(error).__name__, str(error)
        finally:
            path.unlink()
    assert (kind == "corpus") == (not message)
    assert len(message) < 10_000
    return kind


@settings(max_examples=40, **COMMON)
@given(file=files())
def test_a_random_file(
    file: tuple[str, bytes, dict[str, Any]], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seen[tried(*file[:2], tmp_path_factory.getbasetemp(), tokenizer, **file[2])] += 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=300, **COMMON)
@given(file=files())
def test_three_hundred_random_files(
    file: tuple[str, bytes, dict[str, Any]], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seen[tried(*file[:2], tmp_path_factory.getbasetemp(), tokenizer, **file[2])] += 1
