"""Time left is right within a factor of 1.5 from the tenth second on, for work of every kind that the stages do."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import pytest

from tinyonn.show.pace import MOST, Pace, Phase, rate_of

FACTOR = 1.5
FIRST = 10.0  # seconds
SLACK = 3.0  # seconds that do not matter


def ends_of(units: Sequence[float], workers: int = 1) -> list[float]:
    """When each unit ends, in the order of their ends: every worker takes the next one."""
    free = [0.0] * workers
    ends = []
    for seconds in units:
        ends.append(heapq.heappop(free) + seconds)
        heapq.heappush(free, ends[-1])
    return ends


def worst(
    pace: Pace, ends: Sequence[tuple[float, str, float]], first: float = FIRST, slack: float = SLACK
) -> float:
    """The largest factor by which the time left is wrong by more than the slack, looked at twice a second.

    `ends` are the moment, the phase and the work done in it by then, in order.
    """
    end, factor, number = max(moment for moment, _, _ in ends), 1.0, 0
    for now in np.arange(0.0, end, 0.5):
        while number < len(ends) and ends[number][0] <= now:
            moment, phase, done = ends[number]
            if pace.phase.name != phase:
                pace.enter(phase, moment)
            pace.phase.observe(moment, done)
            number += 1
        left = pace.left(float(now))
        if now < first:
            continue
        assert left is not None
        if abs(left - (end - now)) > slack:
            factor = max(factor, left / (end - now), (end - now) / max(left, 1e-9))
    return factor


def one_phase(
    units: Sequence[float], work: Sequence[float] | None = None, workers: int = 1, slack: float = SLACK
) -> float:
    """`worst` of units that take so many seconds each, weighted with their work."""
    work = [1.0] * len(units) if work is None else work
    free = [(0.0, number) for number in range(workers)]
    done = []
    for seconds, weight in zip(units, work, strict=True):
        moment, worker = heapq.heappop(free)
        done.append((moment + seconds, weight))
        heapq.heappush(free, (moment + seconds, worker))
    done.sort()
    ends = [
        (moment, "", float(sum(weight for _, weight in done[: n + 1]))) for n, (moment, _) in enumerate(done)
    ]
    pace = Pace([Phase("", float(sum(work)), parallel=workers)])
    pace.phase.observe(0.0, 0.0)
    return worst(pace, ends, slack=slack)


def test_constant_speed_is_exact() -> None:
    assert one_phase([2.0] * 200) < 1.02


@pytest.mark.parametrize("seed", range(5))
def test_noise_averages_out(seed: int) -> None:
    units = np.random.default_rng(seed).gamma(4.0, 0.25, 600)  # half of its mean, up and down
    assert one_phase(list(units)) < FACTOR


@pytest.mark.parametrize("seed", range(5))
def test_units_of_different_length_count_by_their_work(seed: int) -> None:
    tokens = np.random.default_rng(seed).choice([16.0, 64.0, 256.0, 2048.0], 300)
    units = 0.05 + tokens / 500
    by_work = one_phase(list(units), list(0.05 * 500 + tokens))
    assert by_work < 1.3
    ordered = np.sort(tokens)  # the short ones first: counted by the piece, this is wrong by far
    units = 0.05 + ordered / 500
    assert one_phase(list(units), list(0.05 * 500 + ordered)) < 1.3
    assert one_phase(list(units)) > 3


def test_first_unit_loads_and_compiles() -> None:
    """A slow first step counts once it is over, not in the speed of the others."""
    ends = [(20.0 + number, "", float(number + 1)) for number in range(600)]
    pace = Pace([Phase("", 600.0)])
    pace.phase.observe(0.0, 0.0)
    assert worst(pace, ends, first=24.0) < 1.1


def test_a_stall_does_not_change_the_speed() -> None:
    units = [0.5] * 100 + [60.0] + [0.5] * 400
    ends = [(moment, "", float(n + 1)) for n, moment in enumerate(ends_of(units))]
    pace = Pace([Phase("", float(len(units)))])
    pace.phase.observe(0.0, 0.0)
    assert worst(pace, ends, first=111.0) < 1.2


def test_checkpoints_now_and_then_are_part_of_the_speed() -> None:
    units = [5.0 if step % 25 == 24 else 0.5 for step in range(500)]
    assert one_phase(units, slack=5.0) < FACTOR  # the last checkpoint


def test_speed_that_changes_is_followed() -> None:
    """Another program takes half of the machine: a while later the estimate is that of the new speed."""
    units = [1.0] * 60 + [2.0] * 200
    ends = [(moment, "", float(n + 1)) for n, moment in enumerate(ends_of(units))]
    pace = Pace([Phase("", float(len(units)))])
    pace.phase.observe(0.0, 0.0)
    assert worst(pace, ends, first=150.0) < FACTOR


@pytest.mark.parametrize("workers", [2, 8])
def test_workers_that_end_together(workers: int) -> None:
    """Eight long units end within a moment of each other, which is no speed of eight in a moment."""
    units = list(np.random.default_rng(3).normal(8.0, 0.2, 40 * workers))
    assert one_phase(units, workers=workers, slack=5.0) < FACTOR  # half a unit more or less


def test_a_warm_start_has_a_speed_of_its_own() -> None:
    """200 steps of 0.1 s, then 400 of 4 s: half an hour, from the tenth second on."""
    warm = [(0.1 * (n + 1), "warm", n + 1.0) for n in range(200)]
    main = [(20.0 + 4.0 * (n + 1), "main", n + 1.0) for n in range(400)]
    pace = Pace([Phase("warm", 200.0), Phase("main", 400.0, expected=0.25)])
    pace.enter("warm", 0.0)
    assert worst(pace, [*warm, *main]) < 1.1


def test_a_phase_of_unknown_speed_is_not_guessed() -> None:
    pace = Pace([Phase("warm", 200.0), Phase("main", 400.0)])
    pace.enter("warm", 0.0)
    pace.phase.observe(10.0, 100.0)
    assert pace.left(10.0) is None
    assert pace.phase.left(10.0) == pytest.approx(10.0)
    pace.enter("main", 20.0)
    pace.phase.observe(24.0, 1.0)
    assert pace.left(24.0) == pytest.approx(399 * 4.0)


def test_what_earlier_starts_did_is_no_speed() -> None:
    """Work is that of this start: 30 of 1,000 are missing, 1 a second."""
    pace = Pace([Phase("", 30.0)])
    pace.phase.observe(1000.0, 0.0)
    for second in range(1, 11):
        pace.phase.observe(1000.0 + second, float(second))
    assert pace.left(1010.0) == pytest.approx(20.0)


def test_it_counts_down_between_units_but_not_below_the_next() -> None:
    phase = Phase("", 10.0)
    for number in range(4):
        phase.observe(60.0 * number, float(number))
    assert [phase.left(180.0 + wait) for wait in (0, 30, 60, 500)] == pytest.approx([420, 390, 360, 360])


def test_nothing_is_said_before_anything_is_done() -> None:
    phase = Phase("", 10.0)
    assert phase.left(0.0) is None
    phase.observe(0.0, 0.0)
    assert phase.left(30.0) is None
    assert Phase("", 10.0, expected=2.0).left(0.0) == 5.0
    assert Phase("", 0.0).left(0.0) == 0.0


def test_observations_stay_few() -> None:
    phase = Phase("", 1e6)
    for number in range(3 * MOST):
        phase.observe(0.01 * number, float(number))
    assert len(phase.observations) <= MOST
    assert rate_of(phase.observations) == pytest.approx(100, rel=0.01)
