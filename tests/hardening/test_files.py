"""Sealed JSON: whatever bit turns, the same content, an error that names the file, or a line that is left out."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hardening.flips import flipped, outcome
from tinyonn.errors import StoreDamagedError
from tinyonn.files import digest_of, line_of, read_derived, read_json, read_log, write_json, write_whole

TREE: dict[str, Any] = {
    "budget": 0.25,
    "shares": {"model.layers.0.mlp.up_proj.weight": 0.123456789, "ä": 1e-9},
    "found": [1, 2.5, None, True, "J*K"],
    "nested": {"digest": "not ours"},
}


def test_every_bit_of_a_sealed_object_is_guarded(tmp_path: Path) -> None:
    path = tmp_path / "tree.json"
    write_json(path, TREE)
    assert read_json(path, "remedy") == TREE
    whole = path.read_bytes()
    same = 0
    for bit in range(8 * len(whole)):
        path.write_bytes(flipped(whole, bit))
        found = outcome(read_json, path, "make it again")
        if isinstance(found, StoreDamagedError):
            assert str(path) in str(found) and "make it again" in str(found)
        else:
            assert found == TREE
            same += 1  # the case of an exponent or of a digit of an escape
    assert same <= 8


def test_an_object_without_a_digest_is_read_and_a_damaged_one_that_is_derived_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tree.json"
    assert read_derived(path) is None and not caplog.records
    path.write_text(json.dumps(TREE))
    with caplog.at_level(logging.DEBUG, "tinyonn"):
        assert read_derived(path) == TREE
    assert f"{path} has no digest" in caplog.text
    write_json(path, TREE)
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.75"))
    assert read_derived(path) is None
    assert str(path) in caplog.text and "does not match its digest" in caplog.text


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b'{"a": ', b"[" * 200_000])
def test_what_is_no_object_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tree.json"
    path.write_bytes(content)
    with pytest.raises(StoreDamagedError, match=r"tree\.json is damaged .*; delete it"):
        read_json(path, "delete it")


def test_every_bit_of_a_log_is_guarded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"step": step, "values": {"loss": 1 / step, "lr": 1e-5}} for step in (1, 2, 3)]
    path.write_text("".join(map(line_of, lines)))
    assert list(read_log(path)) == lines
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        caplog.clear()
        path.write_bytes(flipped(whole, bit))
        found = list(read_log(path))
        assert all(line in lines for line in found)
        assert found == lines or (str(path) in caplog.text and "line" in caplog.text)


def test_a_line_that_a_kill_cut_off_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    line = line_of({"step": 1, "loss": 2.5})
    for end in range(1, len(line)):
        path.write_text(line + line[:end])
        assert len(list(read_log(path))) == (2 if end == len(line) - 1 else 1)
    assert not caplog.records and list(read_log(tmp_path / "none")) == []


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "tree.json"
    write_json(path, TREE)

    def broken(side: Path) -> None:
        side.write_text("half")
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, broken)
    assert read_json(path, "") == TREE
    assert [entry.name for entry in tmp_path.iterdir()] == ["tree.json"]


def test_the_digest_is_that_of_the_content_however_it_is_written() -> None:
    tree = {"b": 1, "a": [1.0, "\u00e4"]}
    assert digest_of(tree) == digest_of({"a": [1.0, "ä"], "b": 1, "digest": "any"})
    assert digest_of(tree) != digest_of({"a": [1, "ä"], "b": 1})
    assert not np.isnan(len(digest_of({"a": float("nan")})))
