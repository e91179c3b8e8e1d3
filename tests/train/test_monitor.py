"""The monitor: what it writes is what happened, also after a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tinyonn.train.monitor import (
    FILE,
    FORMER,
    Monitor,
    StepFacts,
    load_cv,
    load_dead,
    load_entropy,
    load_over_time,
    read_lines,
)

EXPERTS = 20


class Kept:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.steps[step] = values


def facts(step: int, loss: float = 4.0, collapsed: bool = False, seed: int = 0) -> StepFacts:
    """Sixteen samples with two of twenty experts each."""
    chance = np.random.default_rng([seed, step])
    load = np.zeros(EXPERTS, np.int64)
    for _ in range(16):
        load[[3, 4] if collapsed else chance.permutation(EXPERTS)[:2]] += 1
    return StepFacts(step + 1, {"loss": loss + 0.01 * chance.random(), "kl": 1.0}, load, 16, 1000, 0.5)


def test_measures_of_load() -> None:
    even, one = np.full(10, 7), np.eye(10, dtype=np.int64)[3]
    assert (load_cv(even), load_dead(even)) == (0.0, 0.0)
    assert load_entropy(even) == pytest.approx(1.0)
    assert load_cv(one) == pytest.approx(3.0)  # sqrt(E - 1)
    assert (load_dead(one), load_entropy(one)) == (0.9, 0.0)
    assert load_cv(np.zeros(4, np.int64)) == 0.0
    assert load_entropy(np.array([3, 3, 0, 0])) == pytest.approx(0.5)


def test_a_line_for_every_step(tmp_path: Path) -> None:
    tracker = Kept()
    monitor = Monitor(tmp_path / "train", tracker, window=4)
    given = [facts(step) for step in range(10)]
    for step in given:
        assert monitor.record(step) == []
    lines = list(read_lines(tmp_path / "train" / FILE))
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["load"] for line in lines] == [
        step.load_E.tolist() for step in given if step.load_E is not None
    ]
    last = lines[-1]["values"]
    assert last["loss"] == given[-1].values["loss"]
    assert last["tokens_per_second"] == pytest.approx(2000.0)
    window = np.sum([line["load"] for line in lines[-4:]], axis=0)
    assert last["load_cv"] == pytest.approx(load_cv(window))
    assert tracker.steps[10] == last


def test_without_a_router_there_is_no_load(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    monitor.record(StepFacts(1, {"loss": 3.0}, None, 8, 100, 0.1))
    (line,) = read_lines(tmp_path / FILE)
    assert "load" not in line
    assert sorted(line["values"]) == ["loss", "tokens_per_second"]
    assert monitor.close() is None


def test_collapse_and_spikes_are_told_in_words_with_their_step(tmp_path: Path) -> None:
    told: list[str] = []
    monitor = Monitor(tmp_path, window=10, tell=told.append)
    for step in range(30):
        monitor.record(facts(step))
    assert told == []
    for step in range(30, 60):
        monitor.record(facts(step, collapsed=True))
    assert any("routing has collapsed: the same 2 experts (3, 4) hold" in line for line in told)
    assert sum("collapsed" in line for line in told) == 1
    monitor.record(facts(60, loss=40.0, collapsed=True))
    assert told[-1].startswith("step 61: loss jumped to 40")
    monitor.record(facts(61, loss=math.nan, collapsed=True))
    assert told[-1].startswith("step 62: loss is nan")
    last = list(read_lines(tmp_path / FILE))[-1]
    assert last["values"]["loss"] is None
    assert last["alarms"] == [told[-1].removeprefix("step 62: ")]


def test_experts_that_are_always_on_do_not_count_as_dead(tmp_path: Path) -> None:
    told: list[str] = []
    monitor = Monitor(tmp_path, tell=told.append, shared=(0, 5))
    load = np.array([0, 9, 9, 9, 9, 0, 9, 0])
    for step in range(50):
        monitor.record(StepFacts(step + 1, {}, load, 23, 1000, 0.5))
    last = list(read_lines(tmp_path / FILE))[-1]["values"]
    assert last["load_dead"] == pytest.approx(1 / 6)
    assert [line.split(";")[0] for line in told] == ["step 25: expert 7 holds less than 0.1% of the load"]


def test_a_resumed_monitor_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = Monitor(tmp_path / "whole", window=8)
    for step in range(30):
        whole.record(facts(step))
    killed = Monitor(tmp_path / "killed", window=8)
    for step in range(20):
        killed.record(facts(step))
    path = tmp_path / "killed" / FILE
    path.write_text(path.read_text("utf-8") + '{"step": 21, "sam', "utf-8")
    again = Monitor(tmp_path / "killed", window=8, resumed=12)
    for step in range(12, 30):
        again.record(facts(step))
    assert path.read_text("utf-8") == (tmp_path / "whole" / FILE).read_text("utf-8")


def test_a_training_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its lines were in monitor.jsonl, and their values in curve.jsonl too, with steps from 0."""
    whole = Monitor(tmp_path / "whole", window=8)
    for step in range(30):
        whole.record(facts(step))
    old = tmp_path / "old"
    old.mkdir()
    lines = (tmp_path / "whole" / FILE).read_text("utf-8").splitlines(keepends=True)
    (old / FORMER[0]).write_text("".join(lines[:20]), "utf-8")
    again = Monitor(old, window=8, resumed=12)
    for step in range(12, 30):
        again.record(facts(step))
    assert (old / FILE).read_text("utf-8") == "".join(lines)
    assert not (old / FORMER[0]).exists()


def test_the_heat_map_shows_the_load_over_time(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    for step in range(40):
        monitor.record(facts(step, collapsed=step >= 20))
    load, first, last = load_over_time(tmp_path / FILE, columns=4)
    assert (load.shape, first, last) == ((EXPERTS, 4), 1, 40)
    np.testing.assert_allclose(load.mean(axis=0), 1.0)
    assert (load[:, :2] > 0.3).all()
    assert load[[3, 4], 2:].tolist() == [[10.0, 10.0], [10.0, 10.0]]
    picture = monitor.close()
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_line_is_strict_json(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    monitor.record(StepFacts(1, {"loss": math.inf}, None, 8, 100, 0.0))

    def refuse(word: str) -> float:
        raise AssertionError(word)

    text = (tmp_path / FILE).read_text("utf-8")
    assert json.loads(text, parse_constant=refuse)["values"] == {"loss": None, "tokens_per_second": 0.0}


def test_the_speed_is_that_of_the_stage(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    for step in range(30):
        slow = step >= 20
        monitor.record(
            StepFacts(step + 1, {"loss": 1.0, "stage": int(slow)}, None, 8, 100, 4.0 if slow else 0.1)
        )
        assert monitor.line["values"]["tokens_per_second"] == pytest.approx(25.0 if slow else 1000.0)


@pytest.mark.parametrize("resumed", [False, True])
def test_another_stage_is_no_jump(tmp_path: Path, resumed: bool) -> None:
    def given(step: int, stage: int, loss: float) -> StepFacts:
        return StepFacts(step + 1, {"loss": loss + 0.001 * (step % 3), "stage": stage}, None, 8, 100, 0.1)

    monitor = Monitor(tmp_path)
    for step in range(20):
        assert monitor.record(given(step, 0, 0.05)) == []
    if resumed:
        monitor.close()
        monitor = Monitor(tmp_path, resumed=20)
    for step in range(20, 40):
        assert monitor.record(given(step, 2, 1.8)) == []
    (alarm,) = monitor.record(given(40, 2, 9.0))
    assert alarm.kind == "spike"
