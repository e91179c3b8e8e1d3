"""The search: finds, gives up early, goes on after a kill, and is shared by processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from tinyonn.errors import InputError
from tinyonn.train.search import Found, Range, Report, SearchOptions, begin, found, open_study, search

RANGES = {"rate": Range(1e-4, 1.0, log=True), "weight": Range(0.0, 4.0)}
FIRST = {"rate": 0.5, "weight": 3.5}


def bowl(values: Mapping[str, float], number: int, report: Report) -> float:
    """Lowest at rate 0.01, weight 1; known after ten steps."""
    value = (math.log10(values["rate"]) + 2) ** 2 + (values["weight"] - 1) ** 2
    for step in range(10):
        if report(step, value + 1 / (step + 1)):
            return math.inf
    return value


def run(folder: Path, trials: int, part: int = 0) -> Found:
    study = open_study(folder / "study.log", "test", SearchOptions(), part)
    begin(study, FIRST, RANGES)
    search(study, RANGES, bowl, trials)
    return found(study, "test")


def test_the_first_trial_is_what_is_given_and_the_search_betters_it(tmp_path: Path) -> None:
    first = run(tmp_path, 1)
    assert (first.values, first.finished, first.pruned) == (FIRST, 1, 0)
    more = run(tmp_path, 40)
    assert more.objective < 0.3 < first.objective
    assert more.finished + more.pruned == 40
    assert more.pruned > 0
    assert run(tmp_path, 40) == more  # nothing is left to try


def test_a_study_that_goes_on_does_not_draw_the_same_again(tmp_path: Path) -> None:
    for trials in range(2, 8):
        run(tmp_path, trials)
    study = open_study(tmp_path / "study.log", "test", SearchOptions())
    drawn = [tuple(trial.params.values()) for trial in study.get_trials()]
    assert len(set(drawn)) == len(drawn) == 7


def killed(folder: Path) -> None:
    def last(values: Mapping[str, float], number: int, report: Report) -> float:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return bowl(values, number, report)

    study = open_study(folder / "study.log", "test", SearchOptions())
    begin(study, FIRST, RANGES)
    search(study, RANGES, last, 10)


def test_what_a_kill_left_running_is_tried_anew(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (done := run(tmp_path, 6)).finished + done.pruned == 6
    trials = open_study(tmp_path / "study.log", "test", SearchOptions()).get_trials()
    assert [trial.state.name for trial in trials].count("FAIL") == 1
    assert trials[3].state.name == "FAIL"
    assert trials[4].params == trials[3].params


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    open_study(tmp_path / "study.log", "test", SearchOptions())
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=share, args=(tmp_path, part)) for part in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    study = open_study(tmp_path / "study.log", "test", SearchOptions())
    drawn = [tuple(trial.params.values()) for trial in study.get_trials()]
    assert 12 <= len(drawn) <= 13  # the other may be in its last when this one ends
    assert len(set(drawn)) == len(drawn)


def share(folder: Path, part: int) -> None:
    search(open_study(folder / "study.log", "test", SearchOptions(), part), RANGES, bowl, 12)


def test_values_that_are_not_finite_give_a_trial_up(tmp_path: Path) -> None:
    study = open_study(tmp_path / "study.log", "test", SearchOptions())
    search(study, RANGES, lambda values, number, report: math.nan, 3)
    with pytest.raises(InputError, match="none of 3 trials gave a finite loss"):
        found(study, "test")


@pytest.mark.parametrize("given", [(1.0, 1.0, False), (2.0, 1.0, False), (0.0, 1.0, True)])
def test_ranges_that_are_none_are_refused(given: tuple[float, float, bool]) -> None:
    with pytest.raises(InputError, match="give the lower end first"):
        Range(*given)
