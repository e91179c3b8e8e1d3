"""Checkpoints are whole or not there, and are of the training that resumes them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tinyonn.errors import InputError
from tinyonn.train.checkpoint import Checkpoints

TENSORS = {"a/b": torch.arange(6.0).view(2, 3), "none": torch.zeros(0, dtype=torch.float64)}


def test_the_latest_comes_back_bit_for_bit_and_old_ones_go(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, {"assembly": "x", "lr": 0.1}, keep=2)
    assert kept.latest() is None
    for step in (2, 4, 6):
        kept.save(step, {name: tensor + step for name, tensor in TENSORS.items()}, {"step": step})
    found = Checkpoints(tmp_path, {"assembly": "x", "lr": 0.1}).latest()
    assert found is not None and (found.step, found.state) == (6, {"step": 6})
    assert torch.equal(found.tensors["a/b"], TENSORS["a/b"] + 6) and found.tensors["none"].numel() == 0
    assert [path.name for path in kept.paths()] == ["checkpoint-00000004", "checkpoint-00000006"]


@pytest.mark.parametrize("damage", ["bit", "cut", "json", "gone"])
def test_a_damaged_one_is_passed_over_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Checkpoints(tmp_path, {})
    kept.save(1, TENSORS, {})
    path = kept.save(2, TENSORS, {})
    file = path / ("state.json" if damage == "json" else "state.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[-3] ^= 16
    file.write_bytes(content if damage == "bit" else content[:-7])
    if damage == "gone":
        file.unlink()
    with caplog.at_level(logging.WARNING):
        found = kept.latest()
    assert found is not None and found.step == 1
    assert "checkpoint-00000002 is damaged" in caplog.text


def test_what_a_kill_left_behind_is_not_a_checkpoint(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, {})
    kept.save(1, TENSORS, {})
    half = tmp_path / ".checkpoint-00000002.part"
    half.mkdir()
    (half / "state.json").write_text("{}")
    found = kept.latest()
    assert found is not None and found.step == 1 and not half.exists()


def test_one_of_another_training_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {"assembly": "x", "lr": 0.1}).save(1, TENSORS, {})
    with pytest.raises(InputError, match="assembly is 'x' there and 'y' now"):
        Checkpoints(tmp_path, {"assembly": "y", "lr": 0.1}).latest()
    with pytest.raises(InputError, match=r"lr is 0\.1 there and 0\.2 now"):
        Checkpoints(tmp_path, {"assembly": "x", "lr": 0.2}).latest()
    with pytest.raises(InputError, match=r"lr is 0\.1 there and None now"):
        Checkpoints(tmp_path, {"assembly": "x"}).latest()


def test_options_that_are_no_more_do_not_make_another_training(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {"lr": 0.1, "router.threshold": None, "router.max_k": 4}).save(1, TENSORS, {})
    found = Checkpoints(tmp_path, {"lr": 0.1}).latest()
    assert found is not None and found.step == 1
    Checkpoints(tmp_path, {"lr": 0.1, "router.threshold": 0.5}).save(1, TENSORS, {})
    with pytest.raises(InputError, match=r"router\.threshold is 0\.5 there and None now"):
        Checkpoints(tmp_path, {"lr": 0.1}).latest()
